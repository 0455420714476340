"""How data travels inside the page: in columns, deflated, and unable to end the element it stands in.

Thousands of products repeat the same keys and words. So a list of records is taken apart into a column for each key,
down to lists of one kind of value, each of which is written in one go:

    ["record", keys, column for each key]      ["list", lengths, column of all items]
    ["text", distinct strings, index of each]  ["number", values, floats in six digits]
    ["flag", "0110..."]                        ["null", how many], ["empty", how many records]
    ["mixed", parts, which part each value is in]

The JSON is then deflated and written in base 64, which has no `<`; the browser inflates it when it is first needed.
"""

import base64
import json
import zlib
from collections.abc import Callable, Sequence
from itertools import chain, compress
from typing import Any, Final

from markupsafe import Markup

# Larger than level 9 by some percent, in a fraction of its time.
_LEVEL: Final[int] = 5
_NONE: Final[frozenset[str]] = frozenset()


def deflated(text: str) -> Markup:
    """Return a text as base 64 of its zlib stream, which a page may hold unescaped."""
    return Markup(base64.b64encode(zlib.compress(text.encode(), _LEVEL)).decode())


def columns(values: Sequence[Any], without: frozenset[str] = _NONE) -> str:
    """Return JSON values as the text of one column, as the module describes, records in it without some keys.

    Raises ValueError for NaN and infinity.
    """
    types = set(map(type, values))
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
    keys = [key for key in shapes.pop() if key not in without]
    if not keys:
        return f'["empty",{len(values)}]'
    found = (columns([value[key] for value in values], without) for key in keys)
    return f'["record",{_json(keys)},{",".join(found)}]'


def _mixed(values: Sequence[Any], kinds: Sequence[Any], without: frozenset[str]) -> str:
    """Return values of several kinds: those of each kind as a column, and which of them comes next."""
    place = {kind: at for at, kind in enumerate(dict.fromkeys(kinds))}
    which = [place[kind] for kind in kinds]
    parts = (list(compress(values, [part == at for part in which])) for at in place.values())
    return f'["mixed",[{",".join(columns(part, without) for part in parts)}],{_json(which)}]'


def _lists(values: Sequence[Sequence[Any]], without: frozenset[str]) -> str:
    return f'["list",{_json([len(value) for value in values])},{columns(list(chain.from_iterable(values)), without)}]'


def _texts(values: Sequence[str]) -> str:
    index = {text: at for at, text in enumerate(dict.fromkeys(values))}
    return f'["text",{_json(list(index))},{_json([index[value] for value in values])}]'


def _floats(values: Sequence[float]) -> str:
    text = ",".join(["%.6g"] * len(values)) % tuple(values)
    if "n" in text:  # nan, inf
        raise ValueError("A page holds finite numbers only; what is not finite has to be null.")
    return f'["number",[{text}]]'


_COLUMNS: Final[dict[type, Callable[[Sequence[Any]], str]]] = {
    str: _texts,
    bool: lambda values: f'["flag","{"".join(["01"[value] for value in values])}"]',
    int: lambda values: f'["number",{_json(values)}]',
    float: _floats,
    type(None): lambda values: f'["null",{len(values)}]',
}


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))
