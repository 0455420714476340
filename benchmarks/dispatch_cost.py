"""What dispatch adds to a kernel in eager mode: `dispatch.running.linear` against the kernel itself, on tiny shapes.

Without gradients and, where autograd records the call, with what recording an `autograd.Function` takes. How much that
is shows a function that does nothing but call the kernel: nothing written in Python is recorded for less.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.record import write_record
from loka.dispatch.running.linear import linear
from loka.kernel_registry.registry import default_registry
from loka.kernel_registry.spec import Kernel
from loka.timing import measure

KERNEL = "emulated.linear.rowwise"


def bare(kernel: Kernel) -> Callable[[Tensor, Tensor], Tensor]:
    """Return an `autograd.Function` that saves one operand, as any has to, and calls a kernel."""

    class Bare(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return kernel(x, weight, product="fprop", out_dtype=x.dtype)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
            return None, None

    return Bare.apply  # type: ignore[no-any-return]  # torch does not annotate it


def study(rows: int, budget_s: float) -> dict[str, Any]:
    """Time one tiny linear layer, forward only, in microseconds."""
    x, weight = torch.randn(rows, 16), torch.randn(16, 16)
    trained = weight.clone().requires_grad_()
    kernel = default_registry().get(KERNEL).load()
    recorded = bare(kernel)

    def without_grad(call: Callable[[], object]) -> Callable[[int], object]:
        def run(_: int) -> object:
            with torch.no_grad():
                return call()

        return run

    times = measure(
        {
            "torch.nn.functional.linear": without_grad(lambda: F.linear(x, weight)),
            "dispatch.linear, high precision": without_grad(lambda: linear(x, weight, None, "", "", "")),
            f"{KERNEL} itself": without_grad(lambda: kernel(x, weight, product="fprop", out_dtype=torch.float32)),
            f"dispatch.linear, {KERNEL}": without_grad(lambda: linear(x, weight, None, KERNEL, "", "")),
            "torch.nn.functional.linear, recorded": lambda _: F.linear(x, trained),
            f"{KERNEL} in a bare autograd.Function": lambda _: recorded(x, trained),
            f"dispatch.linear, {KERNEL}, recorded": lambda _: linear(x, trained, None, KERNEL, "", ""),
        },
        device="cpu",
        budget_s=budget_s,
        min_repetitions=200,
    )
    itself = times[f"{KERNEL} itself"].median_us
    floor = times[f"{KERNEL} in a bare autograd.Function"].median_us
    through = times[f"dispatch.linear, {KERNEL}, recorded"].median_us
    added = {
        "dispatch adds per call, us": times[f"dispatch.linear, {KERNEL}"].median_us - itself,
        "the same where autograd records it, us": through - itself,
        "of which a bare autograd.Function adds, us": floor - itself,
        "and dispatch, us": through - floor,
    }
    return {**{f"{name}, us": value for name, value in times.items()}, **added}


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run, without meaning")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    torch.set_num_threads(1)
    write_record("dispatch_cost", {"shape": "8x16x16"}, study(8, 0.5 if quick else 10.0))


if __name__ == "__main__":
    main()
