"""Advice held to a model: `apply` itself is asked, on real input, and what it did is undone.

So there is no second opinion on what a mod takes: a place is advised where `apply` rewrites it, and else set aside with
the reason that `apply` gives. Every place is asked about on the model as it is, as if it were the only one.
"""

import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import nn

from loka.errors import ArgumentError, LokaError, LokaWarning
from loka.mods.checks import refuse_unready
from loka.mods.rewrite import Applied, apply
from loka.mods.trial.equivalent import Batch, EquivalentMod
from loka.mods.trial.verify import checked_trial, run
from loka.reports.advise.line import Line

_UNCHANGED = " Nothing was changed."


class OnModel:
    """A model, and the batches that equivalent mods are verified on.

    Raises ArgumentError for batches that do not fit the model, ModError for a model that no mod may be applied to.
    """

    def __init__(self, on: object) -> None:
        if not isinstance(on, tuple) or len(on) != 2 or not isinstance(on[0], nn.Module):
            raise ArgumentError(
                f"on={type(on).__name__}: give the model that was probed and batches to try mods on, as "
                "on=(model, [batch, ...])."
            )
        self.model: nn.Module = on[0]
        self.batches: tuple[Batch, ...] = checked_trial(on[1]).batches
        refuse_unready(self.model)
        for _ in run(self.model, self.batches):
            pass  # batches that do not fit are no reason against a mod

    def refusals(self, asked: Sequence[tuple[Line, tuple[str, ...]]]) -> list[str]:
        """Return for each line, with the places it is to rewrite, why `apply` leaves them as they are; "" where not."""
        alike: defaultdict[str, list[int]] = defaultdict(list)
        for index, (line, _) in enumerate(asked):
            alike[str(replace(line, options={**line.options, "only": None}))].append(index)
        granted: set[int] = set()
        for group in alike.values():
            one = asked[group[0]][0].with_all([asked[index][0] for index in group[1:]])
            if len(group) > 1 and one is not None:
                names = self._replaced(one)
                granted |= {index for index in group if all(_touched(place, names) for place in asked[index][1])}
        return ["" if index in granted else self._refusal(line) for index, (line, _) in enumerate(asked)]

    def _replaced(self, line: Line) -> tuple[str, ...]:
        try:
            return tuple(each.fqn for each in self._tried(line).replacements)
        except LokaError:  # one of them stops all; each is asked about alone
            return ()

    def _refusal(self, line: Line) -> str:
        try:
            applied = self._tried(line)
        except LokaError as error:
            return str(error).removesuffix(_UNCHANGED)
        reasons = [str(each) for each in applied.refused]
        return "" if applied.replacements else "; ".join(reasons[:2]) or "nothing was replaced"

    def _tried(self, line: Line) -> Applied:
        mod = line.made()
        inputs: Iterable[Batch] | None = self.batches if isinstance(mod, EquivalentMod) else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LokaWarning)  # of places that were not asked about
            applied = apply(self.model, [mod], line.filter_fn(), inputs=inputs)
        applied.undo()
        return applied


def _touched(place: str, names: Iterable[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for name in names)
