"""Our Triton kernels on this GPU against what they have to beat: a copy, Inductor, the best library.

    quantise    share of the bandwidth that a plain copy reaches, per recipe; both copies of a backward pass at once
    epilogue    GEMM, BlockNorm and HardSwish in one kernel against the same steps under Inductor, in FP8 and in bf16
    GEMM        from a device profile (`loka bench --suite lrm27 --export`): ours against the fastest library

All of a contest are timed in turns, on operands that are not in the cache; quantising is part of every FP8 time.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import write_record
from loka.dispatch.measuring.profile import DeviceProfile
from loka.errors import LokaError
from loka.formats import DEFAULT_RECIPES, RECIPES
from loka.kernel_registry.ceilings import ceilings_of
from loka.kernel_registry.norm_act import norm_act
from loka.kernel_registry.registry import default_registry
from loka.kernel_registry.triton.quantize import quantize, quantize_both
from loka.timing import measure, num_inputs

FULL = {
    "quantise": ((2048, 1024), (2048, 8192), (2048, 30800), (8192, 4096)),
    "epilogue": ((2048, 256, 768), (2048, 1024, 1024), (2048, 4096, 1024), (8192, 1024, 1024)),
}
QUICK = {"quantise": ((64, 300),), "epilogue": ((32, 256, 256),)}


def inputs(device: torch.device, *shapes: tuple[int, ...]) -> list[tuple[Tensor, ...]]:
    """Draw as many sets of bf16 operands as leave the cache cold."""
    first = tuple(torch.randn(shape, device=device).bfloat16() for shape in shapes)
    copies = num_inputs(sum(x.nbytes for x in first), device)
    return [first, *(tuple(x.clone() for x in first) for _ in range(copies - 1))]


def over(pool: list[tuple[Tensor, ...]], call: Callable[..., object]) -> Callable[[int], object]:
    """Return a candidate that calls something on the set of operands whose turn it is."""
    return lambda turn: call(*pool[turn])


def quantise_study(shapes: Any, device: torch.device, budget_s: float) -> dict[str, Any]:
    """Return, per shape and recipe, the share of the copy bandwidth: bytes of x read and codes written, once."""
    ceiling = ceilings_of(device).bytes_per_s
    found = {}
    for m, k in shapes:
        pool = inputs(device, (m, k))
        calls: dict[str, Callable[[int], object]] = {}
        moved = {}
        for recipe in DEFAULT_RECIPES:
            spec = RECIPES[recipe].operand("input")
            calls[recipe] = over(pool, partial(quantize, spec=spec))
            moved[recipe] = 3 * m * k
            calls[f"{recipe}, both copies"] = over(pool, partial(quantize_both, spec=spec))
            moved[f"{recipe}, both copies"] = 4 * m * k
        times = measure(calls, device=device, budget_s=budget_s, inputs=len(pool))
        for name, time in times.items():
            found[f"quantise {m}x{k} {name}: share of copy bandwidth"] = moved[name] / (time.median_us * 1e-6) / ceiling
    return found


def epilogue_study(shapes: Any, device: torch.device, budget_s: float) -> dict[str, Any]:
    """Return, per shape, how many times longer the unfused steps take than the fused kernel."""
    registry = default_registry()
    fused = registry.get("triton.linear_norm_act.rowwise").load()
    library = registry.get("torch.scaled_mm.rowwise").load()

    def steps(a: Tensor, b: Tensor) -> Tensor:
        return norm_act(library(a, b, product="fprop", out_dtype=torch.bfloat16))

    def high_precision(a: Tensor, b: Tensor) -> Tensor:
        return norm_act(a @ b.t())

    unfused = {"FP8": steps, "bf16": high_precision}
    found = {}
    for m, k, n in shapes:
        pool = inputs(device, (m, k), (n, k))
        calls = {"fused": over(pool, partial(fused, product="fprop", out_dtype=torch.bfloat16))}
        calls |= {name: over(pool, torch.compile(call, dynamic=False)) for name, call in unfused.items()}
        with torch.no_grad():
            times = measure(calls, device=device, budget_s=budget_s, inputs=len(pool))
        for name in unfused:
            ratio = times[name].median_us / times["fused"].median_us
            found[f"epilogue {m}x{k}x{n}: unfused {name} under Inductor over fused"] = ratio
    return found


def gemm_study(profile: DeviceProfile) -> dict[str, Any]:
    """Compare our GEMM with the fastest library, shape by shape, under the same recipe and over all recipes."""
    registry = default_registry()
    shapes: dict[tuple[Any, ...], dict[str, float]] = {}
    for time in profile.times:
        key = (time.product, time.batch, time.m, time.k, time.n, time.dtype)
        shapes.setdefault(key, {})[time.kernel] = time.median_us
    same_recipe: list[float] = []
    against_all: list[float] = []
    plan_gain: list[float] = []
    for times in shapes.values():
        ours = {name: us for name, us in times.items() if name.startswith("triton.gemm.")}
        others = {
            name: us
            for name, us in times.items()
            if not name.startswith(("triton.", "emulated.")) and name in registry and registry.get(name).recipe
        }
        baselines = [us for name, us in times.items() if name in registry and registry.get(name).is_baseline]
        for name, us in ours.items():
            rivals = [other for rival, other in others.items() if rival.endswith(name.rpartition(".")[2])]
            same_recipe += [min(rivals) / us] if rivals else []
        if ours and others:
            against_all.append(min(others.values()) / min(ours.values()))
        if baselines:
            plan_gain.append(min(baselines) / min(min(baselines), *ours.values(), *others.values()))
    return {
        "GEMM: speed of ours over the fastest library, same recipe": _spread(same_recipe),
        "GEMM: speed of ours over the fastest library, any recipe": _spread(against_all),
        "GEMM: the fastest kernel over bf16": _spread(plan_gain),
    }


def _spread(ratios: list[float]) -> dict[str, float]:
    """Return median, worst and share of shapes that reach 0.95."""
    if not ratios:
        return {"shapes": 0}
    return {
        "shapes": len(ratios),
        "median": statistics.median(ratios),
        "worst": min(ratios),
        "share from 0.95 on": sum(ratio >= 0.95 for ratio in ratios) / len(ratios),
    }


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run, without meaning, under the interpreter too")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds to spend")
    parser.add_argument("--profile", type=Path, help="a device profile of lrm27")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.quick:
        raise SystemExit("benchmarks.gpu_kernels measures a GPU, and torch sees none. --quick runs it without meaning.")
    shapes = QUICK if arguments.quick else FULL
    share_s = arguments.budget / sum(map(len, shapes.values()))
    results: dict[str, Any] = quantise_study(shapes["quantise"], device, share_s)
    results |= epilogue_study(shapes["epilogue"], device, share_s)
    if arguments.profile is not None:
        try:
            results |= gemm_study(DeviceProfile.load(arguments.profile))
        except LokaError as error:
            results["GEMM"] = str(error)
    write_record("gpu_kernels", {"budget_s": arguments.budget, "shapes": shapes}, results)


if __name__ == "__main__":
    main()
