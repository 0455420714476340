"""What a report says of the experts of one product: tokens, the worst expert, those without any, in plain data.

The verdict of a product of experts is that of the layer. One expert may still be worse than the layer's bound allows:
it is named here, and a plan can keep it in high precision.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

from loka.bounds import Limit
from loka.probes.experts.statistics import ExpertError, ExpertStatistics
from loka.probes.experts.verdicts import judge_experts, unsafe_experts

# Experts named in a sentence.
_NAMED: Final[int] = 5


def experts_of(statistics: ExpertStatistics, limit: Limit, confidence: float) -> dict[str, Any]:
    """Return the part of a report that is about the experts of one product.

        {"experts", "steps", "idle": [expert], "imbalance", "tokens": [per step, by expert],
         "recipes": [{"recipe", "safe", "unsafe": [expert], "undecided", "worst": {...}, "pooled": {...}}]}

    `safe` and `undecided` count experts, `unsafe` names them; an expert is judged by its own error over the measured
    steps, all experts of a recipe together at `confidence`; under a bound on anything but
    the row error none is judged. Experts measured too rarely for a figure of their own are
    `pooled`; an `idle` one got no token in any measured step, and nothing is known of it.
    """
    return {
        "experts": statistics.experts,
        "steps": statistics.steps,
        "idle": list(statistics.idle),
        "imbalance": _finite(statistics.imbalance),
        "tokens": (statistics.tokens / statistics.steps).round(3).tolist(),
        "recipes": [_recipe(statistics, name, limit, confidence) for name in statistics.recipes],
    }


def _recipe(statistics: ExpertStatistics, recipe: str, limit: Limit, confidence: float) -> dict[str, Any]:
    errors = statistics.errors(recipe)
    verdicts = list(judge_experts(statistics, recipe, limit, confidence).values())
    unsafe = unsafe_experts(statistics, recipe, limit, confidence)
    pooled = statistics.pooled(recipe)
    return {
        "recipe": recipe,
        "safe": verdicts.count("safe"),
        "unsafe": list(unsafe),
        "undecided": statistics.experts - verdicts.count("safe") - len(unsafe),
        "worst": _error(errors[0]) if errors else None,
        "pooled": _error(pooled) if pooled is not None else None,
    }


def _error(error: ExpertError) -> dict[str, Any]:
    return {
        "expert": error.expert if error.expert >= 0 else None,
        "samples": error.samples,
        "tokens": _finite(error.tokens),
        "row_error": {"mean": _finite(error.mean), "deviation": _finite(error.deviation), "max": _finite(error.worst)},
    }


def expert_notes(report: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each product with experts that are not like the rest of their layer."""
    unseen = report["run"].get("unseen_experts", {})
    return [
        *(note for row in report["sites"] for note in _notes(row)),
        *(
            f"{layer}: {_listed(experts)} experts ran in no sampled step: nothing is known of them"
            for layer, experts in unseen.items()
        ),
    ]


def _notes(row: Mapping[str, Any]) -> Iterable[str]:
    experts = row.get("experts")
    if not experts:
        return
    where = f"{row['site']} {row['pass']}"
    best = next((each for each in experts["recipes"] if each["recipe"] == row["best"]), None)
    if best is not None and best["unsafe"]:
        worst = best["worst"]
        yield (
            f"{where}: {_listed(best['unsafe'])} of {experts['experts']} experts exceed the bound under "
            f"{best['recipe']}, the worst {worst['expert']} with a mean of {worst['row_error']['mean']:.3g}"
        )
    if experts["idle"] and row["pass"] == "fprop":
        yield (
            f"{where}: {_listed(experts['idle'])} of {experts['experts']} experts got no token in "
            f"{experts['steps']} measured steps: nothing is known of them"
        )


def _listed(experts: list[int]) -> str:
    named = ", ".join(map(str, experts[:_NAMED]))
    more = f" and {len(experts) - _NAMED} more" if len(experts) > _NAMED else ""
    return f"{len(experts)} ({named}{more})"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def expert_lines(found: Mapping[tuple[str, str], ExpertStatistics]) -> list[str]:
    """Return lines on the experts of some products, the worst under each recipe first."""
    lines = []
    for (site, product), statistics in found.items():
        lines.append(
            f"experts of {site} {product}: {statistics.experts}, {len(statistics.idle)} without any token in "
            f"{statistics.steps} steps, the busiest has {statistics.imbalance:.3g} times the mean"
        )
        for recipe in statistics.recipes:
            worst = ", ".join(
                f"{each.expert} {each.mean:.3g} ({each.samples} steps, {each.tokens:.3g} tokens)"
                for each in statistics.errors(recipe)[:_NAMED]
            )
            lines.append(f"  {recipe}: {worst or 'each expert was measured too rarely'}")
    return lines
