"""What it saves to quantise a weight once per optimiser step: steps of four micro-batches, with weights kept or not.

Kept where micro-batches repeat, as is the default, or always. A step is forward and backward of every micro-batch and
one SGD update. Both run in turns on one thread, in process CPU time. What is saved is the share of quantising weights,
so it is large where micro-batches are small; what it costs is stated as bytes beside those of the parameters, and for
steps of one micro-batch, in which nothing can be saved.
"""

import argparse
import copy
import gc
from collections.abc import Callable
from dataclasses import replace
from time import process_time
from typing import Any, Final

import torch
from torch import nn

import loka
from benchmarks.emulated_linear import STACKS, plan_of
from benchmarks.record import write_record
from loka.dispatch.deciding.plan import Plan
from loka.dispatch.running.weights import kept_bytes
from loka.timing import interleaved_ratio

MICRO_BATCHES: Final[int] = 4
ROWS: Final[tuple[int, ...]] = (64, 512, 2048)  # of one micro-batch
KERNELS: Final[tuple[str, ...]] = (
    "emulated.linear.rowwise",
    "emulated.linear.mxfp8",
    "torch.scaled_mm.tensorwise",
    "torch.scaled_mm.rowwise",
)
WAYS: Final[dict[str, bool | None]] = {"by default": None, "always": True}
# Steps in which the default learns whether micro-batches repeat.
WARMUP: Final[int] = 4


def plan_on(model: nn.Module, kernel: str, rows: int) -> Plan:
    """Put all products of all linear layers on one kernel."""
    plan = plan_of(model, kernel.rpartition(".")[2], rows)
    return replace(plan, decisions=tuple(replace(decision, kernel=kernel) for decision in plan.decisions))


def step_of(model: nn.Module, width: int, rows: int, micro_batches: int) -> Callable[[], None]:
    """Return a training step."""
    batches = [torch.randn(rows, width) for _ in range(micro_batches)]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        for x in batches:
            model(x).square().mean().backward()
        optimizer.step()

    return step


def converted(model: nn.Module, plan: Plan, cache_weights: bool | None) -> nn.Module:
    """Return a copy of a model that runs as planned."""
    return loka.convert(copy.deepcopy(model), plan, cache_weights=cache_weights)


def study(stack: str, kernel: str, rows: int, rounds: int) -> dict[str, Any]:
    """Return the ratios of step times of one stack on one kernel, and what is kept."""
    torch.manual_seed(0)
    model, width = STACKS[stack]()
    plan = plan_on(model, kernel, rows)
    results: dict[str, Any] = {}
    for micro_batches in (MICRO_BATCHES, 1) if rows == ROWS[0] else (MICRO_BATCHES,):
        where = f"{stack}, {kernel}, {micro_batches} x {rows} rows"
        for name, cache_weights in WAYS.items():
            plain, cached = converted(model, plan, False), converted(model, plan, cache_weights)
            steps = [step_of(each, width, rows, micro_batches) for each in (cached, plain)]
            results[f"{where}: kept {name} / not"] = interleaved_ratio(
                *steps, rounds=rounds, warmup=WARMUP, clock=process_time
            )
            if rows == ROWS[0]:
                for _ in range(micro_batches):
                    cached(torch.randn(rows, width)).square().mean().backward()
                parameters = sum(parameter.nbytes for parameter in cached.parameters())
                results[f"{where}: bytes kept {name} / bytes of parameters"] = kept_bytes() / parameters
            del plain, cached, steps
            gc.collect()
    return results


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run, without meaning")
    rounds = 2 if parser.parse_args().quick else 7
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for stack in STACKS:
        for kernel in KERNELS:
            for rows in ROWS:
                found = study(stack, kernel, rows, rounds)
                results |= found
                for name, value in found.items():
                    print(f"{name:<95} {value}", flush=True)
    write_record("weight_cache", {"micro-batches": MICRO_BATCHES, "rows": list(ROWS), "rounds": rounds}, results)


if __name__ == "__main__":
    main()
