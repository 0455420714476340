"""One sampled step: sightings come in while it runs, one `StepRecord` comes out when it is over."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from loka.formats import Pass, Recipe
from loka.probes.budget import Budget
from loka.probes.capture import Capture, Sighting
from loka.probes.measure import Measurement, measure
from loka.probes.records import ProductRecord, StepRecord
from loka.probes.sites import SiteKey, SiteMap

log: Final = logging.getLogger("loka.probe")

JobKey = tuple[SiteKey, Pass]


@dataclass(slots=True)
class _Seen:
    """What a step has shown of one (site, pass) so far; no tensors, they belong to the model."""

    op: str
    parameter: str
    unmeasured: str
    dtype: str
    shape: tuple[int, int, int]  # batch, n, k of the first call
    rows: int = 0  # m of all calls
    calls: int = 0
    measurement: Measurement | None = None


@dataclass(slots=True)
class Sampler:
    """Receives the sightings of one step (`capture.Observer`), measures those that the budget allows."""

    sites: SiteMap
    budget: Budget
    recipes: Sequence[Recipe]
    step: int
    calls_before: dict[JobKey, int]  # calls per step, as the last sampled step showed them
    lost_products: int = 0
    failure: str = ""  # what went wrong first, in words: an exception would keep the step's tensors alive
    hidden_products: dict[str, str] = field(default_factory=dict)  # site -> operator
    capture: Capture = field(init=False)
    _seen: dict[JobKey, _Seen] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.capture = Capture(self.sites, self)

    def saw(self, sighting: Sighting) -> None:
        """Count one product; measure it when it is its turn. Of several calls, each sample takes another."""
        if self.failure:
            return
        key = (sighting.key, sighting.product)
        gemm = sighting.gemm
        seen = self._seen.get(key)
        if seen is None:
            dtype = str(gemm.a.dtype).removeprefix("torch.")
            shape = (gemm.batch, gemm.n, gemm.k)
            seen = self._seen[key] = _Seen(gemm.op, sighting.parameter, gemm.unmeasured, dtype, shape)
        turn = self.budget.samples_of(key) % max(self.calls_before.get(key, 1), 1)
        if seen.measurement is None and seen.calls >= turn and self.budget.allows(key, self.capture.own_s):
            self._wait_for(gemm.a)
            started = time.perf_counter()
            seed = hash((self.step, key[0].ordinal, gemm.m, gemm.n, gemm.k)) % 2**31
            generator = torch.Generator().manual_seed(seed)
            seen.measurement = measure(gemm, sighting.product, self.recipes, generator)
            self.budget.measured(key, time.perf_counter() - started)
        seen.calls += 1
        seen.rows += gemm.m

    def _wait_for(self, tensor: Tensor) -> None:
        """Let the device finish the model's own work, so that it is not charged to the probe."""
        if tensor.is_cuda:
            started = time.perf_counter()
            torch.cuda.current_stream(tensor.device).synchronize()
            self.capture.probe_s -= time.perf_counter() - started

    def lost(self) -> None:
        """Count a backward product whose forward was not sampled."""
        self.lost_products += 1

    def hidden(self, site: str, op: str) -> None:
        """Remember an operator whose products cannot be seen."""
        self.hidden_products.setdefault(site, op)

    def failed(self, error: Exception) -> None:
        """Keep the first failure; the probe ends with this step."""
        log.debug("looking into step %d failed", self.step, exc_info=error)
        self.failure = self.failure or f"{type(error).__name__}: {error}"

    def finish(self) -> StepRecord:
        """Return the step's record; names are settled here, when all of a module's products are known."""
        seen = self._seen
        self.budget.known(seen)
        names = self.sites.finish_names(key for key, _ in seen)
        self.calls_before.update({key: entry.calls for key, entry in seen.items()})
        return StepRecord(
            step=self.step, products=tuple(_record(names[key[0]], key[1], entry) for key, entry in seen.items())
        )

    def let_go(self) -> None:
        """Undo the cycle with the capture, so that the model can be freed without the garbage collector."""
        del self.capture


def _record(site: str, product: Pass, seen: _Seen) -> ProductRecord:
    batch, n, k = seen.shape
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
        unmeasured=seen.unmeasured,
    )
