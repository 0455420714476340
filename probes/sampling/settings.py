"""What a user asks of a probe, checked before anything is opened or attached."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from loka.errors import ArgumentError, nearest
from loka.formats import DEFAULT_RECIPES, Recipe, recipe
from loka.naming import clean_fqn, unwrap
from loka.probes.capturing.sites import FilterFn, named_sites
from loka.probes.sampling.losses import HOOKS, LossHook
from loka.probes.sampling.watch import Watch


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The checked arguments of `loka.probe`."""

    every: int
    overhead: float
    recipes: tuple[Recipe, ...]
    filter_fn: FilterFn | None
    loss: str | LossHook | None
    process_group: Any = None
    watch: Watch | None = None

    @classmethod
    def checked(
        cls,
        model: nn.Module,
        *,
        every: int,
        overhead: float,
        recipes: str | Sequence[str] | None,
        filter_fn: FilterFn | None,
        loss: str | LossHook | None,
    ) -> "Settings":
        """Raise ArgumentError for what cannot work."""
        _check_model(model)
        _check_filter(unwrap(model), filter_fn)
        names = (recipes,) if isinstance(recipes, str) else tuple(recipes or DEFAULT_RECIPES)
        return cls(
            every=_every(every),
            overhead=_overhead(overhead),
            recipes=tuple(recipe(name) for name in dict.fromkeys(names)),
            filter_fn=filter_fn,
            loss=_loss(loss),
        )


def _loss(loss: str | LossHook | None) -> str | LossHook | None:
    if loss is None or callable(loss) or (isinstance(loss, str) and loss in HOOKS):
        return loss
    known = ", ".join(map(repr, HOOKS))
    close = nearest(loss, HOOKS) if isinstance(loss, str) else ""
    raise ArgumentError(
        f"probe(loss={loss!r}): a loss is {known}, or a callable of (output, generator) that returns the loss of each "
        f"item for labels it draws.{close}"
    )


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"loka.probe watches a torch.nn.Module, not {type(model).__name__}. Give it the module that the training "
            "loop calls; for functional code, the module that holds the parameters and `with probe.step():`."
        )
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise ArgumentError(
            f"{lazy[0]!r} of {type(model).__name__} has no shape yet ({len(lazy)} lazy parameters). Run one batch "
            "through the model before giving it to loka.probe."
        )


def _every(every: int) -> int:
    try:
        value = 0 if isinstance(every, bool) else operator.index(every)
    except TypeError:
        value = 0
    if value < 1:
        raise ArgumentError(f"every={every!r}: one step in how many is sampled, a whole number from 1, e.g. every=100.")
    return value


def _overhead(overhead: float) -> float:
    if isinstance(overhead, bool) or not isinstance(overhead, Real) or not 0 < overhead < math.inf:
        raise ArgumentError(
            f"overhead={overhead!r}: the share of the run's own time that the probe may add, a positive number such as "
            "0.01."
        )
    return float(overhead)


def _check_filter(root: nn.Module, filter_fn: FilterFn | None) -> None:
    if filter_fn is None:
        return
    if not callable(filter_fn):
        raise ArgumentError(f"filter_fn={filter_fn!r}: it is a function, called as filter_fn(module, fqn) -> bool.")
    modules = [(module, clean_fqn(name)) for name, module in root.named_modules()]
    if not any(filter_fn(module, name) for module, name in (*modules, *named_sites(root))):
        names = [name for _, name in modules if name]
        known = (
            f"such as {', '.join(map(repr, names[-3:]))}" if names else "of modules; this model has only its root, ''"
        )
        raise ArgumentError(
            f"filter_fn admits none of the {len(modules)} modules of {type(root).__name__}. It is called as "
            f"filter_fn(module, fqn) with names {known}."
        )
