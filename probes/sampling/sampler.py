"""One sampled step: sightings come in while it runs, one `StepRecord` comes out when it is over."""

import logging
import math
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from loka.formats import Pass, Recipe
from loka.last_products import last_products
from loka.probes.capturing.capture import Capture, Sighting
from loka.probes.capturing.flows import Flows
from loka.probes.capturing.layer_facts import LayerNotes
from loka.probes.capturing.products import Draw
from loka.probes.capturing.shared_inputs import Inputs
from loka.probes.capturing.sites import SiteKey, SiteMap
from loka.probes.capturing.sources import watch_for
from loka.probes.experts.slices import Slice
from loka.probes.experts.statistics import ExpertStatistics
from loka.probes.records import DynamicsRecord, LossImpact, ProductRecord, StepRecord
from loka.probes.sampling.budget import Budget
from loka.probes.sampling.dynamics import SHARE, DynamicsMeter, watched_modules
from loka.probes.sampling.impact import ImpactMeter, Turns, block_of
from loka.probes.sampling.learning import LEARN_EVERY, Learner
from loka.probes.sampling.losses import LossHook, apply_hook, items_of, value_of
from loka.probes.sampling.measure import Measurement, is_plain_product, measure, rows_of
from loka.probes.sampling.settled import Settled
from loka.probes.sampling.watch import Watch

log: Final = logging.getLogger("loka.probe")

JobKey = tuple[SiteKey, Pass]
# What a product inside a recurrent layer is called, whichever operator it is: no kernel can be put in its place.
_RECURRENT: Final[str] = "recurrent"


@dataclass(slots=True)
class _Experts:
    """Rows that each expert in `slice` met, and the one that was measured, where each is a product of its own."""

    tokens: list[int]
    slice: Slice | None
    measured: int | None = None


@dataclass(slots=True)
class _Seen:
    """What a step has shown of one (site, pass) so far; no tensors, they belong to the model."""

    op: str
    parameter: str
    unmeasured: str
    dtype: str
    shape: tuple[int, int, int]  # batch, n, k of the first call
    reduced: int = 0  # k of all calls
    rows: int = 0  # m of all calls
    calls: int = 0
    by_rows: Counter[int] = field(default_factory=Counter)  # calls by m, of wgrad by k
    measurement: Measurement | None = None
    experts: _Experts | None = None
    outside: str = ""  # module that multiplies with a weight that is not its own

    def count(self, sighting: Sighting) -> None:
        """Count a call, by its rows and its expert."""
        gemm = sighting.gemm
        rows = gemm.k if sighting.product == "wgrad" else gemm.m
        self.calls += 1
        self.rows += gemm.m
        self.reduced += gemm.k
        self.by_rows[rows] += 1
        if self.experts is not None and sighting.expert is not None:
            self.experts.tokens[sighting.expert] += rows


@dataclass(slots=True)
class Memory:
    """What one sampled step leaves for the next."""

    calls: dict[JobKey, int] = field(default_factory=dict)  # per step
    items: int = 0  # of the loss in a batch; 0: not known
    settled: Settled = field(default_factory=Settled)
    turns: Turns = field(default_factory=Turns)
    learner: Learner = field(default_factory=lambda: Learner.within(0))
    names: dict[SiteKey, str] = field(default_factory=dict)
    dynamics_s: float = 0.0  # spent on dynamics so far
    reads_biases: bool = True
    layers: LayerNotes = field(default_factory=LayerNotes)
    source_steps: int = 0  # steps that have shown what writes the inputs of layers
    communicates: bool = False  # whether a backward pass of the model has talked to other ranks


@dataclass(slots=True)
class Sampler:
    """Receives the sightings of one step (`capture.Observer`), measures those that the budget allows."""

    sites: SiteMap
    budget: Budget
    recipes: Sequence[Recipe]
    step: int
    memory: "Memory"
    watch: Watch | None = None
    lost_products: int = 0
    failure: str = ""  # what went wrong first, in words: an exception would keep the step's tensors alive
    hidden_products: dict[str, str] = field(default_factory=dict)  # site -> operator
    capture: Capture = field(init=False)
    meter: ImpactMeter = field(init=False)
    takes_impact: bool = False  # whether this step weighs its errors by what the loss feels
    _seen: dict[JobKey, _Seen] = field(default_factory=dict)
    _inputs: Inputs = field(default_factory=Inputs)
    _heads: set[str] = field(default_factory=set)  # parameters of the last products
    _again: bool = False  # whether the backward pass that runs builds a graph, to be differentiated again
    _twice: set[SiteKey] = field(default_factory=set)  # layers whose gradients are to be differentiated again

    def __post_init__(self) -> None:
        self.capture = Capture(self.sites, self)
        self.meter = ImpactMeter(self.recipes, self.memory.turns)
        if self.watch is None and self.memory.dynamics_s <= SHARE * self.budget.spent_s:
            self.capture.dynamics = DynamicsMeter(watched_modules(self.sites.model), self.memory.reads_biases)
        if self.watch is None and self.sites.fused:
            self.capture.flows = Flows()
        if self.watch is None:
            self.capture.sources = watch_for(self.sites.model, self.memory.source_steps)

    def saw(self, sighting: Sighting) -> None:
        """Count one product; measure it when it is its turn. Of several calls, each sample takes another."""
        if self.failure:
            return
        if sighting.product != "fprop":
            self.meter.saw_gradient(sighting)
            if self.meter.labelled:
                return
            if self._again:
                self._twice.add(sighting.key)
        key = (sighting.key, sighting.product)
        gemm = sighting.gemm
        if self.capture.dynamics is not None and sighting.product == "fprop":
            self.capture.dynamics.consumed(sighting.key, gemm.a)
        recipes = self.recipes if self.watch is None else self.watch.recipes(sighting.key.owner, sighting.product)
        if not recipes:
            return
        seen = self._seen.get(key)
        if seen is None:
            seen = self._seen[key] = self._first_seen(sighting)
        turn = _turn(self.budget.samples_of(key), self.memory.calls.get(key, 1))
        if seen.measurement is None and seen.calls >= turn and self.budget.allows(key, self.capture.own_s):
            self._wait_for(gemm.a)
            started = time.perf_counter()
            seen.measurement = self._measure(sighting, recipes)
            if sighting.expert is None:
                tokens = gemm.tokens()
                seen.experts = _Experts(tokens, sighting.slice) if tokens else None
            elif seen.experts is not None:
                seen.experts.measured = sighting.expert
            self.budget.measured(key, time.perf_counter() - started)
        seen.count(sighting)

    def _first_seen(self, sighting: Sighting) -> _Seen:
        """Take note of what the first call of a product in this step tells of it."""
        gemm = sighting.gemm
        dtype = str(gemm.a.dtype).removeprefix("torch.")
        op = _RECURRENT if sighting.key.owner in self.sites.recurrent else gemm.op
        seen = _Seen(op, sighting.parameter, gemm.unmeasured, dtype, (gemm.batch, gemm.n, gemm.k))
        if sighting.expert is not None and sighting.slice is not None:
            seen.experts = _Experts([0] * sighting.slice.experts, sighting.slice)
        if sighting.product != "fprop" or self.watch is not None:
            return seen
        self._note_input(sighting)
        if sighting.parameter:
            seen.outside = self.sites.stranger(sighting.parameter)
        return seen

    def _note_input(self, sighting: Sighting) -> None:
        """Take note of a layer that reads what another one has read before it in this step."""
        if sighting.reads is None or not sighting.parameter or self.watch is not None:
            return
        first = self._inputs.read(sighting.key.owner, sighting.reads)
        if first is not None:
            self.memory.learner.learn_shared(sighting.key, first, self.step)

    def _measure(self, sighting: Sighting, recipes: Sequence[Recipe]) -> Measurement:
        gemm = sighting.gemm
        seed = hash((self.step, sighting.key.ordinal, gemm.m, gemm.n, gemm.k)) % 2**31
        draw = Draw(rows_of(gemm), torch.Generator().manual_seed(seed))
        if self.watch is not None:
            found = measure(gemm, sighting.product, recipes, draw)
            self.watch.look(sighting.key.owner, sighting.product, gemm)
            return found
        meets_gradient = (
            self.takes_impact and sighting.product == "fprop" and self.capture.builds_graph and is_plain_product(gemm)
        )
        if meets_gradient:
            block = block_of(gemm.m, self.memory.items)
            rows = self.meter.rows(sighting.key, gemm, block)
            meets_gradient = rows > 0
            draw = replace(draw, rows=rows, block=block) if rows else draw
        # The third sample, then every fourth: not with the impact on the loss, which takes memory of its own.
        learns = self.budget.samples_of((sighting.key, sighting.product)) % LEARN_EVERY == 2
        found = measure(gemm, sighting.product, recipes, draw, keep_deviations=meets_gradient, keep_sampled=learns)
        if found.sampled is not None:
            self.memory.learner.learn(sighting.key, sighting.product, found.sampled, self.step)
            if sighting.product == "fprop":
                self.memory.learner.learn_extremes(sighting.key, gemm.a[0], gemm.b[0], self.step)
        if found.deviations is not None:
            self.meter.keep(sighting, found.deviations)
        return found.without_tensors()

    def returned(self, output: Any, hook: str | LossHook | None) -> str:
        """Look at what the root returned; take the curvature where it is due. Returns why that failed, in words."""
        if self.failure or not torch.is_grad_enabled():
            return ""
        capture = self.capture
        started, probe_s, own_s = time.perf_counter(), capture.probe_s, capture.own_s
        try:
            self._note_heads(output)
            if hook is None:
                self.memory.items = items_of(output)
                return ""
            return self._draw_labels(output, hook)
        except Exception as error:  # noqa: BLE001 - a hook must not stop the training; the run goes on without it
            return f"{type(error).__name__}: {error}"
        finally:
            self.meter.labelled = False
            capture.forget_gradients()
            capture.own_s = own_s
            capture.probe_s = probe_s + time.perf_counter() - started

    def _note_heads(self, output: Any) -> None:
        """Take note of the layers whose output reaches that of the model without another product."""
        if self.watch is None:
            owners = map(self.sites.find, last_products(output).parameters)
            self._heads.update(owner.parameter for owner in owners if owner is not None)

    def _draw_labels(self, output: Any, hook: str | LossHook) -> str:
        with _disable_current_modes(), torch._C._DisableAutocast():
            drawn = apply_hook(hook, output, torch.Generator().manual_seed(self.step))
        self.meter.loss = drawn.facts
        self.memory.items = drawn.facts.items
        weights = self.sites.parameters(self.meter.parameters)
        if not (self.takes_impact and drawn.root.requires_grad and weights):
            return ""
        if not all(type(weight) in (Tensor, nn.Parameter) for weight in weights):
            return "the parameters are sharded, and a second backward would gather them again"
        if self.memory.communicates:
            return "the model's backward pass talks to other ranks, and they may not sample this step"
        self.meter.labelled = True
        # Modes of the user's own are not shown a backward that is none of theirs.
        with _disable_current_modes(), self.capture, torch._C._DisableAutocast():
            torch.autograd.grad(drawn.root, weights, drawn.gradient, retain_graph=True, allow_unused=True)
        return ""

    def went_backward(self, roots: Sequence[Any], *, create_graph: bool) -> None:
        """Take note of the loss that the loop's own backward begins at; two different ones are none."""
        # Those of torch.func always build a graph, and planned layers run in high precision there.
        self._again = create_graph and not torch._C._are_functorch_transforms_active()
        if self.meter.labelled:
            return
        try:
            with _disable_current_modes():
                value = value_of(roots[0]) if len(roots) == 1 else math.nan
        except Exception as error:  # noqa: BLE001 - a probe must never stop the training it watches; it is told and ends
            self.failed(error)
            return
        self.meter.root_value = value if self.meter.root_value is None else math.nan

    def _wait_for(self, tensor: Tensor) -> None:
        """Let the device finish the model's own work, so that it is not charged to the probe."""
        if tensor.is_cuda:
            started = time.perf_counter()
            torch.cuda.current_stream(tensor.device).synchronize()
            self.capture.probe_s -= time.perf_counter() - started

    def lost(self) -> None:
        """Count a backward product whose forward was not sampled."""
        self.lost_products += not self.meter.labelled

    def hidden(self, site: str, op: str) -> None:
        """Remember an operator whose products cannot be seen."""
        self.hidden_products.setdefault(site, op)

    def failed(self, error: Exception) -> None:
        """Keep the first failure; the probe ends with this step."""
        log.debug("looking into step %d failed", self.step, exc_info=error)
        self.failure = self.failure or f"{type(error).__name__}: {error}"

    def finish(self) -> StepRecord:
        """Return the step's record; names are settled here, when all of a module's products are known."""
        seen = {key: entry for key, entry in self._seen.items() if entry.calls}  # none where looking failed
        self.memory.communicates |= self.capture.communicates
        self.budget.known(seen)
        sources = {} if self.capture.sources is None else self.capture.sources.sources()
        self.memory.source_steps += bool(sources)
        for key, entry in seen.items():
            if entry.measurement is not None and entry.measurement.errors and self.watch is None:
                far = self.memory.settled.saw(key, entry.measurement.errors, entry.shape[1])
                self.budget.settle(key, settled=far)
            if self.watch is None:
                self.memory.learner.count(*key, entry.by_rows, self.step)
            self._learn_experts(key, entry)
            self._learn_layer(key, entry)
            if key[1] == "fprop" and (source := sources.get(entry.parameter)) is not None:
                self.memory.learner.learn_source(key[0], source, self.step)
            if key[1] == "fprop" and self.capture.flows is not None and key[0].owner in self.sites.fused:
                self.memory.learner.learn_epilogue(key[0], self.step, self.capture.flows.reader(key[0].owner))
        names = self.sites.finish_names(key for key, _ in seen)
        self.memory.names.update(names)
        self.memory.calls.update({key: entry.calls for key, entry in seen.items()})
        with _disable_current_modes():  # the next step may have begun under a mode of the user's
            impacts = self.meter.finish()
            dynamics = self._dynamics(names)
        of = {(site, "fprop"): found for site, found in impacts.items()}
        return StepRecord(
            step=self.step,
            products=tuple(_record(names[key[0]], key[1], entry, of.get(key, {})) for key, entry in seen.items()),
            loss=self.meter.mean_loss,
            labels=self.meter.labels if impacts else "",
            dynamics=dynamics,
        )

    def _dynamics(self, names: Mapping[SiteKey, str]) -> tuple[DynamicsRecord, ...]:
        """Return what the step has shown of modules; the biases are those after the step."""
        meter = self.capture.dynamics
        if meter is None:
            return ()
        started = time.perf_counter()
        with torch.no_grad():
            found = meter.finish(self.sites.model, names)
        self.memory.dynamics_s += meter.spent_s + time.perf_counter() - started
        return found

    def _learn_experts(self, key: JobKey, seen: _Seen) -> None:
        """Keep what the step has shown of a layer's experts, once it has shown all of them."""
        found, experts = seen.measurement, seen.experts
        if experts is None and key[1] == "dgrad" and (forward := self._seen.get((key[0], "fprop"))) is not None:
            experts = forward.experts  # of a batch of products: which tokens are whose only the input tells
        if found is None or experts is None or self.watch is not None or not found.errors:
            return
        errors = found.by_expert
        if experts.measured is not None:
            errors = {experts.measured: list(found.errors.values())}
        statistics = ExpertStatistics.of(experts.tokens, errors, tuple(found.errors), experts.slice)
        self.memory.learner.learn_experts(*key, statistics, self.step)

    def _learn_layer(self, key: JobKey, seen: _Seen) -> None:
        """Keep what is special about the layer of a forward product, once."""
        if key[1] != "fprop" or not seen.parameter or self.watch is not None:
            return
        layers, head = self.memory.layers, seen.parameter in self._heads
        twice = key[0] in self._twice
        facts = layers.news(self.sites.model, seen.parameter, head=head, outside=seen.outside, twice=twice)
        if facts is not None:
            self.memory.learner.learn_layer(key[0], facts, self.step)

    def let_go(self) -> None:
        """Undo the cycle with the capture, so that the model can be freed without the garbage collector."""
        del self.capture


def _record(site: str, product: Pass, seen: _Seen, impacts: Mapping[str, LossImpact]) -> ProductRecord:
    batch, n, k = seen.shape
    if product == "wgrad":  # sums over the rows of the calls, which may differ as m does of the other passes
        k = round(seen.reduced / seen.calls)
    measurement = seen.measurement
    return ProductRecord(
        site=site,
        product=product,
        op=seen.op,
        batch=batch,
        m=round(seen.rows / seen.calls),
        n=n,
        k=k,
        calls=seen.calls,
        dtype=seen.dtype,
        parameter=seen.parameter,
        operands=measurement.operands if measurement else (),
        errors=measurement.errors if measurement else {},
        alignment=measurement.alignment if measurement else math.nan,
        impacts=impacts,
        unmeasured=seen.unmeasured,
    )


def _turn(samples: int, calls: int) -> int:
    """Return which call of a product is measured next: each once in a round, in an order that chance makes anew.

    Taken in order, a product with four calls would show the impact on the loss, of every fourth sample, of one call.
    """
    if calls < 2:
        return 0
    round_, place = divmod(samples, calls)
    return random.Random(round_).sample(range(calls), calls)[place]
