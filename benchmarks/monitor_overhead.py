"""What the monitor costs: a training that runs a plan, with and without it.

A short probe, a plan with assumed times, a converted model; then blocks of steps with and without the monitor run in
turns, one thread, process CPU time: the ratio holds on a busy machine. A block attaches and detaches the monitor, which
a real training does once. Kernels are emulated here; what the monitor adds is measured in steps of the model's own
precision, so the share of a training on real FP8 kernels is larger by what those save.
"""

import argparse
import tempfile
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from time import process_time
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

import loka
from benchmarks.probe_overhead import Loss, transformer, wukong
from benchmarks.record import write_record
from loka.dispatch.convert import planned_sites
from loka.dispatch.monitor import Monitor
from loka.timing import interleaved_ratio


def study(make: tuple[nn.Module, Loss], *, compiled: bool, steps: int, rounds: int, folder: Path) -> dict[str, Any]:
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
    plan = loka.plan(folder / "run.db", loka.Bound(row_error=0.1), assume_speedup=1.3)
    if compiled:
        called = torch.compile(model, backend="loka", options={"plan": plan})
    else:
        loka.convert(model, plan)
    recorded: list[float] = []
    alarms: list[str] = []
    names = (folder / f"{number}.db" for number in count())

    def block(length: int, *, monitored: bool) -> None:
        scope = loka.monitor(called, plan, next(names)) if monitored else nullcontext()
        with scope:
            for _ in range(length):
                step()
        if isinstance(scope, Monitor):
            recorded.append(scope.progress.overhead_fraction)
            alarms.extend(event.kind for event in scope.events if event.kind == "demoted")

    block(20, monitored=False)
    before = int(counters["stats"]["unique_graphs"])
    ratio = interleaved_ratio(
        lambda: block(steps, monitored=True),
        lambda: block(steps, monitored=False),
        rounds=rounds,
        warmup=0,
        clock=process_time,
    )
    return {
        "products in FP8": sum(decision.recipe is not None for decision in plan.decisions),
        "converted sites": len(planned_sites(model)),
        "with / without, every=100": ratio,
        "overhead recorded by the monitor, median": sorted(recorded)[len(recorded) // 2],
        "demotions": len(alarms),
        "graphs compiled because of the monitor": int(counters["stats"]["unique_graphs"]) - before,
    }


def main() -> None:
    """Run the study on every workload."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run, without meaning")
    parser.add_argument("--only", help="the one workload to measure, by its name or the beginning of it")
    arguments = parser.parse_args()
    quick, only = arguments.quick, arguments.only or ""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    settings = {"steps_per_block": 200 if quick else 500, "rounds": 1 if quick else 3}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, make, compiled in (
            ("wukong, batch 512, eager", lambda: wukong(512), False),
            ("transformer, 8 x 128, eager", transformer, False),
            ("wukong, batch 512, compiled", lambda: wukong(512), True),
        ):
            if not name.startswith(only):
                continue
            place = Path(folder) / name.replace(" ", "-").replace(",", "")
            place.mkdir()
            found = study(
                make(),
                compiled=compiled,
                steps=settings["steps_per_block"],
                rounds=settings["rounds"],
                folder=place,
            )
            results.update({f"{name}: {key}": value for key, value in found.items()})
    write_record("monitor_overhead", settings, results)


if __name__ == "__main__":
    main()
