"""What the rules of the advice may look at: one run, the bound, what a plan would do, and what was learned of it.

Distributions are read where a rule asks for them, site by site: a model has thousands, and few are in need of advice.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sqlalchemy import Engine

from loka.bounds import Bound
from loka.dispatch.deciding.decide import Decision
from loka.dispatch.deciding.requests import request_of
from loka.dispatch.measuring.profile import TimeTable
from loka.errors import ArgumentError
from loka.formats import ROLES, Pass
from loka.kernel_registry.ceilings import precision_of
from loka.kernel_registry.registry import Registry
from loka.kernel_registry.spec import GemmRequest
from loka.mods.smooth import UNFED
from loka.probes.capturing.layer_facts import LINEAR, LayerFacts
from loka.probes.capturing.sources import Source
from loka.probes.judging.evidence import ProductEvidence, RecipeEvidence, RunEvidence
from loka.probes.judging.series import OPERAND_VALUES, RunSeries, load_series
from loka.probes.judging.trajectories import Trajectory
from loka.probes.sampling.learning import LAYER, SOURCE, restore
from loka.probes.storing.database import find_run, learned_kinds, read_learned, transaction
from loka.reports.advise.advice import SiteState, Status
from loka.reports.advise.on_model import OnModel
from loka.roofline import Ceilings

logger = logging.getLogger("loka.reports")

_RANK: dict[Status, int] = {"unsafe": 0, "undecided": 1, "slow": 2, "safe": 3}
# Two operands are the same tensor where their amax and rms agree to this, step by step.
_SAME = 1e-6
# (step, rank) -> amax and rms of an input.
Inputs = dict[tuple[int, int], tuple[float, float]]


@dataclass(slots=True)
class Case:
    """The evidence of one run as rules ask for it."""

    engine: Engine
    evidence: RunEvidence
    bound: Bound
    decisions: Mapping[tuple[str, str], Decision]
    trajectories: tuple[Trajectory, ...]
    times: TimeTable
    registry: Registry
    ceilings: Ceilings | None
    series: RunSeries | None = None  # the samples of the run, where they have been read already
    on: OnModel | None = None  # the model, where it is at hand
    scratch: dict[str, Any] = field(default_factory=dict)  # what predictors keep between rules
    _learned: dict[tuple[str, str], Any] = field(default_factory=dict)
    _products: dict[tuple[str, Pass], ProductEvidence] = field(default_factory=dict)
    _by_site: defaultdict[str, list[ProductEvidence]] = field(default_factory=lambda: defaultdict(list))
    _states: dict[str, SiteState] = field(default_factory=dict)
    _read: dict[str, Inputs] | None = None
    _kinds: frozenset[tuple[str, str]] | None = None  # (site, kind) of what there is
    _heads: tuple[str, ...] | None = None
    _sources: dict[str, Source] | None = None
    _over: dict[tuple[str, Pass], tuple[RecipeEvidence, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for each in self.evidence.products:
            self._products[each.site, each.product] = each
            self._by_site[each.site].append(each)

    def product(self, site: str, which: Pass = "fprop") -> ProductEvidence | None:
        """Return what is known of one pass of a site."""
        return self._products.get((site, which))

    def forward(self) -> Iterable[ProductEvidence]:
        """Yield the forward products of linear layers, in the order in which the model runs them."""
        for product in self.evidence.products:
            if product.product == "fprop" and product.batch == 1 and self.request(product).op == "linear":
                yield product

    def request(self, product: ProductEvidence) -> GemmRequest:
        """Return what a product asks of the registry."""
        return request_of(product, self.evidence.info.fingerprint)

    def layer(self, site: str) -> LayerFacts:
        """Return what the run has told of the layer of a site: nothing special of most."""
        found = self.learned(site, LAYER)
        return found if isinstance(found, LayerFacts) else LayerFacts()

    def heads(self) -> tuple[str, ...]:
        """Return the sites whose output was seen to reach the output of the model without another product, sorted."""
        if self._heads is None:
            told = sorted(site for site, kind in self._known() if kind == LAYER)
            self._heads = tuple(site for site in told if self.layer(site).head)
        return self._heads

    def unfit(self, product: ProductEvidence) -> str:
        """Say why no mod that rewrites a linear takes the layer of a product; empty where one can."""
        layer = self.layer(product.site)
        if product.parameter != f"{product.site}.weight":
            return "its weight belongs to no linear layer"
        if layer.runs != LINEAR:
            return f"it is a {layer.runs}, and mods rewrite nn.Linear"
        if layer.outside:
            return f"{layer.outside} multiplies with its weight, and never calls it"
        return f"its weight is that of {layer.also} as well" if layer.also else ""

    def has_bias(self, site: str) -> bool:
        """Whether the module of a site has a bias."""
        return f"{site}.bias" in self.evidence.info.fingerprint

    # --- how a site stands ---

    def state(self, site: str) -> SiteState:
        """Say how a site stands under the bound: unsafe or undecided in some pass, else slow in fprop, else safe."""
        if site not in self._states:
            self._states[site] = self._judged(site)
        return self._states[site]

    def _judged(self, site: str) -> SiteState:
        products = self._by_site[site]
        status: Status = "slow" if self.is_slow(site) else "safe"
        for product in products:
            limit = self.bound.limit(product.product, site)
            verdicts = {recipe.judge(limit) for recipe in product.recipes}
            found: Status = "safe" if "safe" in verdicts else "unsafe" if verdicts == {"unsafe"} else "undecided"
            status = min(status, found, key=_RANK.__getitem__)
        return SiteState(site=site, status=status, flop_share=math.fsum(each.flop_share for each in products))

    def is_slow(self, site: str) -> bool:
        """Whether the forward product of a site stays in high precision, for whatever reason."""
        decision = self.decisions.get((site, "fprop"))
        return decision is None or decision.recipe is None

    def over_bound(self, product: ProductEvidence) -> tuple[RecipeEvidence, ...]:
        """Return the recipes that the bound keeps a product from: unsafe, or with a mean error above it."""
        key = (product.site, product.product)
        if key not in self._over:
            limit = self.bound.limit(product.product, product.site)
            self._over[key] = tuple(
                recipe
                for recipe in product.recipes
                if (verdict := recipe.judge(limit)) == "unsafe"
                or (verdict == "undecided" and limit.metric != "loss" and recipe.gated(limit).error.mean > limit.most)
            )
        return self._over[key]

    # --- what was learned ---

    def learned(self, site: str, kind: str) -> Any:
        """Return what was learned of the forward product of a site; None where nothing readable is there."""
        key = (site, kind)
        if key not in self._learned:
            self._learned[key] = None
            if key not in self._known():
                return None
            for record in read_learned(self.engine, self.evidence.info.id, kind=kind, site=site):
                if record.product == "fprop":
                    try:
                        self._learned[key] = restore(record)
                    except ArgumentError as error:
                        logger.warning("no advice from %s of %s: %s", kind, site, error)
        return self._learned[key]

    def to_read(self) -> int:
        """Return how many linears are over the bound with an input that can be looked at: each has to be read."""
        return sum((each.site, "input") in self._known() for each in self.forward() if self.over_bound(each))

    def _known(self) -> frozenset[tuple[str, str]]:
        """Return the (site, kind) of everything that was learned of forward products."""
        if self._kinds is None:
            self._kinds = learned_kinds(self.engine, self.evidence.info.id, "fprop")
        return self._kinds

    def tells_sources(self) -> bool:
        """Whether the run has seen what writes the input of any linear layer; reads none of it."""
        return any(kind == SOURCE for _, kind in self._known())

    def source(self, site: str) -> Source | None:
        """Return what the run has seen to write the input of a linear layer; None where it does not tell."""
        return self.sources().get(site)

    def sources(self) -> Mapping[str, Source]:
        """Return what the run has seen to write the inputs of linear layers, by site."""
        if self._sources is None:
            self._sources = {}
            for record in read_learned(self.engine, self.evidence.info.id, kind=SOURCE):
                try:
                    self._sources[record.site] = restore(record)
                except ArgumentError as error:
                    logger.warning("what writes the input of %s is not known: %s", record.site, error)
        return self._sources

    def writer(self, site: str) -> str:
        """Return the norm with a scale, or the linear, that writes what a site reads; empty where none is known."""
        source, norm = self.source(site), self.norm_before(site)
        return source.writer if source is not None else norm.name if norm is not None else ""

    def together(self, site: str) -> tuple[str, ...]:
        """Return the sites that read what one module writes, this one among them: a scale leaves it for all of them."""
        source = self.source(site)
        if source is None or not source.writer:
            return (site,)
        return tuple(other for other, each in self.sources().items() if each.writer == source.writer)

    def fixed_input(self, site: str, *, exact: bool = False) -> str:
        """Say why no scale can leave the input of a site; empty where one can, or the run does not tell.

        `exact`: the site has to read the very output, and not a product with it.
        """
        source = self.source(site)
        if source is None:
            return ""
        if not source.writer:
            return UNFED
        why = source.why or (exact and source.scaled and "its output is multiplied with something else before") or ""
        if why:
            return f"{source.writer} writes its input, and of that {why}"
        together = [
            source.writer,
            *(other for other, each in self.sources().items() if each.writer == source.writer),
        ]
        for other in together:
            product = self.product(other)
            if product is not None and (unfit := self.unfit(product)):
                return f"{source.writer} writes its input, and with it {other} is rewritten: {unfit}"
        return ""

    def norm_before(self, site: str) -> Trajectory | None:
        """Return the norm with a scale of its own whose output a site reads; None where none was seen."""
        norms = (each for each in self.trajectories if each.kind == "norm" and "weight" in each.parameters)
        return next((each for each in norms if site in each.feeds), None)

    def same_input(self, sites: Sequence[str]) -> list[tuple[str, ...]]:
        """Group forward products by the tensor they read: alike in amax and rms on every step that shows both."""
        if self._read is None:
            if self.series is None:
                with transaction(self.engine) as connection:
                    run = find_run(connection, self.evidence.info.id)
                    self.series = load_series(connection, run.number, run.info.recipes)
            self._read = _inputs(self.series)
        seen = {site: self._read.get(site, {}) for site in sites}
        groups: list[list[str]] = []
        for site in sites:
            home = next((group for group in groups if _agree(seen[group[0]], seen[site])), None)
            groups.append([site]) if home is None else home.append(site)
        return [tuple(group) for group in groups]

    # --- times ---

    def time_of(self, request: GemmRequest, recipes: Iterable[str]) -> tuple[float, str] | None:
        """Return the best known time of a product and its kernel: in high precision, or with one of these recipes."""
        allowed = set(recipes)
        specs = [spec for spec in self.registry.candidates(request.op) if spec.recipe in allowed]
        known = [
            (time.median_us, spec.name)
            for spec in (self.registry.baseline(request), *specs)
            if (time := self.times.lookup(spec.name, request)) is not None
        ]
        return min(known, default=None)

    def least_us(self, request: GemmRequest) -> float | None:
        """Return what a product takes at least in high precision, by what the device was measured to reach."""
        if self.ceilings is None:
            return None
        precision = precision_of(self.registry.baseline(request).name, None, request.dtype)
        peak = self.ceilings.flops_per_s.get(precision, 0.0)
        if not peak > 0 or not self.ceilings.bytes_per_s > 0:
            return None
        return 1e6 * max(request.moved_bytes / self.ceilings.bytes_per_s, request.flops / peak)

    def safe_recipes(self, product: ProductEvidence) -> tuple[str, ...]:
        """Return the recipes that are safe for a product."""
        limit = self.bound.limit(product.product, product.site)
        return tuple(recipe.recipe for recipe in product.recipes if recipe.judge(limit) == "safe")


def _inputs(series: RunSeries) -> dict[str, Inputs]:
    """Return by site, and then by (step, rank), amax and rms of the input of its forward product."""
    forward = np.array([product == "fprop" for _, product in series.rows])
    mine = (series.operand_role == ROLES.index("input")) & forward[series.row[series.operand_sample]]
    sample = series.operand_sample[mine]
    row, step, rank = series.row[sample], series.step[sample], series.rank[series.at[sample]]
    amax, rms = OPERAND_VALUES.index("amax"), OPERAND_VALUES.index("rms")
    result: defaultdict[str, Inputs] = defaultdict(dict)
    numbers = series.operand_values[mine][:, (amax, rms)].tolist()
    for at, key, values in zip(row.tolist(), zip(step.tolist(), rank.tolist(), strict=True), numbers, strict=True):
        result[series.rows[at][0]][key] = values[0], values[1]
    return result


def _agree(one: Inputs, other: Inputs) -> bool:
    """Whether two inputs agree on every step that has both, and some step has."""
    shared = one.keys() & other.keys()
    alike = all(
        math.isclose(first, second, rel_tol=_SAME)
        for key in shared
        for first, second in zip(one[key], other[key], strict=True)
    )
    return bool(shared) and alike
