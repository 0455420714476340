"""Writes to a model: what a replacement is in words, the dict entries that it exchanges, and how they are written."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType

from torch import Tensor, nn

from loka.mods.claims import CARRIED_HOOKS, CLASS_SLOT, Claim


@dataclass(frozen=True, kw_only=True, slots=True)
class Replacement:
    """What was replaced where, in words."""

    fqn: str
    mod: str
    before: str
    after: str
    reason: str

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.fqn}: {self.before} -> {self.after} ({self.mod}: {self.reason})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Edit:
    """One write: `key` of the dict `store` of `owner` ("" is the instance dict), and what was there before.

    With CLASS_SLOT as `key` it is the class of `owner` that is written.
    """

    owner: nn.Module
    store: str
    key: str
    before: object
    after: object

    @property
    def place(self) -> tuple[int, str, str]:
        """Where it writes: two edits of one place follow each other."""
        return id(self.owner), self.store, self.key

    def current(self) -> object:
        """Return what is there now."""
        return type(self.owner) if self.key == CLASS_SLOT else self._table().get(self.key)

    def put(self, value: object) -> None:
        """Write; the key exists, so the order of keys, and with it of `state_dict`, stays."""
        if self.key == CLASS_SLOT:
            self.owner.__class__ = value  # type: ignore[assignment]
        else:
            self._table()[self.key] = value

    def _table(self) -> dict[str, object]:
        table = vars(self.owner)
        return table[self.store] if self.store else table


def edits_of(model: nn.Module, built: Sequence[tuple[Claim, object]]) -> list[Edit]:
    """Return every write: one for a slot, one per registration for a module."""
    homes: dict[int, list[tuple[nn.Module, str]]] = {}
    for owner in model.modules():
        for key, child in owner._modules.items():
            homes.setdefault(id(child), []).append((owner, key))
    edits = []
    for claim, after in built:
        if claim.slot:
            store = "_parameters" if claim.slot in claim.module._parameters else ""
            places = [(claim.module, claim.slot)]
        else:
            store, places = "_modules", homes[id(claim.module)]
        edits += [Edit(owner=owner, store=store, key=key, before=claim.before, after=after) for owner, key in places]
    return edits


def inherit(before: nn.Module, after: nn.Module) -> None:
    """Give the replacement the mode and hooks of what it replaces; a wrapper leaves both to the module inside it."""
    inner = set(before.modules())
    for module in after.modules():
        if module not in inner:
            module.training = before.training
    if before not in after.modules():
        vars(after).update({name: vars(before)[name] for name in CARRIED_HOOKS})


def write(edits: Sequence[Edit]) -> None:
    """Carry out all of them or, where an interrupt comes, none."""
    written: list[Edit] = []
    try:
        for edit in edits:
            written.append(edit)
            edit.put(edit.after)
    except BaseException:  # an interrupt, too, must not leave half a rewrite behind
        take_back(written)
        raise


def take_back(edits: Iterable[Edit]) -> None:
    """Put back what was there before, last first."""
    for edit in reversed(list(edits)):
        edit.put(edit.before)


def in_words(value: object) -> str:
    """Return a module, parameter, class, function or None as one line."""
    if isinstance(value, Tensor) and not nn.parameter.is_lazy(value):
        return f"{type(value).__name__}{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, type | FunctionType | BuiltinFunctionType):
        return str(getattr(value, "_loka_words", value.__name__))
    return "none" if value is None else " ".join(repr(value).split())
