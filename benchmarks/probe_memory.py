"""What the probe takes of memory: the peak of a training process with it, over the same process without.

Each arm is a process of its own that imports the same and trains the same; the peak is what the operating system saw
(ru_maxrss). The limit is 5 % of the parameters' bytes and 64 MB.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import loka
from benchmarks.probe_overhead import transformer, wukong
from benchmarks.record import write_record
from loka.probes.sampling import session  # noqa: F401 - so that both arms have loaded what a probe needs

_FIXED_BYTES = 64 << 20
_SHARE = 0.05


def wide() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """One linear with the widest reduction of the lrm27 suite."""
    model = nn.Linear(123_200, 1024)
    return model, lambda model: model(torch.randn(512, 123_200)).square().mean()


def stack() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """Sixty linears of a transformer's size: many operands to learn."""
    model = nn.Sequential(
        *[layer for _ in range(30) for layer in (nn.Linear(576, 1536), nn.SiLU(), nn.Linear(1536, 576))]
    )
    return model, lambda model: F.mse_loss(model(torch.randn(256, 576)), torch.randn(256, 576))


CASES: dict[str, Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]] = {
    "wukong": lambda: wukong(512),
    "transformer": transformer,
    "K = 123,200": wide,
    "60 linears": stack,
}


def train(case: str, *, probed: bool) -> dict[str, int]:
    """Train a little; return the peak of the process and the bytes of the parameters."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, loss_of = CASES[case]()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    with tempfile.TemporaryDirectory() as folder:
        hook: dict[str, Any] = {"every": 2, "overhead": 1e9}
        with loka.probe(model, Path(folder) / "run.db", **hook) if probed else nullcontext():
            for _ in range(12):
                optimizer.zero_grad()
                loss_of(model).backward()
                optimizer.step()
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10, "parameters": parameters}


def main() -> None:
    """Run every case in processes of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one repetition")
    parser.add_argument("--arm", nargs=2, metavar=("CASE", "ARM"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm:
        case, arm = arguments.arm
        found = train(case, probed=arm == "probed")
        print(found["peak"], found["parameters"])
        return
    repetitions = 1 if arguments.quick else 3
    results: dict[str, Any] = {}
    for case in CASES:
        peaks: dict[str, list[int]] = {"plain": [], "probed": []}
        parameters = 0
        for _ in range(repetitions):
            for arm, found in peaks.items():
                command = [sys.executable, "-m", "benchmarks.probe_memory", "--arm", case, arm]
                peak, parameters = map(int, subprocess.check_output(command, text=True).split()[-2:])
                found.append(peak)
        extra = median(peaks["probed"]) - median(peaks["plain"])
        limit = _FIXED_BYTES + _SHARE * parameters
        results[case] = {
            "extra_mb": round(extra / 2**20, 1),
            "limit_mb": round(limit / 2**20, 1),
            "parameters_mb": round(parameters / 2**20, 1),
            "peaks_mb": {arm: [round(peak / 2**20, 1) for peak in found] for arm, found in peaks.items()},
        }
    write_record("probe_memory", {"repetitions": repetitions, "steps": 12, "every": 2}, results)


if __name__ == "__main__":
    main()
