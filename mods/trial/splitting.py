"""Mods that split linears one by one: some columns go to a linear of their own, which stays in high precision."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from loka.mods.claims import Claim
from loka.mods.trial.equivalent import (
    NOT_CALLED,
    EquivalentMod,
    Place,
    Proposal,
    Refusal,
    linears,
    renewed,
    unsuited,
)
from loka.mods.trial.observe import LinearTraffic, Traffic
from loka.mods.trial.wrapping import KeptLinear


class SplittingMod(EquivalentMod):
    """Base of these mods: which linears they look at, and which of them cannot be split."""

    only: str | Sequence[str] | None

    @abstractmethod
    def split(self, fqn: str, linear: nn.Linear, seen: LinearTraffic) -> Claim | Refusal:
        """Return how one linear is split, or why it is not worth it."""

    def measures(self, model: nn.Module) -> Iterable[nn.Linear]:
        """Measure those that may be split."""
        return linears(model, self.only).values()

    def proposals(self, model: nn.Module, traffic: Traffic) -> Iterable[Proposal]:
        """Propose each linear that can be split and is worth it."""
        for fqn, linear in linears(model, self.only).items():
            seen = traffic.measured(linear)
            reader = traffic.foreign.get(id(linear))
            if seen is None:
                yield self.refused(fqn, NOT_CALLED)
            elif why := f"its weight is also read by {reader}" if reader else unsuited(linear):
                yield self.refused(fqn, why)
            else:
                found = self.split(fqn, linear, seen)
                yield found if isinstance(found, Refusal) else Place(mod=self.name, fqn=fqn, claims=(found,))

    def nothing_found(self, model: nn.Module) -> str:
        """Say what was looked for."""
        return "It looks for nn.Linear; the model has none."

    def refused(self, fqn: str, reason: str, figure: float | None = None) -> Refusal:
        """Say why a linear stays as it was, with the figure that decided it."""
        return Refusal(fqn=fqn, mod=self.name, reason=reason, figure=figure)


def kept_columns(linear: nn.Linear, columns: Tensor) -> KeptLinear | None:
    """Return a linear of these columns of a weight, None for no column; without a bias."""
    if not len(columns):
        return None
    kept = KeptLinear(len(columns), linear.out_features, bias=False, device="meta")
    kept.weight = renewed(linear.weight, linear.weight.detach().index_select(1, columns))
    return kept
