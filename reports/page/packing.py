"""How data travels inside the page: in columns, deflated, and unable to end the element it stands in.

Thousands of products repeat the same keys and words. So a list of records is taken apart into a column for each key,
down to lists of one kind of value, each of which is written in one go:

    ["record", keys, column for each key]      ["list", lengths, column of all items]
    ["text", distinct values, index of each]   ["number", values, floats in six digits]
    ["flag", "0110..."]                        ["null", how many], ["empty", how many records]
    ["mixed", parts, which part each value is in]

The JSON is then deflated and written in base 64, which has no `<`; the browser inflates it when it is first needed.
"""

import base64
import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, compress
from typing import Any, Final, TypeVar

from markupsafe import Markup

V = TypeVar("V")

# Larger than level 9 by some percent, in a fraction of its time.
_LEVEL: Final[int] = 5
# Numbers that each occur so often on average are written once, as texts are.
_REPEATED: Final[int] = 3
# Kinds of values that may be null beside others of their kind.
_OR_NULL: Final[int] = 2
_SCALARS: Final[frozenset[type]] = frozenset({str, int, float})
_NONE: Final[frozenset[str]] = frozenset()


def deflated(text: str) -> Markup:
    """Return a text as base 64 of its zlib stream, which a page may hold unescaped."""
    return Markup(base64.b64encode(zlib.compress(text.encode(), _LEVEL)).decode())


def columns(values: Sequence[Any], without: frozenset[str] = _NONE) -> str:
    """Return JSON values as the text of one column, as the module describes, records in it without some keys.

    Raises ValueError for NaN and infinity.
    """
    types = set(map(type, values))
    if len(types) == _OR_NULL and type(None) in types and not types.isdisjoint(_SCALARS):
        found = _repeated(values)
        if found is not None:
            return found
    if len(types) > 1:
        return _mixed(values, list(map(type, values)), without)
    kind = types.pop() if types else type(None)
    if kind is dict:
        return _records(values, without)
    if issubclass(kind, list | tuple):
        return _lists(values, without)
    if kind not in _COLUMNS:  # a subclass, as torch's version of a text is
        kind = next(base for base in _COLUMNS if issubclass(kind, base))
    return _COLUMNS[kind](values)


def _records(values: Sequence[dict[str, Any]], without: frozenset[str]) -> str:
    shapes = set(map(tuple, values))
    if len(shapes) > 1:
        return _mixed(values, list(map(tuple, values)), without)
    shape = shapes.pop()
    keys = [key for key in shape if key not in without]
    if not keys:
        return f'["empty",{len(values)}]'
    row_by_row = list(chain.from_iterable(map(dict.values, values)))  # all of them have the same keys in one order
    found = (columns(row_by_row[at :: len(shape)], without) for at, key in enumerate(shape) if key not in without)
    return f'["record",{_json(keys)},{",".join(found)}]'


def _mixed(values: Sequence[Any], kinds: Sequence[Any], without: frozenset[str]) -> str:
    """Return values of several kinds: those of each kind as a column, and which of them comes next."""
    index = _index(kinds)
    which = list(map(index.__getitem__, kinds))
    parts = (list(compress(values, map(at.__eq__, which))) for at in index.values())
    return f'["mixed",[{",".join(columns(part, without) for part in parts)}],[{",".join(which)}]]'


def _lists(values: Sequence[Sequence[Any]], without: frozenset[str]) -> str:
    lengths = _integers(list(map(len, values)))
    return f'["list",{lengths},{columns(list(chain.from_iterable(values)), without)}]'


def _texts(values: Sequence[str]) -> str:
    index = _index(values)
    return f'["text",{_json(list(index))},{_places(index, values)}]'


def _floats(values: Sequence[float]) -> str:
    return _repeated(values) or f'["number",[{_six_digits(values)}]]'


def _repeated(values: Sequence[str | float | None]) -> str | None:
    """Return values of one kind, or null, each of them written once; None where few of them occur again."""
    known = dict.fromkeys(values)
    if len(known) * _REPEATED > len(values):
        return None
    different, index = [value for value in known if value is not None], _index(known)
    floats = [value for value in different if type(value) is float]
    alike = len(floats) == len(different)
    written = _six_digits(floats).split(",") if alike else [_json(value) for value in different]
    if None in index:
        written.insert(int(index[None]), "null")
    return f'["text",[{",".join(written)}],{_places(index, values)}]'


def _index(values: Iterable[V]) -> dict[V, str]:
    """Return the place of each value among those that differ, as it is written."""
    return {value: str(at) for at, value in enumerate(dict.fromkeys(values))}


def _places(index: Mapping[V, str], values: Sequence[V]) -> str:
    return f"[{','.join(map(index.__getitem__, values))}]"


def _six_digits(values: Sequence[float]) -> str:
    text = ",".join(["%.6g"] * len(values)) % tuple(values)
    if "n" in text:  # nan, inf
        raise ValueError("A page holds finite numbers only; what is not finite has to be null.")
    return text


def _integers(values: list[int]) -> str:
    """Return the JSON of whole numbers, which is how Python shows them."""
    return repr(values).replace(" ", "")


_COLUMNS: Final[dict[type, Callable[[Sequence[Any]], str]]] = {
    str: _texts,
    bool: lambda values: f'["flag","{"".join(["01"[value] for value in values])}"]',
    int: lambda values: f'["number",{_integers(list(map(int, values)))}]',
    float: _floats,
    type(None): lambda values: f'["null",{len(values)}]',
}


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))
