"""Rewriting a model: collect claims on the untouched model, check them all, and only then touch it.

A mod never changes anything itself. `apply` gathers the claims of every mod, refuses whatever cannot be done as a whole
(see `checks`), builds every replacement, and writes them in one go. So a model is either rewritten completely or is bit
for bit as it was, and `Applied.undo` puts the very same modules and parameters back.

    applied = loka.mods.apply(model, [NoBias(keep=["head*"]), BlockNorm(256), HardSwish()])

Apply mods before wrapping (DDP, FSDP, torch.compile), before `loka.probe` and `loka.convert`, and before the optimizer
is made: it would go on holding parameters that left the model. Keys of `state_dict` change only where a replaced module
or a removed parameter had some; the docstring of each mod says which, and how an old checkpoint is loaded.

Equivalent mods keep what the model computes. They are carried out after the architectural ones, on real `inputs`, and
only what leaves the output as it was stays (see `verify`); the rest is in `Applied.refused`, with the reason.

    applied = loka.mods.apply(model, [FuseParallelLinears(), Hadamard()], inputs=[batch, another])
"""

import logging
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from loka.errors import ArgumentError, ModError
from loka.mods.checks import check_built, gather, refuse_unready, without_conflicts
from loka.mods.claims import Claim, FilterFn, Mod
from loka.mods.edits import Edit, Replacement, edits_of, in_words, inherit, take_back, write
from loka.mods.fast_paths import side_claims
from loka.mods.source.calls import merged
from loka.mods.trial.equivalent import Batch, EquivalentMod, Refusal
from loka.mods.trial.verify import TOLERANCE, checked_trial, keep_equivalent

logger = logging.getLogger("loka.mods")


class Applied:
    """Mods in force on one model. Also a context manager: leaving the `with` block undoes them.

    `refused`: places that equivalent mods left as they were, and why.
    """

    def __init__(
        self,
        model: nn.Module,
        replacements: tuple[Replacement, ...],
        edits: tuple[Edit, ...],
        refused: tuple[Refusal, ...] = (),
    ) -> None:
        self.replacements = replacements
        self.refused = refused
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
        latest = {edit.place: edit for edit in self._edits}  # a later mod may have written where an earlier one did
        changed = [edit.key for edit in latest.values() if edit.current() is not edit.after]
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
            if nn.parameter.is_lazy(edit.before):
                _settle(edit.before, edit.owner)
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
        """Say what was replaced, and what stays as it was and why, a line each."""
        return "\n".join(map(str, (*self.replacements, *self.refused)))


def _settle(bias: Any, owner: nn.Module) -> None:
    """Give a bias the size that its lazy module got without it, and zeros: so the module goes on with what it does."""
    weight = owner._parameters.get("weight")
    size = getattr(owner, "out_features", getattr(owner, "out_channels", None))
    if weight is not None and size is not None and not nn.parameter.is_lazy(weight):
        bias.materialize((size,), weight.device, weight.dtype)
        nn.init.zeros_(bias)


def apply(
    model: nn.Module,
    mods: Sequence[Mod],
    filter_fn: FilterFn | None = None,
    *,
    inputs: Iterable[Batch] | None = None,
    tolerance: float = TOLERANCE,
) -> Applied:
    """Rewrite `model` in place by all of `mods`, or leave it as it was and raise.

    `filter_fn(module, fqn) -> bool` keeps a mod away from a module, for a parameter from the module that holds it.
    `inputs`: batches that the model is run on, which equivalent mods need: each a tensor, a tuple of arguments or a
    dict of keyword arguments. An equivalent mod stays where it moves no tensor that the model returns by more than
    `tolerance`, relative to its norm, by rows and as a whole; all that stays is within it together.

    Returns what was replaced, and what equivalent mods refused, with `undo()`. Raises ModError where a mod finds
    nothing to do, two mods want the same place, a shared module or parameter would be rewritten under some of its names
    only, or the model is compiled, wrapped or converted; ArgumentError for wrong arguments.
    """
    mods = _checked_mods(model, mods)
    architectural = [mod for mod in mods if not isinstance(mod, EquivalentMod)]
    first, last = ([mod for mod in architectural if mod.last is late] for late in (False, True))
    equivalent = [mod for mod in mods if isinstance(mod, EquivalentMod)]
    if equivalent and inputs is None:
        raise ArgumentError(
            f"{equivalent[0].name} keeps what the model computes, which is verified on real input. Give "
            "inputs=[batch, ...], each a tensor, a tuple of arguments or a dict of keyword arguments of the model."
        )
    trial = checked_trial(inputs, tolerance) if equivalent else None
    refuse_unready(model)
    done: list[tuple[tuple[Replacement, ...], tuple[Edit, ...]]] = []
    refused: tuple[Refusal, ...] = ()
    try:
        done += [_rewrite(model, first, filter_fn)] if first else []
        if trial is not None:
            outcome = keep_equivalent(model, equivalent, filter_fn, trial)
            done.append((tuple(outcome.replacements), tuple(outcome.edits)))
            refused = tuple(outcome.refused)
        done += [_rewrite(model, last, filter_fn)] if last else []
    except BaseException:  # an interrupt, too, must not leave half a rewrite behind
        for _, edits in reversed(done):
            take_back(edits)
        raise
    replacements = tuple(each for part, _ in done for each in part)
    return Applied(model, replacements, tuple(each for _, part in done for each in part), refused)


def _rewrite(
    model: nn.Module, mods: Sequence[Mod], filter_fn: FilterFn | None
) -> tuple[tuple[Replacement, ...], tuple[Edit, ...]]:
    """Carry out architectural mods, all or nothing."""
    claims: list[Claim] = []
    for mod in mods:
        claims += gather(model, mod, filter_fn)
    claims, satisfied = without_conflicts(merged(claims))
    claims += side_claims(model, claims)
    built = [(claim, claim.build() if claim.build is not None else None) for claim in claims]
    check_built(model, built, satisfied)
    edits = edits_of(model, built)
    notes = {id(whole): f"; {removal.name!r} goes with it, as {removal.mod} asks" for removal, whole in satisfied}
    replacements = tuple(
        Replacement(
            fqn=claim.name,
            mod=claim.mod,
            before=in_words(claim.before),
            after=in_words(after),
            reason=claim.reason + notes.get(id(claim), ""),
        )
        for claim, after in built
    )
    for claim, after in built:
        if isinstance(claim.before, nn.Module) and isinstance(after, nn.Module):
            inherit(claim.before, after)
    write(edits)
    for replacement in replacements:
        logger.info("%s", replacement)
    return replacements, tuple(edits)


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


def _home(model: nn.Module) -> tuple[nn.Module, str] | None:
    """Return where a floating parameter that stays in the model is registered: it shows where the model is now."""
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                return module, key
    return None
