"""Experts in FP8: what a plan of emulated kernels does to the held-out loss of a trained mixture of experts.

    python -m benchmarks.moe.experts [--steps 600] [--weights FILE] [--quick]

The model of `router` is cast to bf16 and probed on training text. Arms, all on the same held-out passages: bf16; every
expert on one naive recipe; the plan under a bound on the row error, for experts and for the whole model; the plan that
keeps the two worst experts of every layer in bf16. Differences are paired by passage.
"""

import argparse
import copy
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

import loka
from benchmarks.moe.router import Texts, passage_losses, texts, trained
from benchmarks.paired import paired
from benchmarks.record import write_record
from loka.dispatch.deciding.plan import Plan
from loka.probes.judging.predictions import read_experts
from loka.probes.storing.database import open_database

_BOUND: Final[float] = 0.05
_PROBED: Final[int] = 40  # batches of training text, one in `_EVERY` of which is sampled
_EVERY: Final[int] = 2
_WORST: Final[int] = 2
_NAIVE: Final[tuple[str, ...]] = ("tensorwise", "rowwise")


def main() -> None:
    """Train or read the model, make the arms, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600, help="of training, ten minutes on one core")
    parser.add_argument("--weights", type=Path, help="read the trained weights here, or leave them here")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    data = texts(limit=200 if options.quick else 4000)
    steps = 10 if options.quick else options.steps
    model = trained(data, steps, options.weights).to(torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        db = Path(folder) / "run.db"
        _probe(model, data, db)
        arms = _arms(model, db)
        worst = _worst(db)
    base = passage_losses(model, data.held_out)
    results: dict[str, Any] = {"held-out loss, nats per byte, bf16": _by_domain(base)}
    for name, plan in arms.items():
        converted = loka.convert(copy.deepcopy(model), plan, emulate=True)
        results[name] = _compared(base, passage_losses(converted, data.held_out), plan)
    results["worst experts, mean row_error (tensorwise)"] = worst
    settings = {"steps": steps, "bound": _BOUND, "passages": len(_joined(base))}
    write_record("moe.experts", settings, results)


def _probe(model: Any, data: Texts, db: Path) -> None:
    with torch.no_grad(), loka.probe(model, db=db, every=_EVERY, overhead=10.0):
        for step in range(_PROBED):
            tokens = torch.cat([x[step * 2 % len(x)][None, :-1] for x in data.train.values()])
            model(input_ids=tokens)


def _arms(model: Any, db: Path) -> dict[str, Plan]:
    """Return a plan per arm; speeds are assumed: this is about the numbers."""
    bound = loka.Bound(row_error=_BOUND)
    whole = loka.plan(db, bound, device="cpu", assume_speedup=1.3)
    experts = replace(whole, decisions=tuple(each for each in whole.decisions if ".experts." in each.request.site))
    naive = {f"every expert on {recipe}": _all_on(experts, recipe) for recipe in _NAIVE}
    return {
        **naive,
        "plan, experts": experts,
        "plan, experts, the two worst of each layer in bf16": _keeping_worst(experts, db),
        "plan, whole model": whole,
    }


def _all_on(plan: Plan, recipe: str) -> Plan:
    kernel = f"emulated.grouped_linear.{recipe}"
    made = [replace(each, kernel=kernel, recipe=recipe, time_us=1.0) for each in plan.decisions]
    return replace(plan, decisions=tuple(made))


def _keeping_worst(plan: Plan, db: Path) -> Plan:
    engine = open_database(db, create=False)
    try:
        known = read_experts(engine)
    finally:
        engine.dispose()
    made = []
    for each in plan.decisions:
        found = known.get((each.request.site, each.request.product))
        errors = found.errors(each.recipe) if found is not None and each.recipe is not None else ()
        made.append(replace(each, kept_experts=tuple(sorted(error.expert for error in errors[:_WORST]))))
    return replace(plan, decisions=tuple(made))


def _worst(db: Path) -> dict[str, Any]:
    """Return, per product of experts, its worst and best expert, and how unevenly tokens fall on them."""
    engine = open_database(db, create=False)
    try:
        known = read_experts(engine)
    finally:
        engine.dispose()
    result = {}
    for (site, product), found in known.items():
        errors = found.errors("tensorwise")
        if errors:
            means = [each.mean for each in errors]
            result[f"{site} {product}"] = {
                "expert": errors[0].expert,
                "worst": round(max(means), 4),
                "best": round(min(means), 4),
                "measured experts": len(errors),
                "imbalance": round(found.imbalance, 2),
            }
    return result


def _joined(losses: dict[str, Tensor]) -> Tensor:
    return torch.cat(list(losses.values()))


def _half_width(values: Tensor) -> float:
    """Return half of the 95 % interval of a mean."""
    found = paired(values.tolist())
    assert found is not None  # there are passages, and more than one
    assert found.high is not None
    return found.high - found.mean


def _by_domain(losses: dict[str, Tensor]) -> dict[str, float]:
    every = _joined(losses)
    half = _half_width(every)
    by_domain = {domain: round(float(value.mean()), 4) for domain, value in losses.items()}
    return {**by_domain, "all": round(float(every.mean()), 5), "half width": round(half, 5)}


def _compared(base: dict[str, Tensor], other: dict[str, Tensor], plan: Plan) -> dict[str, Any]:
    """Return the paired difference to bf16 with its 95 % interval, relative to its loss, and whether it is inside."""
    difference = _joined(other) - _joined(base)
    mean, half = float(difference.mean()), _half_width(difference)
    level = float(_joined(base).mean())
    low = sum(each.recipe is not None for each in plan.decisions)
    return {
        "difference": round(mean, 6),
        "half width": round(half, 6),
        "relative, %": round(100 * mean / level, 4),
        "within the interval of bf16": abs(mean) <= _by_domain(base)["half width"],
        "zero is in the paired interval": abs(mean) <= half,
        "products in FP8": f"{low} of {len(plan.decisions)}",
        "recipes": sorted({each.recipe for each in plan.decisions if each.recipe is not None}),
    }


if __name__ == "__main__":
    main()
