"""What makes the error of the sites that are worst in FP8, and what it takes to have a third of it.

    python -m benchmarks.mods.anatomy [--material smollm2]

Of the five worst sites of `benchmarks.mods.equivalent`, on later text, under rowwise FP8 where nothing else is said:
the error of rows, its median and 99th percentile (p99), by recipe; with one operand rounded and the other exact; with
the sixteenth of the rows exact that is loudest, or that has the largest sum of x_k^2 |w_k|^2 over |y|^2, by which
`KeepShareHigh` chooses; and which share has to stay in high precision for a p99 three times lower, in steps of a
sixteenth, where columns are kept, or directions of a full basis (`Hadamard`), fitted on early text. `work` is that
share with the product by the basis, in units of the site's own product.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.mods.equivalent import RECIPES, SUBJECTS, WORST, Subject, judge_sites, run_hooked, worst_sites
from benchmarks.record import write_record
from benchmarks.truth.materials import build, missing
from loka.formats import DEFAULT_RECIPES, recipe
from loka.mods.keep_share import noise_to_signal
from loka.mods.rotation import Mixing, balanced_basis
from loka.mods.trial.gain import rounded_product
from loka.numerics import product_error
from loka.quantize import fake_quantize

TIMES: Final[float] = 3.0
STEPS: Final[int] = 16
_FITTED: Final[int] = 4
_MULTIPLE: Final[int] = 16  # of what is left to FP8, as the mods keep it

# How many columns or directions are kept -> the product with the others rounded.
Kept = Callable[[int], Tensor]


@torch.no_grad()
def anatomy(early: Tensor, x: Tensor, weight: Tensor) -> dict[str, Any]:
    """Return the figures of one product X W^T, from rows to fit to [rows, k], rows to judge [m, k] and W [n, k]."""
    exact, rowwise = x @ weight.t(), recipe("rowwise")
    plain = rounded_product(x, weight, rowwise)
    operands = {"input": (True, False), "weight": (False, True)}
    errors = {known: product_error(rounded_product(x, weight, recipe(known)), exact) for known in DEFAULT_RECIPES}
    by_row = (plain - exact).norm(dim=1) / exact.norm(dim=1)
    ratio = noise_to_signal(x, weight.square().sum(0), exact)
    some = len(x) // 16
    found: dict[str, Any] = {
        "p99 by recipe": {known: round(error.row_error_p99, 4) for known, error in errors.items()},
        "median": round(float(by_row.median()), 4),
        "p99, this operand alone rounded": {
            name: round(product_error(_partly(x, weight, *which), exact).row_error_p99, 4)
            for name, which in operands.items()
        },
        "p99, a sixteenth of the rows exact": {
            "the loudest": round(_without(plain, exact, x.abs().amax(1).topk(some).indices), 4),
            "the largest noise to signal": round(_without(plain, exact, ratio.topk(some).indices), 4),
        },
        "correlation of error and root of noise to signal": round(
            float(torch.corrcoef(torch.stack([by_row, ratio.sqrt()]))[0, 1]), 3
        ),
    }
    before = errors["rowwise"].row_error_p99
    for name, (keeping, extra) in _ways(early, x, weight).items():
        least = _least(keeping, exact, before / TIMES, weight.shape[1])
        found[f"least kept for a third: {name}"] = {"share": least, "work": round(least + extra, 3)}
    return found


def _partly(x: Tensor, weight: Tensor, rounded_x: bool, rounded_weight: bool) -> Tensor:
    rowwise = recipe("rowwise")
    left = fake_quantize(x, rowwise.operand("input")) if rounded_x else x
    return left @ (fake_quantize(weight, rowwise.operand("weight")) if rounded_weight else weight).t()


def _without(product: Tensor, exact: Tensor, rows: Tensor) -> float:
    return product_error(product.index_copy(0, rows, exact.index_select(0, rows)), exact).row_error_p99


def _ways(early: Tensor, x: Tensor, weight: Tensor) -> Mapping[str, tuple[Kept, float]]:
    """Return how products are split, and what each way costs beside what it keeps."""
    rowwise, (n, k) = recipe("rowwise"), weight.shape
    weights = 1 / (early @ weight.t()).square().mean(1).clamp_min(1e-30)
    covariance = (early.t() * weights) @ early / weights.sum()
    order = (covariance.diagonal() * weight.square().sum(0)).argsort(descending=True)

    def split(turned: Tensor, other: Tensor, body: int) -> Tensor:
        return rounded_product(turned[:, :body], other[:, :body], rowwise) + turned[:, body:] @ other[:, body:].t()

    def columns(kept: int) -> Tensor:
        quiet_first = order.flip(0)
        return split(x[:, quiet_first], weight[:, quiet_first], k - kept)

    def directions(kept: int) -> Tensor:
        basis = balanced_basis(covariance, weight, Mixing(k - kept))
        assert basis is not None
        turned = torch.linalg.solve(basis, weight.double().t()).t().float()
        return split(x @ basis.float(), turned, k - kept)

    return {"columns": (columns, 0.0), "directions of a full basis": (directions, k / n)}


def _least(keeping: Kept, exact: Tensor, wanted: float, k: int) -> float:
    """Return the least share of k, in steps, with which the p99 is as low as wanted; 1 where none is."""
    for step in range(STEPS):
        kept = k - (k - k * step // STEPS) // _MULTIPLE * _MULTIPLE
        if product_error(keeping(kept), exact).row_error_p99 <= wanted:
            return round(kept / k, 3)
    return 1.0


@torch.no_grad()
def study(subject: Subject) -> dict[str, Any]:
    """Return the figures of the worst sites of one model."""
    model, split = subject.material.model, subject.material.splits["exchangeable"]
    assert subject.material.sites is not None
    names = sorted(subject.material.sites)
    worst = worst_sites(judge_sites(model, names, subject, split.later[:1]), names, WORST)
    chosen = sorted({name for known in RECIPES for name in worst[known]})
    early, later = (_inputs(subject, chosen, some) for some in (split.early[:_FITTED], split.later[:1]))
    figures = {}
    for name in chosen:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        figures[f"{subject.material.name}: {name}"] = {
            "n, k": list(weight.shape),
            **anatomy(early[name], later[name], weight.detach().float()),
        }
    return figures


def _inputs(subject: Subject, names: Sequence[str], batches: Sequence[Any]) -> dict[str, Tensor]:
    """Return what these linears get, [rows, k]."""
    model, seen = subject.material.model, {name: list[Tensor]() for name in names}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args: seen[name].append(args[0].flatten(0, -2).float())

    run_hooked(subject, batches, [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names])
    return {name: torch.cat(rows) for name, rows in seen.items()}


def main() -> None:
    """Look at the models whose packages are there, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--material", choices=SUBJECTS, action="append", help="limit the study to these models")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name, make in SUBJECTS.items():
        if options.material and name not in options.material:
            continue
        if reason := missing(name):
            print(reason)
            continue
        results |= study(make(build(name)))
    settings = {"times": TIMES, "steps": STEPS, "fitted batches": _FITTED, "judged batches": 1}
    if results:
        write_record("mods.anatomy", settings, results)


if __name__ == "__main__":
    main()
