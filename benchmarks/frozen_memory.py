"""What a frozen model takes of memory, next to the same model in bf16: linear layers, bare Parameters, experts.

Each arm is a process of its own that makes the model, and freezes it or not; what is compared is what the operating
system says the process holds afterwards beyond what it held before (VmRSS, freed memory given back first), and what the
tensors themselves take. Weights are random: nothing here depends on their values. The kernels are those of a CPU, the
codes and scales those of any device.
"""

import argparse
import ctypes
import gc
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import loka
from benchmarks.record import write_record
from loka.dispatch.deciding.decide import Decision
from loka.kernel_registry.spec import GemmRequest, Op
from loka.probes.capturing.sites import fingerprint

RECIPE = "blockwise"


def linears() -> nn.Module:
    """Linear layers of a transformer's size."""
    return nn.Sequential(*[layer for _ in range(8) for layer in (nn.Linear(2048, 4096), nn.Linear(4096, 2048))])


class Cross(nn.Module):
    """DCN's cross network: square Parameters in a list, and no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = nn.ParameterList(nn.Parameter(torch.randn(3456, 3456)) for _ in range(10))

    def forward(self, x: Tensor) -> Tensor:
        """Cross."""
        out = x
        for kernel in self.kernels:
            out = x * (out @ kernel) + out
        return out


class Experts(nn.Module):
    """The experts of one layer as transformers stores them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(32, 1536, 1024))
        self.down_proj = nn.Parameter(torch.randn(32, 1024, 768))


# name -> (the model, the op of its products, what kernels of that op are called)
CASES: dict[str, tuple[Callable[[], nn.Module], Op]] = {
    "linear layers": (linears, "linear"),
    "bare Parameters": (Cross, "linear"),
    "experts": (Experts, "grouped_linear"),
}


def plan_of(model: nn.Module, op: Op) -> loka.Plan:
    """Plan the forward products with every matrix of a model."""
    decisions = []
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            continue
        n, k = weight.shape[-2:]
        request = GemmRequest(
            site=name.removesuffix(".weight"), product="fprop", op=op, m=512, n=n, k=k, dtype="bfloat16"
        )
        decisions.append(
            Decision(
                request=replace(request, batch=weight.shape[0]) if op == "grouped_linear" else request,
                m_min=512,
                m_max=512,
                kernel=f"emulated.{op}.{RECIPE}",
                recipe=RECIPE,
                why="assumed by this benchmark",
                baseline="torch.mm.bf16",
                baseline_time_us=1.3,
                time_us=1.0,
                time_source="assumed 1.3x",
                error_upper=0.05,
                horizon=None,
                rejected=(),
            )
        )
    return loka.Plan(
        created="2026-01-01T00:00:00+00:00",
        model=type(model).__name__,
        fingerprint=fingerprint(model),
        environment={},
        bound=loka.Bound(row_error=0.05),
        decisions=tuple(decisions),
    )


def held() -> int:
    """Return the bytes that this process holds, once what was freed is given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(fields["VmRSS"].split()[0]) << 10


def arm(case: str, *, frozen: bool) -> tuple[int, int]:
    """Make a model, frozen or not; return what the process holds more than before, and the bytes of its tensors."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    make, op = CASES[case]
    small = nn.Linear(128, 128).bfloat16()
    loka.freeze(small, plan_of(small, "linear"))  # so that both arms have loaded what freezing needs
    before = held()
    model = make().bfloat16()
    if frozen:
        record = loka.freeze(model, plan_of(model, op))
        if record.left:
            raise SystemExit(str(record))
    tensors = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    return held() - before, tensors


def main() -> None:
    """Run every case in processes of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one repetition")
    parser.add_argument("--arm", nargs=2, metavar=("CASE", "ARM"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm:
        case, which = arguments.arm
        print(*arm(case, frozen=which == "frozen"))
        return
    repetitions = 1 if arguments.quick else 3
    results: dict[str, Any] = {}
    for case in CASES:
        found: dict[str, list[int]] = {"bf16": [], "frozen": []}
        tensors = {}
        for _ in range(repetitions):
            for which, sizes in found.items():
                command = [sys.executable, "-m", "benchmarks.frozen_memory", "--arm", case, which]
                size, tensors[which] = map(int, subprocess.check_output(command, text=True).split()[-2:])
                sizes.append(size)
        results[case] = {
            "process, frozen / bf16": round(median(found["frozen"]) / median(found["bf16"]), 4),
            "tensors, frozen / bf16": round(tensors["frozen"] / tensors["bf16"], 4),
            "process_mb": {which: [round(size / 2**20, 1) for size in sizes] for which, sizes in found.items()},
            "tensors_mb": {which: round(size / 2**20, 1) for which, size in tensors.items()},
        }
    write_record("frozen_memory", {"repetitions": repetitions, "recipe": RECIPE}, results)


if __name__ == "__main__":
    main()
