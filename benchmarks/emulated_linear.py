"""What emulated FP8 costs on a CPU: a training step of two stacks of linear layers, against high precision and torchao.

A step is forward, backward and an SGD update. Steps run in turns on one thread and are timed in process CPU time, so
that the ratios hold on a busy machine. Every linear layer runs all three of its products in FP8, as torchao's do; the
last of the dlrm-like stack, 256 -> 1, as well.
"""

import argparse
import copy
import dataclasses
import functools
import importlib.util
import itertools
import logging
import warnings
from collections.abc import Callable
from time import process_time
from typing import Any, Final

import torch
from torch import Tensor, nn

import loka
from benchmarks.record import write_record
from loka.dispatch.deciding.decide import Decision
from loka.dispatch.deciding.plan import Plan
from loka.formats import DEFAULT_RECIPES, PASSES
from loka.formats import recipe as recipe_of
from loka.hardware import multiplies_bf16
from loka.kernel_registry.registry import default_registry
from loka.kernel_registry.spec import GemmRequest
from loka.probes.capturing.sites import fingerprint
from loka.quantize import fake_quantize
from loka.timing import interleaved_ratio

BATCH: Final[int] = 2048
PEER_RECIPES: Final[tuple[str, ...]] = ("tensorwise", "rowwise")
DTYPES: Final[tuple[torch.dtype, ...]] = (torch.float32, torch.bfloat16)

Step = Callable[[], object]


class _Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Add to x what two linear layers make of it."""
        return x + self.down(nn.functional.silu(self.norm(self.up(x))))


def wukong_like() -> tuple[nn.Module, int]:
    """Four residual blocks with a norm, and the width of their input."""
    return nn.Sequential(*(_Block(256, 768) for _ in range(4))), 256


def dlrm_like() -> tuple[nn.Module, int]:
    """The top MLP of a DLRM, and the width of its input."""
    widths = (415, 1024, 1024, 512, 256, 1)
    layers: list[nn.Module] = []
    for k, n in itertools.pairwise(widths):
        layers += [nn.Linear(k, n), nn.ReLU()]
    return nn.Sequential(*layers[:-1]), widths[0]


STACKS: Final = {"wukong": wukong_like, "dlrm": dlrm_like}


def plan_of(model: nn.Module, recipe: str, batch: int) -> Plan:
    """Make the plan that puts all products of all linear layers on the emulated kernel of a recipe.

    All passes run it, so it is the one that shares their casts, where there is one: the numbers are the same.
    """
    together = f"emulated.linear_layer.{recipe}"
    kernel = together if together in default_registry() else f"emulated.linear.{recipe}"
    decisions = [
        Decision(
            request=GemmRequest(
                site=name, product=product, op="linear", m=m, n=n, k=k, dtype=str(layer.weight.dtype).split(".")[1]
            ),
            m_min=m,
            m_max=m,
            kernel=kernel,
            recipe=recipe,
            why="forced by the benchmark",
            baseline="torch.mm.fp32",
            baseline_time_us=1.0,
            time_us=1.0,
            time_source="assumed",
            error_upper=0.0,
            horizon=None,
            rejected=(),
        )
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        for product, (m, n, k) in zip(PASSES, _sizes(layer, batch), strict=True)
    ]
    return Plan(
        created="2026-01-01T00:00:00+00:00",
        model=type(model).__name__,
        fingerprint=fingerprint(model),
        environment={},
        bound=loka.Bound(row_error=1.0),
        decisions=tuple(decisions),
    )


def _sizes(layer: nn.Linear, batch: int) -> tuple[tuple[int, int, int], ...]:
    k, n = layer.in_features, layer.out_features
    return (batch, n, k), (batch, k, n), (n, k, batch)


def ours(model: nn.Module, recipe: str, batch: int, compiled: bool) -> nn.Module:
    """Return a copy of a model with every linear layer on our emulated kernels."""
    model = copy.deepcopy(model)
    plan = plan_of(model, recipe, batch)
    if not compiled:
        return loka.convert(model, plan)
    return _as_module(torch.compile(model, backend="loka", options={"plan": plan}, fullgraph=True))


def torchao(model: nn.Module, recipe: str, compiled: bool) -> nn.Module:
    """Return a copy of a model converted by torchao, emulating."""
    import torchao.float8 as peer

    config = dataclasses.replace(peer.Float8LinearConfig.from_recipe_name(recipe), emulate=True)
    model = peer.convert_to_float8_training(copy.deepcopy(model), config=config)
    return _as_module(torch.compile(model, fullgraph=True)) if compiled else model


def _as_module(model: Any) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model


def step_of(model: nn.Module, width: int, batch: int, dtype: torch.dtype) -> Step:
    """Return a training step: forward, backward, update."""
    x = torch.randn(batch, width).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def study(stack: str, dtype: torch.dtype, *, compiled: bool, rounds: int, batch: int) -> dict[str, Any]:
    """Return ratios of step times of one stack in one dtype."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, width = STACKS[stack]()
    high32 = copy.deepcopy(model)
    model = model.to(dtype)

    def compile_if(model: nn.Module) -> nn.Module:
        return _as_module(torch.compile(model, fullgraph=True)) if compiled else model

    base = step_of(compile_if(high32), width, batch, torch.float32)
    where = f"{stack}, {str(dtype).split('.')[1]} model, {'compiled' if compiled else 'eager'}"
    results: dict[str, Any] = {}

    def compare(name: str, a: Step, b: Step) -> None:
        results[f"{where}: {name}"] = ratio = interleaved_ratio(a, b, rounds=rounds, warmup=2, clock=process_time)
        print(f"{where}: {name:<60} {ratio}", flush=True)

    if dtype != torch.float32:
        compare("high precision / fp32", step_of(compile_if(model), width, batch, dtype), base)
    for recipe in DEFAULT_RECIPES:
        step = step_of(ours(model, recipe, batch, compiled), width, batch, dtype)
        compare(f"{recipe} / fp32", step, base)
        if recipe in PEER_RECIPES and importlib.util.find_spec("torchao"):
            peer = step_of(torchao(model, recipe, compiled), width, batch, dtype)
            compare(f"{recipe} / torchao {recipe}", step, peer)
            compare(f"torchao {recipe} / fp32", peer, base)
    return results


def qdq_study(rounds: int) -> dict[str, Any]:
    """Return the time of quantising and dequantising 2 MB of fp32 over that of copying them."""
    x = torch.randn(1024, 512)
    target = torch.empty_like(x)
    results: dict[str, Any] = {}
    for recipe in DEFAULT_RECIPES:
        spec = recipe_of(recipe).operand("input")
        ways: dict[str, Callable[[], object]] = {
            "eager": functools.partial(fake_quantize, x, spec),
            "compiled": functools.partial(torch.compile(fake_quantize, fullgraph=True), x, spec),
        }
        for way, call in ways.items():
            name = f"quantise-dequantise 2 MB, {recipe}, {way} / memcpy"
            results[name] = interleaved_ratio(
                call, functools.partial(target.copy_, x), rounds=rounds, warmup=3, clock=process_time
            )
            print(f"{name:<60} {results[name]}", flush=True)
        torch._dynamo.reset()
    return results


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run, without meaning")
    parser.add_argument("--only", default="", help="the studies whose name holds this, e.g. eager; writes no record")
    arguments = parser.parse_args()
    rounds, batch = (2, 64) if arguments.quick else (5, BATCH)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    results: dict[str, Any] = {} if arguments.only else qdq_study(11 if arguments.quick else 51)
    for compiled in (False, True):
        for stack in STACKS:
            for dtype in DTYPES[:1] if compiled else DTYPES:
                if arguments.only not in f"{stack} {dtype} {'compiled' if compiled else 'eager'}":
                    continue
                results |= study(stack, dtype, compiled=compiled, rounds=rounds, batch=batch)
    if not arguments.only:
        settings = {"batch": batch, "rounds": rounds, "multiplies bf16": multiplies_bf16("cpu")}
        write_record("emulated_linear", settings, results)


if __name__ == "__main__":
    main()
