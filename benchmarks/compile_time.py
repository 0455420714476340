"""What compiling a training step costs whose linear layers run emulated FP8, against high precision and torchao.

Each compilation is the first step of a fresh process with empty caches, after a small one that imports what compilers
need. It is timed in CPU time, that of the C++ compiler apart. Ways take turns, one round after the other.
"""

import argparse
import importlib.util
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import warnings
from statistics import median
from typing import Any, Final

import torch
from torch import nn

from benchmarks.emulated_linear import PEER_RECIPES, STACKS, ours, torchao
from benchmarks.record import write_record
from loka.formats import DEFAULT_RECIPES

BATCH: Final[int] = 256
ONE_COMPILER: Final = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def compiled(model: nn.Module, way: str, recipe: str) -> nn.Module:
    """Return a model whose first step compiles it in one of three ways."""
    if way == "ours":
        return ours(model, recipe, BATCH, compiled=True)
    if way == "torchao":
        return torchao(model, recipe, compiled=True)
    plain: Any = torch.compile(model, fullgraph=True)
    made: nn.Module = plain
    return made


def cpu_s() -> tuple[float, float]:
    """Return the CPU time so far of this process, and of those that it started and that have ended."""
    used = [resource.getrusage(of) for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return used[0].ru_utime + used[0].ru_stime, used[1].ru_utime + used[1].ru_stime


def first_step(stack: str, way: str, recipe: str) -> None:
    """Print the CPU times of the first step of a model: of Python, and of the C++ compiler."""
    torch.set_num_threads(1)
    torch.compile(nn.Linear(8, 8))(torch.randn(4, 8)).sum().backward()
    torch.manual_seed(0)
    model, width = STACKS[stack]()
    step = compiled(model, way, recipe)
    x = torch.randn(BATCH, width)
    before = cpu_s()
    step(x).square().mean().backward()
    print(json.dumps([after - start for after, start in zip(cpu_s(), before, strict=True)]))


def in_a_process(stack: str, way: str, recipe: str) -> tuple[float, float]:
    """Return the two times of a fresh process without caches."""
    with tempfile.TemporaryDirectory() as caches:
        ran = subprocess.run(
            [sys.executable, "-m", "benchmarks.compile_time", "--step", stack, way, recipe],
            env={**os.environ, **ONE_COMPILER, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": caches},
            capture_output=True,
            text=True,
            check=True,
        )
    python, compiler = json.loads(ran.stdout.splitlines()[-1])
    return python, compiler


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run, without meaning")
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
        first_step(*arguments.step)
        return
    peers = PEER_RECIPES if importlib.util.find_spec("torchao") else ()
    ours_and_theirs = [("ours", DEFAULT_RECIPES), ("torchao", peers)]
    ways = [("high precision", ""), *((way, recipe) for way, recipes in ours_and_theirs for recipe in recipes)]
    ways = ways[:2] if arguments.quick else ways
    stacks, rounds = (("dlrm",), 1) if arguments.quick else (tuple(STACKS), 3)
    taken: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for stack in stacks:
            for way, recipe in ways:
                times = in_a_process(stack, way, recipe)
                taken.setdefault((stack, way, recipe), []).append(times)
                print(f"{stack}-like, {way} {recipe}: {times[0]:.1f} s, the C++ compiler {times[1]:.1f} s", flush=True)
    results: dict[str, Any] = {}
    for (stack, way, recipe), each in taken.items():
        total, plain = median(map(sum, each)), median(map(sum, taken[stack, "high precision", ""]))
        name = f"{stack}-like, {way} {recipe}".strip()
        results[f"{name}: s of CPU"] = round(total, 1)
        results[f"{name}: of it the C++ compiler"] = round(median(compiler for _, compiler in each), 1)
        results[f"{name}: / high precision"] = round(total / plain, 2)
    write_record("compile_time", {"batch": BATCH, "rounds": rounds}, results)


if __name__ == "__main__":
    main()
