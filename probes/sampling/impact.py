"""Loss impact: what the rounding of one forward product does to the loss, by recipe, before anything is rounded.

With dY what rounding changes in a product's output and g the gradient of the loss there, to second order

    dL = <g, dY>  +  1/2 mean over items of (g~ . dY)^2

The second term is the curvature (row-wise Fisher; g~ for labels drawn from the model, see `losses`): never negative,
stable from one batch, it ranks sites as the loss does. The first is exact for the batch at hand and mostly noise for
any other: its mean is kept, and its spread over batches, sqrt(sum of (g . dY)^2), which one batch predicts.

The forward pass leaves the deviations of some rows of each product, the backward passes meet them with the gradient of
the same rows. Rows that belong to one item of the loss are summed before they are squared.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from loka.formats import Recipe
from loka.probes.capturing.capture import Sighting
from loka.probes.capturing.products import Gemm
from loka.probes.capturing.sites import SiteKey
from loka.probes.records import LossImpact
from loka.probes.sampling.losses import Labels, ModelLoss, true_scale
from loka.probes.sampling.measure import Deviations, most_rows

# Memory that the deviations of one step may take, and what part of it one product may, unless its rows get too few.
_KEPT_BYTES: Final[int] = 32 << 20
_SHARE: Final[float] = 0.25
_FEWEST_ROWS: Final[int] = 8
# The impact is taken on rows of this many items, whose contributions differ by orders of magnitude where clicks are
# rare; and on no more rows than that.
_ITEMS: Final[int] = 512
_MOST_ROWS: Final[int] = 2048
# The largest number of rows of one item that are taken together; more, and each row counts as an item.
MOST_BLOCK: Final[int] = 64


@dataclass(slots=True)
class _Site:
    """One forward product of the step: its deviations, and what the two kinds of gradient made of them."""

    deviations: Deviations
    node: int  # of the autograd graph
    parameter: str
    seen: dict[bool, Tensor] = field(default_factory=dict)  # drawn labels? -> g . dY per item [recipes, items]


@dataclass(slots=True)
class Turns:
    """Whose turn it is when there is no room for all in one step: of those that waited, who has had the fewest."""

    _taken: dict[SiteKey, int] = field(default_factory=dict)
    _waiting: set[SiteKey] = field(default_factory=set)

    def may(self, key: SiteKey) -> bool:
        """Whether nobody who waits has had fewer turns."""
        had = self._taken.get(key, 0)
        return all(had <= self._taken.get(other, 0) for other in self._waiting)

    def took(self, key: SiteKey) -> None:
        """Count a turn."""
        self._taken[key] = self._taken.get(key, 0) + 1
        self._waiting.discard(key)

    def waits(self, key: SiteKey) -> None:
        """Remember that there was no room."""
        self._waiting.add(key)


@dataclass(slots=True)
class ImpactMeter:
    """One sampled step. `labelled` is set while the backward for drawn labels runs."""

    recipes: Sequence[Recipe]
    turns: Turns = field(default_factory=Turns)
    labelled: bool = False
    loss: ModelLoss | None = None  # what the hook made of the output
    root_value: float | None = None  # what the loop's own backward began at; None: none has begun
    _sites: dict[SiteKey, _Site] = field(default_factory=dict)
    _bytes: int = 0

    def rows(self, key: SiteKey, gemm: Gemm, block: int) -> int:
        """Return how many rows of a product are to leave their deviations in this step: whole blocks, or none."""
        row_bytes = 4 * len(self.recipes) * max(gemm.n, 1)
        fair = max(int(_SHARE * _KEPT_BYTES) // row_bytes, _FEWEST_ROWS)
        rows = min(_ITEMS * block, _MOST_ROWS, most_rows(gemm), fair)
        rows = max(rows // block, 1) * block
        if row_bytes * min(rows, gemm.m) > _KEPT_BYTES or not self.turns.may(key):
            return 0
        if self._bytes + row_bytes * min(rows, gemm.m) > _KEPT_BYTES:
            self.turns.waits(key)
            return 0
        return rows

    def keep(self, sighting: Sighting, deviations: Deviations) -> None:
        """Keep what rounding did to a forward product until its gradient comes by."""
        self.turns.took(sighting.key)
        self._bytes += deviations.values.nbytes
        self._sites[sighting.key] = _Site(deviations, sighting.node, sighting.parameter)

    @property
    def parameters(self) -> frozenset[str]:
        """FQNs of the weights of the products kept."""
        return frozenset(site.parameter for site in self._sites.values() if site.parameter)

    def saw_gradient(self, sighting: Sighting) -> None:
        """Meet a gradient: `grad_output` is the first operand of dgrad as it is and of wgrad transposed."""
        site, a = self._sites.get(sighting.key), sighting.gemm.a
        if site is None or site.node != sighting.node or self.labelled in site.seen or a.dim() != 3 or len(a) != 1:
            return
        gradient = a[0] if sighting.product == "dgrad" else a[0].mT
        deviations = site.deviations
        if tuple(gradient.shape) != (deviations.extent, deviations.values.shape[-1]):
            return
        rows = gradient if deviations.index is None else gradient.index_select(0, deviations.index.to(gradient.device))
        products = torch.einsum("rn,qrn->qr", rows.double(), deviations.values.double())
        site.seen[self.labelled] = products.view(len(products), -1, deviations.block).sum(-1)

    def finish(self) -> dict[SiteKey, dict[str, LossImpact]]:
        """Return the impacts of the step; empty where no loss is known, and of one that is not positive."""
        if not self.mean_loss > 0:
            return {}
        met = {key: site for key, site in self._sites.items() if False in site.seen and site.seen[False].numel()}
        return {key: self._impacts(site) for key, site in met.items()}

    @property
    def mean_loss(self) -> float:
        """Mean loss per item of the step's batch, as the loop's own backward saw it; NaN where it is not known.

        Those of policy gradients and likelihoods may be negative.
        """
        value = self.root_value
        if value is None or not math.isfinite(value):
            return math.nan
        return value / self._scale(value)

    @property
    def labels(self) -> Labels:
        """Whose labels the curvature was taken with."""
        drawn = any(True in site.seen for site in self._sites.values())
        return self.loss.labels if self.loss is not None and drawn else "empirical"

    def _scale(self, value: float) -> float:
        return true_scale(value, self.loss) if self.loss is not None else 1.0

    def _impacts(self, site: _Site) -> dict[str, LossImpact]:
        """Bring both kinds of gradient to the mean loss: the loop's own are those of its root, which it may scale."""
        assert self.root_value is not None
        items = site.deviations.extent // site.deviations.block
        true = site.seen[False] / self._scale(self.root_value)  # [recipes, sampled items]
        drawn = site.seen.get(True)
        if drawn is not None and self.loss is not None:
            # Gradients of the summed loss are an item's own. Where the hook counts other items than the rows do, the
            # squares are those of parts of an item.
            curvature = 0.5 * drawn.square().mean(-1) * (items / self.loss.items)
        else:
            curvature = 0.5 * (items * true).square().mean(-1)
        first = items * true.mean(-1)
        spread = (items * true.square().mean(-1)).sqrt()
        columns = zip(self.recipes, curvature.tolist(), first.tolist(), spread.tolist(), strict=True)
        return {
            recipe.name: LossImpact(kl=kl, first_order=mean, spread=deviation)
            for recipe, kl, mean, deviation in columns
        }


def block_of(rows: int, items: int) -> int:
    """Return how many rows of a product belong to one item of the loss; 1 where that does not come out even."""
    block, rest = divmod(rows, items) if items else (1, 0)
    return block if rest == 0 and 1 <= block <= MOST_BLOCK else 1
