"""What the monitor adds to a training that runs a plan: steps that it looks into, next to the steps around them.

A short probe, a plan, a converted or compiled model, a monitor attached once, as a training does; then step by step in
process CPU time on one thread. A monitored step and the two behind it, in which its record is finished, are compared
with the median of the steps around them: pairs from one stretch of one run, so the ratio holds on a busy machine. What
they take more, over all steps of that stretch, is what the monitor adds there, a step that it left out included. What
the other steps pay, two hook calls, is measured on a model so small that it can be seen; what they pay for a look at
their gradients, by steps with and without.

Kernels that emulate FP8 would make every step so long that no monitor shows, and a monitored step, which is in high
precision, the shorter one. The planned kernels here take what the model's own products take: on hardware FP8 steps are
shorter by what they save, and the monitor's budget, which is a share of them, with them.
"""

import argparse
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from math import pi, sqrt
from pathlib import Path
from statistics import NormalDist, median, quantiles
from time import process_time
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import loka
from benchmarks.paired import paired
from benchmarks.probe_overhead import Loss, transformer, wukong
from benchmarks.record import write_record
from loka.dispatch.running.convert import planned_sites
from loka.formats import DEFAULT_RECIPES, Pass
from loka.kernel_registry.registry import default_registry
from loka.kernel_registry.spec import KernelSpec
from loka.kernel_registry.torch_mm import matmul
from loka.probes.sampling.rhythm import Rhythm

EVERY: Final[int] = 100
# Steps behind a monitored one that are charged to it: the first finishes its record and changes kernels.
_BEHIND: Final[int] = 2


def as_fast_as_native(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Stand for an FP8 kernel of no advantage: the product itself."""
    return matmul(a, b).to(out_dtype)


def assumed(plan: loka.Plan) -> loka.Plan:
    """Return a plan whose kernels take what those of the model take."""
    registry = default_registry()
    for recipe in DEFAULT_RECIPES:
        name = f"assumed.linear.{recipe}"
        if name not in registry:
            where = "benchmarks.monitor_overhead:as_fast_as_native"
            registry.add(KernelSpec(name=name, op="linear", recipe=recipe, implementation=where), owner="a benchmark")
    made = [
        each if each.recipe is None else replace(each, kernel=f"assumed.linear.{each.recipe}")
        for each in plan.decisions
    ]
    return replace(plan, decisions=tuple(made))


def timed(step: Callable[[], None], steps: int) -> list[float]:
    """Return the CPU seconds of each of so many steps."""
    times = []
    for _ in range(steps):
        start = process_time()
        step()
        times.append(process_time() - start)
    return times


def due(steps: int) -> list[int]:
    """Return which of so many steps of a training are due to be monitored, one in each stretch of EVERY."""
    rhythm, found = Rhythm(every=EVERY), []
    for step in range(steps):
        if rhythm.forward(grad=True):
            found.append(step)
        rhythm.backward()
    return found


def added_percent(times: list[float]) -> list[float]:
    """Return what the monitored step of each stretch of EVERY steps adds to that stretch, in percent."""
    charged = [step + behind for step in due(len(times)) for behind in range(1 + _BEHIND)]
    changes = []
    for start in range(0, len(times), EVERY):
        stretch = range(start, start + EVERY)
        monitored = [times[step] for step in charged if step in stretch]
        plain = median(times[step] for step in stretch if step not in charged)
        changes.append(100 * (sum(monitored) - len(monitored) * plain) / (EVERY * plain))
    return changes


def study(make: tuple[nn.Module, Loss], *, compiled: bool, stretches: int, folder: Path) -> dict[str, Any]:
    """Measure one workload."""
    model, loss_of = make
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    called = model

    def step() -> None:
        loss = loss_of(called)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with loka.probe(model, folder / "run.db", every=2, overhead=100.0):
        for _ in range(24):
            step()
    plan = assumed(loka.plan(folder / "run.db", loka.Bound(row_error=0.1), assume_speedup=1.3))
    if compiled:
        called = torch.compile(model, backend="loka", options={"plan": plan})
    else:
        loka.convert(model, plan)
    timed(step, 10)
    before = int(counters["stats"]["unique_graphs"])
    with loka.monitor(called, plan, folder / "monitored.db", every=EVERY) as monitor:
        times = timed(step, stretches * EVERY)
        progress = monitor.progress
    plain_s = median(times)
    return {
        "products in FP8": sum(decision.recipe is not None for decision in plan.decisions),
        "converted sites": len(planned_sites(model)),
        "a plain step, ms": 1e3 * plain_s,
        "monitored steps": progress.sampled_steps,
        "monitored steps left out": progress.skipped_samples,
        "added by monitored steps, %": paired(added_percent(times)),
        "by stretch, %": [round(change, 3) for change in added_percent(times)],
        "added by hooks, %": 1e-4 * hook_us() / plain_s,
        "added by looking at gradients, %": looks_percent(step, called, plan),
        "recorded by the monitor itself, %": 100 * progress.overhead_fraction,
        "demotions": sum(event.kind == "demoted" for event in monitor.events),
        "graphs compiled because of the monitor": int(counters["stats"]["unique_graphs"]) - before,
    }


def looks_percent(
    step: Callable[[], None], called: nn.Module, plan: loka.Plan, pairs: int = 151
) -> dict[str, float | None]:
    """Return what a step pays for the look at its gradients, in percent, by neighbouring steps with and without.

    The median of the pairs, and its standard error, as of a normal distribution with their middle half.
    """
    changes = []
    with loka.monitor(called, plan, every=10**9) as monitor:
        timed(step, 5)  # the first one is monitored
        for _ in range(pairs):
            (looked,) = timed(step, 1)
            monitor._held.detach()
            (plain,) = timed(step, 1)
            monitor._held.attach()
            changes.append(100 * (looked / plain - 1))
    low, middle, high = quantiles(changes, n=4)
    deviation = (high - low) / (2 * NormalDist().inv_cdf(0.75))
    return {"median": middle, "standard error": sqrt(pi / 2) * deviation / sqrt(pairs)}


def hook_us(rounds: int = 11, steps: int = 300) -> float:
    """Return what an attached monitor adds to a step that it does not look into, in microseconds, the median."""
    model = nn.Linear(16, 16)
    x = torch.randn(16, 16)

    def step() -> None:
        model(x).sum().backward()

    with tempfile.TemporaryDirectory() as folder:
        with loka.probe(model, Path(folder) / "run.db", every=1, overhead=1e9):
            for _ in range(12):
                step()
        plan = loka.plan(Path(folder) / "run.db", loka.Bound(row_error=1.0), assume_speedup=1.3)
    loka.convert(model, assumed(plan))

    def block(scope: Any) -> float:
        with scope:
            timed(step, 10)  # the first one is monitored
            return sum(timed(step, steps))

    found = []
    for _ in range(rounds):
        attached = block(loka.monitor(model, plan, every=10**9))
        found.append((attached - block(nullcontext())) / steps)
    return 1e6 * median(found)


WORKLOADS: Final[dict[str, tuple[Callable[[], tuple[nn.Module, Loss]], bool]]] = {
    "wukong, batch 512, eager": (lambda: wukong(512), False),
    "transformer, 8 x 128, eager": (transformer, False),
    "wukong, batch 512, compiled": (lambda: wukong(512), True),
}


def main() -> None:
    """Run the study on every workload."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run, without meaning")
    parser.add_argument("--only", help="the one workload to measure, by its name or the beginning of it")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    settings = {"every": EVERY, "stretches": 2 if arguments.quick else 10}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (make, compiled) in WORKLOADS.items():
            if not name.startswith(arguments.only or ""):
                continue
            place = Path(folder) / name.replace(" ", "-").replace(",", "")
            place.mkdir()
            found = study(make(), compiled=compiled, stretches=settings["stretches"], folder=place)
            results.update({f"{name}: {key}": value for key, value in found.items()})
    write_record("monitor_overhead", settings, results)


if __name__ == "__main__":
    main()
