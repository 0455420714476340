"""What the probe costs: a training loop with and without it, and one sampled step against a plain one.

Blocks of steps with and without the probe run in turns, each model in its own copy, one thread, process CPU time: the
ratio then holds on a busy machine. A block attaches and detaches the probe, which a real training does once.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from pathlib import Path
from time import process_time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import loka
from benchmarks.record import write_record
from loka.naming import unwrap
from loka.probes.capturing.capture import Capture
from loka.probes.capturing.scope import capture_scope
from loka.probes.capturing.sites import SiteMap
from loka.probes.storing.database import open_database, read_run
from loka.timing import interleaved_ratio
from loka.workloads.open_bandit import batches, load_open_bandit
from loka.workloads.transformer import ByteTransformer, ByteTransformerConfig, stdlib_text, text_batches
from loka.workloads.wukong import Wukong, WukongConfig

Loss = Callable[[nn.Module], Tensor]  # of the next batch


class _Nobody:
    """An observer that looks at nothing: what is left is the cost of seeing."""

    def saw(self, sighting: object) -> None:
        """Ignore it."""

    def lost(self) -> None:
        """Ignore it."""

    def hidden(self, site: str, op: str) -> None:
        """Ignore it."""

    def failed(self, error: Exception) -> None:
        """Let the study fail."""
        raise error


def wukong(batch: int) -> tuple[nn.Module, Loss]:
    """The demo's Wukong on its click log."""
    log = load_open_bandit()
    model = Wukong(WukongConfig(cardinalities=log.cardinalities, num_dense=log.dense.shape[1], base_rate=0.005))
    stream = _endless(lambda seed: batches(log, batch, seed=seed))

    def loss(model: nn.Module) -> Tensor:
        categorical, dense, click = next(stream)
        return F.binary_cross_entropy_with_logits(model(categorical, dense), click)

    return model, loss


def transformer() -> tuple[nn.Module, Loss]:
    """A small byte-level language model on source text."""
    model = ByteTransformer(ByteTransformerConfig())
    stream = iter(text_batches(stdlib_text(2_000_000), batch_size=8, length=128, seed=0))

    def loss(model: nn.Module) -> Tensor:
        tokens, targets = next(stream)
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())

    return model, loss


def _endless(epoch: Callable[[int], Iterator[Any]]) -> Iterator[Any]:
    for seed in count():
        yield from epoch(seed)


def study(make: tuple[nn.Module, Loss], *, compiled: bool, steps: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Measure one workload."""
    model, loss_of = make
    called = torch.compile(model) if compiled else model
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    recorded: list[float] = []
    names = (folder / f"{number}.db" for number in count())

    def step(scope: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        with scope():
            loss = loss_of(called)
        optimizer.zero_grad()
        with scope():
            loss.backward()
        optimizer.step()

    def block(length: int, every: int | None) -> None:
        database = next(names)
        scope = loka.probe(called, database, every=every) if every else nullcontext()
        with scope:
            for _ in range(length):
                step()
        if every and length >= 100:
            engine = open_database(database, create=False)
            recorded.append(read_run(engine).progress.overhead_fraction)
            engine.dispose()

    block(20, None)
    before = int(counters["stats"]["unique_graphs"])
    ratio = interleaved_ratio(
        lambda: block(steps, 100), lambda: block(steps, None), rounds=rounds, warmup=0, clock=process_time
    )
    sites = SiteMap(unwrap(model))

    def captured() -> None:
        sites.refresh()
        capture = Capture(sites, _Nobody())
        step(lambda: capture_scope(capture))
        sites.clear()

    bare = interleaved_ratio(captured, step, rounds=10 * rounds, warmup=2, clock=process_time)
    return {
        "with / without, every=100": ratio,
        "overhead_fraction in the database, median": sorted(recorded)[len(recorded) // 2],
        "a captured step, nothing measured / plain step": bare,
        "graphs compiled because of the probe": int(counters["stats"]["unique_graphs"]) - before,
    }


def main() -> None:
    """Run the study on every workload."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run, without meaning")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    torch.set_num_threads(1)
    settings = {"steps_per_block": 100 if quick else 1000, "rounds": 1 if quick else 3}
    workloads: dict[str, tuple[Callable[[], tuple[nn.Module, Loss]], bool]] = {
        "wukong, batch 512, eager": (lambda: wukong(512), False),
        "transformer, 8 x 128, eager": (transformer, False),
        "wukong, batch 512, compiled": (lambda: wukong(512), True),
    }
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (make, compiled) in workloads.items():
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
    write_record("probe_overhead", settings, results)


if __name__ == "__main__":
    main()
