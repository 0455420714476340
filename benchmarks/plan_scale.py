"""Time and memory of a plan for a large model: 2,000 sites in three passes, 40 candidates each, under every bound.

Evidence and times are made up; deciding, sharing a budget out and writing the plan are real. Memory is the peak of the
process over what it had before it decided. Each case runs in a process of its own.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Final

import torch

from benchmarks.record import write_record
from loka.bounds import Bound
from loka.dispatch.deciding.planner import PlanOptions, decide_all
from loka.dispatch.deciding.sweep import sweep_evidence
from loka.formats import DEFAULT_RECIPES, PASSES
from loka.hardware import device_info
from loka.kernel_registry.builtin import KERNELS
from loka.kernel_registry.registry import Registry
from loka.kernel_registry.spec import KernelSpec
from loka.probes.judging.evidence import (
    ErrorInterval,
    GatedError,
    LossEvidence,
    ProductEvidence,
    RecipeEvidence,
    RunEvidence,
)
from loka.probes.records import Environment, RunInfo, RunProgress, Timing

CANDIDATES = 40
LIMITS: Final[dict[str, float]] = {"seconds": 5.0, "peak MB": 500.0}
CASES: Final[dict[str, Bound]] = {
    "row_error": Bound(row_error=0.05),
    "sqnr_db": Bound(sqnr_db=28),
    "loss": Bound(loss=2e-4),
    "loss, per site": Bound(loss=2e-4, per_site={"*.7.*": Bound(row_error=0.03), "re:.*head.*": Bound(sqnr_db=30)}),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What one case took; `hash` is that of the plan."""

    seconds: float
    peak_mb: float
    in_fp8: int
    megabytes: float  # of the plan's text
    hash: str


def registry_of(candidates: int) -> Registry:
    """Return the built-in kernels and as many others as make this many candidates for a linear layer."""
    registry = Registry()
    for spec in KERNELS:
        registry.add(spec, owner="loka")
    missing = candidates - len(registry.candidates("linear"))
    for at in range(missing):
        recipe = DEFAULT_RECIPES[at % len(DEFAULT_RECIPES)]
        name = f"shop{at}.linear.{recipe}"
        registry.add(KernelSpec(name=name, op="linear", recipe=recipe, implementation="math:prod"), owner="shop")
    return registry


def evidence_of(sites: int, generator: random.Random) -> RunEvidence:
    """Return a run of a model with this many sites, in three passes each."""
    products = tuple(
        _product(f"layers.{at // 8}.{at % 8}.proj" if at else "head", name, 1.0 / (3 * sites), generator)
        for at in range(sites)
        for name in PASSES
    )
    info = RunInfo(
        **{"id": "scale", "created": "2026-01-01T00:00:00+00:00", "model": "Large", "fingerprint": {}, "every": 100},
        **{"overhead_budget": 0.01, "recipes": DEFAULT_RECIPES},
        environment=Environment(device="cpu", torch=torch.__version__, python="3", loka="0"),
    )
    progress = RunProgress(
        **{"steps": 1000, "sampled_steps": 12, "skipped_samples": 0, "wall_s": 1.0, "probe_s": 0.0, "unattributed": 0},
        **{"weights_changed": False, "status": "complete"},
    )
    return RunEvidence(
        info=info, progress=progress, events=(), confidence=0.95, family=len(products), products=products, mean_loss=1.0
    )


def _product(site: str, product: str, share: float, generator: random.Random) -> ProductEvidence:
    m, n, k = 2048, 256 * generator.randint(1, 8), 256 * generator.randint(1, 8)
    return ProductEvidence(
        **{"site": site, "product": product, "op": "addmm", "batch": 1, "m": m, "m_min": m, "m_max": m, "n": n, "k": k},
        **{"calls": 1.0, "dtype": "bfloat16", "parameter": f"{site}.weight", "flops": 2.0 * m * n * k},
        **{"flop_share": share, "operands": {}},
        recipes=tuple(_recipe(name, generator.uniform(0.01, 0.08), generator) for name in DEFAULT_RECIPES),
    )


def _recipe(name: str, upper: float, generator: random.Random) -> RecipeEvidence:
    error = ErrorInterval(mean=0.9 * upper, low=0.85 * upper, high=0.95 * upper, p99=upper, upper_tolerance=upper)
    kl = generator.lognormvariate(-16, 1.0)
    loss = LossEvidence(
        **{"kl": kl, "kl_low": 0.8 * kl, "kl_high": 1.2 * kl, "first_order": 0.0, "first_order_low": -1e-6},
        **{"spread": 1e-5, "low": -1e-5, "high": 1e-5, "samples": 12, "labels": "closed"},
    )
    return RecipeEvidence(
        **{"recipe": name, "format": "e4m3", "samples": 12, "gate": "row_error", "error": error, "horizon": None},
        **{"relative_error": upper, "sqnr_db": 30.0, "mere": upper, "bias": 1e-4, "loss": loss},
        whole=GatedError(gate="relative_error", error=error),
    )


def times_of(evidence: RunEvidence, registry: Registry, generator: random.Random) -> list[Timing]:
    """Return a time of every candidate on every shape."""
    shapes = {(product.product, product.m, product.n, product.k) for product in evidence.products}
    names = ["torch.mm.bf16", *(spec.name for spec in registry.candidates("linear"))]
    return [
        Timing(
            **{"kernel": name, "product": product, "batch": 1, "m": m, "n": n, "k": k, "dtype": "bfloat16"},
            **{"device": str(device_info("cpu")), "spread_us": 0.2, "repetitions": 9, "values": "learned"},
            **{"median_us": 20.0 if name == "torch.mm.bf16" else generator.uniform(8, 25), "created": "2026-01-01"},
        )
        for product, m, n, k in sorted(shapes)
        for name in names
    ]


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measured(case: str, sites: int) -> Cost:
    """Plan one case in this process."""
    generator = random.Random(0)
    registry, evidence = registry_of(CANDIDATES), evidence_of(sites, generator)
    timings, options = times_of(evidence, registry, generator), PlanOptions(device=torch.device("cpu"), measure=False)
    before, begin = _peak_mb(), time.process_time()
    plan = decide_all(evidence, CASES[case], registry, timings, options)
    text = plan.text()
    seconds = time.process_time() - begin
    return Cost(
        seconds=seconds,
        peak_mb=_peak_mb() - before,
        in_fp8=sum(decision.recipe is not None for decision in plan.decisions),
        megabytes=len(text) / 2**20,
        hash=plan.hash,
    )


def measured_sweep(sites: int) -> dict[str, float]:
    """Return what a sweep of 20 bounds takes in this process."""
    generator = random.Random(0)
    registry, evidence = registry_of(CANDIDATES), evidence_of(sites, generator)
    timings, options = times_of(evidence, registry, generator), PlanOptions(device=torch.device("cpu"), measure=False)
    before, begin = _peak_mb(), time.process_time()
    found = sweep_evidence(evidence, CASES["row_error"], registry, timings, options)
    return {
        "seconds": time.process_time() - begin,
        "peak_mb": _peak_mb() - before,
        "points": len(found.points),
        "largest speed": max(point.speedup for point in found.points),
    }


def main() -> None:
    """Run every case in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=2000)
    parser.add_argument("--case", choices=[*CASES, "sweep"], help="one case, in this process")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    here: dict[str, Callable[[], object]] = {"sweep": lambda: measured_sweep(arguments.sites)}
    if arguments.case is not None:
        run = here.get(arguments.case, lambda: asdict(measured(arguments.case, arguments.sites)))
        print(json.dumps(run()))
        return
    results = {}
    for case in (*CASES, "sweep"):
        command = [sys.executable, "-m", "benchmarks.plan_scale", "--sites", str(arguments.sites), "--case", case]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results[case] = json.loads(done.stdout.splitlines()[-1])
    settings = {"sites": arguments.sites, "passes": 3, "candidates": CANDIDATES, "limits of a plan": LIMITS}
    write_record("plan_scale", settings, results)


if __name__ == "__main__":
    main()
