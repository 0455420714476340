"""What a hidden layer costs before and after the mods: GEMM, BlockNorm, HardSwish against GEMM, bias, LayerNorm, SiLU.

    python -m benchmarks.mods.epilogue [--quick]

Both modules under Inductor, on a CPU, batch 1024, forward alone and with backward. The layer before is what models
have; the layer after is what `apply(model, [NoBias(), BlockNorm(256), HardSwish(), FuseEpilogue()])` makes of it. They
run in turns on one thread and are timed in process CPU time. Where the product takes most of the time, the ratio tends
to 1: `the rest` is the same ratio with the product left out, of norm and activation alone.
"""

import argparse
import logging
import warnings
from collections.abc import Callable
from time import process_time
from typing import Any, Final

import torch
from torch import Tensor, nn

import loka.mods
from benchmarks.record import write_record
from loka.mods import BlockNorm, FuseEpilogue, HardSwish, NoBias
from loka.timing import Ratio, interleaved_ratio

BATCH: Final[int] = 1024
WIDTHS: Final[tuple[tuple[int, int], ...]] = ((256, 768), (512, 512), (1024, 1024), (4096, 1024))
QUICK: Final[tuple[tuple[int, int], ...]] = ((32, 48),)
# Calls per timing, so that one takes some milliseconds.
_PRODUCTS_PER_TIMING: Final[int] = 2**31

Step = Callable[[], object]


def before(k: int, n: int) -> nn.Sequential:
    """Return the layer as models have it."""
    return nn.Sequential(nn.Linear(k, n), nn.LayerNorm(n), nn.SiLU())


def after(k: int, n: int) -> nn.Sequential:
    """Return the layer as the mods leave it."""
    model = before(k, n)
    loka.mods.apply(model, [NoBias(keep=[]), BlockNorm(256), HardSwish(), FuseEpilogue()])
    return model


def rest_before(n: int) -> nn.Sequential:
    """Return what follows the product, bias aside, as models have it."""
    return nn.Sequential(nn.LayerNorm(n), nn.SiLU())


def rest_after(n: int) -> nn.Sequential:
    """Return what follows the product as the mods leave it."""
    model = rest_before(n)
    loka.mods.apply(model, [BlockNorm(256), HardSwish()])
    return model


def step_of(module: nn.Module, x: Tensor, *, backward: bool, calls: int) -> Step:
    """Return some calls of a compiled module, or some forwards with their backwards."""
    compiled = torch.compile(module, fullgraph=True, dynamic=False)
    x = x.detach().requires_grad_(backward)
    grad = torch.ones(()) if not backward else torch.randn_like(compiled(x).detach())

    def forward() -> None:
        with torch.no_grad():
            for _ in range(calls):
                compiled(x)

    def forward_and_backward() -> None:
        for _ in range(calls):
            module.zero_grad()
            x.grad = None
            compiled(x).backward(grad)

    return forward_and_backward if backward else forward


def compare(modded: nn.Module, plain: nn.Module, x: Tensor, *, backward: bool, rounds: int) -> Ratio:
    """Return the time of the modded module over that of the plain one."""
    weights = sum(parameter.numel() for parameter in plain.parameters())
    calls = max(1, min(50, _PRODUCTS_PER_TIMING // (max(weights, 2**18) * len(x) * (3 if backward else 1))))
    steps = [step_of(module, x, backward=backward, calls=calls) for module in (modded, plain)]
    return interleaved_ratio(*steps, rounds=rounds, warmup=2, clock=process_time)


def study(k: int, n: int, *, batch: int, rounds: int) -> dict[str, Any]:
    """Return the ratios of one width."""
    results: dict[str, Any] = {}
    x, y = torch.randn(batch, k), torch.randn(batch, n)
    for backward in (False, True):
        torch.manual_seed(0)
        torch._dynamo.reset()
        way = "forward and backward" if backward else "forward"
        for name, modded, plain, input in (
            ("layer", after(k, n), before(k, n), x),
            ("the rest", rest_after(n), rest_before(n), y),
        ):
            key = f"{name} {batch}x{k}x{n}, {way}: modded / plain"
            results[key] = compare(modded, plain, input, backward=backward, rounds=rounds)
            print(f"{key:<70} {results[key]}", flush=True)
    return results


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run, without meaning")
    arguments = parser.parse_args()
    widths, batch, rounds = (QUICK, 32, 3) if arguments.quick else (WIDTHS, BATCH, 31)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for k, n in widths:
        results |= study(k, n, batch=batch, rounds=rounds)
    settings = {"batch": batch, "widths": widths, "rounds": rounds}
    write_record("mods_epilogue", settings, results, command="python -m benchmarks.mods.epilogue")


if __name__ == "__main__":
    main()
