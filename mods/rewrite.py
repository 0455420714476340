"""Rewriting a model: collect claims on the untouched model, check them all, and only then touch it.

A mod never changes anything itself. `apply` gathers the claims of every mod, refuses whatever cannot be done as a whole
(see `checks`), builds every replacement, and writes them in one go. So a model is either rewritten completely or is bit
for bit as it was, and `Applied.undo` puts the very same modules and parameters back.

    applied = loka.mods.apply(model, [NoBias(keep=["head*"]), BlockNorm(256), HardSwish()])

Apply mods before wrapping (DDP, FSDP, torch.compile), before `loka.probe` and `loka.convert`, and before the optimizer
is made: it would go on holding parameters that left the model. Keys of `state_dict` change only where a replaced module
or a removed parameter had some; the docstring of each mod says which, and how an old checkpoint is loaded.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from loka.errors import ArgumentError, ModError
from loka.mods.checks import check_built, gather, refuse_unready, without_conflicts
from loka.mods.claims import CARRIED_HOOKS, Claim, FilterFn, Mod
from loka.mods.fast_paths import side_claims

logger = logging.getLogger("loka.mods")


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
    """One write: `key` of the dict `store` of `owner` ("" is the instance dict), and what was there before."""

    owner: nn.Module
    store: str
    key: str
    before: object
    after: object

    def current(self) -> object:
        """Return what is there now."""
        return self._table().get(self.key)

    def put(self, value: object) -> None:
        """Write; the key exists, so the order of keys, and with it of `state_dict`, stays."""
        self._table()[self.key] = value

    def _table(self) -> dict[str, object]:
        table = vars(self.owner)
        return table[self.store] if self.store else table


class Applied:
    """Mods in force on one model. Also a context manager: leaving the `with` block undoes them."""

    def __init__(self, model: nn.Module, replacements: tuple[Replacement, ...], edits: tuple[Edit, ...]) -> None:
        self.replacements = replacements
        self._edits = edits
        self._home = _home(model)
        self._placed = self._placement()

    @property
    def active(self) -> bool:
        """Whether the replacements are still in the model."""
        return bool(self._edits)

    def undo(self) -> None:
        """Put the very same modules and parameters back, last first; the second call does nothing.

        They follow the model to the device, dtype and train/eval mode it has by now. Raises ModError, having changed
        nothing, where a replacement has been replaced in turn.
        """
        changed = [edit.key for edit in self._edits if edit.current() is not edit.after]
        if changed:
            raise ModError(
                f"The mods cannot be undone: {len(changed)} of {len(self._edits)} replaced slots were changed since "
                f"({', '.join(repr(key) for key in changed[:3])}). Undo later mods and conversions first. "
                "Nothing was changed."
            )
        restored: dict[int, object] = {}  # shared modules and tied parameters come back as one object
        for edit in reversed(self._edits):
            if id(edit.before) not in restored:
                restored[id(edit.before)] = self._follow(edit)
            edit.put(restored[id(edit.before)])
        self._edits = ()

    def _placement(self) -> tuple[torch.device, torch.dtype] | None:
        owner, key = self._home or (None, "")
        parameter = owner._parameters.get(key) if owner is not None else None
        return None if parameter is None else (parameter.device, parameter.dtype)

    def _follow(self, edit: Edit) -> object:
        """Let what comes back take part in what happened to the model meanwhile, and return it.

        A parameter stays the same object unless torch itself makes a new one for the move, as it does for `meta`.
        """
        if isinstance(edit.before, nn.Module) and isinstance(edit.after, nn.Module):
            if edit.before.training != edit.after.training:
                edit.before.train(edit.after.training)
            if edit.before._backward_hooks is edit.after._backward_hooks:  # how to call them may be settled since
                edit.before._is_full_backward_hook = edit.after._is_full_backward_hook
            moving: nn.Module = edit.before
        elif isinstance(edit.before, nn.Parameter):
            moving = nn.ParameterList([edit.before])
        else:
            return edit.before
        now, placed = self._placement(), self._placed
        if now is not None and placed is not None and now != placed:
            device, dtype, old_dtype = now[0], now[1], placed[1]
            moving._apply(  # type: ignore[no-untyped-call]
                lambda tensor: tensor.to(device, dtype if tensor.dtype == old_dtype else tensor.dtype)
            )
        return moving[0] if isinstance(moving, nn.ParameterList) else moving

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        return "\n".join(str(replacement) for replacement in self.replacements)


def apply(model: nn.Module, mods: Sequence[Mod], filter_fn: FilterFn | None = None) -> Applied:
    """Rewrite `model` in place by all of `mods`, or leave it as it was and raise.

    `filter_fn(module, fqn) -> bool` keeps a mod away from a module, for a parameter from the module that holds it.
    Returns what was replaced, with `undo()`. Raises ModError where a mod finds nothing to do, two mods want the same
    place, a shared module or parameter would be rewritten under some of its names only, or the model is compiled,
    wrapped or converted; ArgumentError for wrong arguments.
    """
    mods = _checked_mods(model, mods)
    refuse_unready(model)
    claims: list[Claim] = []
    for mod in mods:
        claims += gather(model, mod, filter_fn)
    claims, satisfied = without_conflicts(claims)
    claims += side_claims(model, claims)
    built = [(claim, claim.build() if claim.build is not None else None) for claim in claims]
    check_built(model, built, satisfied)
    edits = _edits(model, built)
    notes = {id(whole): f"; {removal.name!r} goes with it, as {removal.mod} asks" for removal, whole in satisfied}
    replacements = tuple(
        Replacement(
            fqn=claim.name,
            mod=claim.mod,
            before=_words(claim.before),
            after=_words(after),
            reason=claim.reason + notes.get(id(claim), ""),
        )
        for claim, after in built
    )
    for claim, after in built:
        if isinstance(claim.before, nn.Module) and isinstance(after, nn.Module):
            _inherit(claim.before, after)
    _write(edits)
    for replacement in replacements:
        logger.info("%s", replacement)
    return Applied(model, replacements, tuple(edits))


def _checked_mods(model: nn.Module, mods: Sequence[Mod]) -> tuple[Mod, ...]:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"loka.mods.apply rewrites an nn.Module, not a {type(model).__name__}.")
    if isinstance(mods, Mod) or (isinstance(mods, type) and issubclass(mods, Mod)):
        mods = (mods,)
    given = tuple(mods)
    for mod in given:
        if isinstance(mod, type) and issubclass(mod, Mod):
            raise ArgumentError(f"{mod.__name__} is a class; give an instance: {mod.__name__}(...).")
        if not isinstance(mod, Mod):
            raise ArgumentError(f"{mod!r} is not a mod. Give mods such as [loka.mods.NoBias(), loka.mods.HardSwish()].")
    if not given:
        raise ArgumentError("No mod was given, so there is nothing to apply. Give e.g. [loka.mods.NoBias()].")
    return given


def _edits(model: nn.Module, built: Sequence[tuple[Claim, object]]) -> list[Edit]:
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


def _inherit(before: nn.Module, after: nn.Module) -> None:
    """Give the replacement the mode and hooks of what it replaces; a wrapper leaves both to the module inside it."""
    inner = set(before.modules())
    for module in after.modules():
        if module not in inner:
            module.training = before.training
    if before not in after.modules():
        vars(after).update({name: vars(before)[name] for name in CARRIED_HOOKS})


def _write(edits: Sequence[Edit]) -> None:
    written: list[Edit] = []
    try:
        for edit in edits:
            written.append(edit)
            edit.put(edit.after)
    except BaseException:  # an interrupt, too, must not leave half a rewrite behind
        for edit in reversed(written):
            edit.put(edit.before)
        raise


def _words(value: object) -> str:
    if isinstance(value, Tensor) and not nn.parameter.is_lazy(value):
        return f"{type(value).__name__}{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return "none" if value is None else " ".join(repr(value).split())


def _home(model: nn.Module) -> tuple[nn.Module, str] | None:
    """Return where a floating parameter that stays in the model is registered: it shows where the model is now."""
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                return module, key
    return None
