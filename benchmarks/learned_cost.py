"""What learning costs a sampled step and how fast learned operands are drawn: one thread, milliseconds and elements."""

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.record import write_record
from loka.probes.distributions.closed_form import ProductStatistics
from loka.probes.distributions.learned import Kind, OperandDistribution
from loka.timing import measure

ROWS = 64
RANK = 16
# Elements of a draw.
_DRAWN = 1 << 20


def study(features: int, budget_s: float) -> dict[str, Any]:
    """Learn from ROWS rows of one product with a square weight, then draw its first operand."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, features, generator=generator) for rows in (ROWS, features))
    y, amax = a @ b.T, float(a.abs().max())
    state = OperandDistribution.of(a, seed=0, rank=RANK)
    other = OperandDistribution.of(a, seed=1, rank=RANK)

    def draw(kind: Kind) -> Callable[[int], object]:
        sampler, rows = state.sampler(kind), _DRAWN // features
        return lambda _: sampler.draw(rows, generator)

    learned = {
        "statistics of a product": lambda _: ProductStatistics.of(a, b, "fprop", y=y, a_amax=amax),
        "distribution of an operand": lambda _: OperandDistribution.of(a, seed=0, rank=RANK),
        "merging distributions": lambda _: state.merge(other),
    }
    kinds: tuple[Kind, ...] = ("copula", "gaussian", "normal")
    drawn = {f"{kind} draw": draw(kind) for kind in kinds}
    times = measure({**learned, **drawn}, device="cpu", budget_s=budget_s, min_repetitions=20)
    milliseconds = {f"K = {features}, {name}, ms": times[name].median_us / 1e3 for name in learned}
    speed = {f"K = {features}, {name}, elements/s": _DRAWN / times[name].median_us * 1e6 for name in drawn}
    return {**milliseconds, **speed, f"K = {features}, bytes of a distribution": state.nbytes}


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run, without meaning")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for features in (768, 4096):
        results |= study(features, 0.5 if quick else 10.0)
    write_record("learned_cost", {"rows": ROWS, "rank": RANK}, results)


if __name__ == "__main__":
    main()
