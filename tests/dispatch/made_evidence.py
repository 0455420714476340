"""Evidence, times and plans made by hand, for tests that decide."""

import math

from loka.bounds import Bound
from loka.dispatch.deciding.decide import decide
from loka.dispatch.deciding.plan import Plan
from loka.dispatch.deciding.requests import request_of
from loka.dispatch.measuring.profile import TimeTable
from loka.hardware import DeviceInfo
from loka.kernel_registry.builtin import KERNELS
from loka.kernel_registry.registry import Registry
from loka.probes.judging.evidence import ErrorInterval, ProductEvidence, RecipeEvidence, RunEvidence
from loka.probes.records import Environment, RunInfo, RunProgress, Timing

CPU = DeviceInfo(type="cpu", name="test")
HOPPER = DeviceInfo(type="cuda", name="NVIDIA H200", capability=(9, 0))
AMPERE = DeviceInfo(type="cuda", name="NVIDIA A100", capability=(8, 0))
BOUND = Bound(row_error=0.05)


def built_in(specs=KERNELS):
    registry = Registry()
    for spec in specs:
        registry.add(spec, owner="loka")
    return registry


def recipe(name, upper, *, mean=None, low=None, samples=12, horizon=None, gate="row_error", note=""):
    mean = 0.9 * upper if mean is None else mean
    return RecipeEvidence(
        recipe=name,
        format="e4m3",
        samples=samples,
        gate=gate,
        error=ErrorInterval(
            mean=mean, low=0.95 * mean if low is None else low, high=1.05 * mean, p99=mean, upper_tolerance=upper
        ),
        relative_error=mean,
        sqnr_db=30.0,
        mere=mean,
        horizon=horizon,
        note=note,
    )


def unknown(name, samples=3):
    return recipe(name, math.nan, samples=samples, note="3 of 8 samples")


SAFE = (recipe("rowwise", 0.03), recipe("tensorwise", 0.04))


def product(site="up", **changes):
    fields = {
        "site": site,
        "product": "fprop",
        "op": "addmm",
        "batch": 1,
        "m": 2048,
        "m_min": 2048,
        "m_max": 2048,
        "n": 768,
        "k": 256,
        "calls": 1.0,
        "dtype": "bfloat16",
        "parameter": f"{site}.weight",
        "flops": 1e9,
        "flop_share": 0.1,
        "operands": {},
        "recipes": SAFE,
    }
    return ProductEvidence(**{**fields, **changes})


def run(*products, fingerprint=None, status="complete"):
    info = RunInfo(
        id="run-1",
        created="2026-01-01T00:00:00+00:00",
        environment=Environment(device=str(CPU), torch="2.13", python="3.11", loka="0.1"),
        model="Wukong",
        fingerprint={} if fingerprint is None else fingerprint,
        every=100,
        overhead_budget=0.01,
        recipes=("tensorwise", "rowwise"),
    )
    progress = RunProgress(
        steps=1000,
        sampled_steps=10,
        skipped_samples=0,
        wall_s=10.0,
        probe_s=0.05,
        unattributed=0,
        weights_changed=False,
        status=status,
    )
    return RunEvidence(
        info=info, progress=progress, events=(), confidence=0.95, family=len(products), products=tuple(products)
    )


def timing(kernel, median_us, spread_us=0.1, *, of=None, device=CPU, created="2026-01-01", **changes):
    request = request_of(product() if of is None else of)
    fields = {
        "kernel": kernel,
        "product": request.product,
        "batch": request.batch,
        "m": request.m,
        "n": request.n,
        "k": request.k,
        "dtype": request.dtype,
        "device": str(device),
        "median_us": median_us,
        "spread_us": spread_us,
        "repetitions": 9,
        "values": "normal",
        "created": created,
    }
    return Timing(**{**fields, **changes})


def timings(times, **changes):
    return [
        timing(kernel, *(value if isinstance(value, tuple) else (value,)), **changes) for kernel, value in times.items()
    ]


def decided(times=None, *, evidence=None, bound=BOUND, registry=None, device=HOPPER, assume=None, left_out=None):
    evidence = product() if evidence is None else evidence
    table = TimeTable(timings(times or {}, of=evidence), assume_speedup=assume)
    return decide(request_of(evidence), evidence, bound, registry or built_in(), table, device, left_out=left_out)


def made_plan(*decisions, **changes):
    fields = {
        "created": "2026-01-01T00:00:00+00:00",
        "model": "Wukong",
        "fingerprint": {"up.weight": (768, 256)},
        "environment": {"device": str(HOPPER), "torch": "2.13", "loka": "0.1", "time_source": "measured"},
        "bound": BOUND,
        "decisions": decisions,
        "notes": ("a note",),
    }
    return Plan(**{**fields, **changes})
