"""What the evidence says of one recipe at one product, against what the product is held to.

Many kernels share a recipe, so this is asked once per recipe and not per kernel.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from loka.bounds import Limit
from loka.probes.judging.evidence import GatedError, ProductEvidence, RecipeEvidence
from loka.probes.judging.loss_evidence import LossEvidence

# Why an error keeps a recipe out, and the reason in words.
ErrorObjection = tuple[Literal["undecided", "over_bound"], str]


@dataclass(frozen=True, kw_only=True, slots=True)
class LossCost:
    """What a kernel of a forward product does to the loss, relative to it; None where too few samples bound it."""

    kl: float  # mean over steps
    kl_low: float | None
    kl_high: float | None
    cost: float | None  # of the budget: kl_high and an established first-order increase


class Judged(NamedTuple):
    """One recipe at one product: its evidence, and what speaks against its error."""

    evidence: RecipeEvidence | None  # None: the probe did not measure it
    gated: GatedError | None  # the error that the limit is compared with
    loss: LossCost | None
    objection: ErrorObjection | None
    mean: float | None = None  # of that error, where it is a number; and the most that it is
    upper: float | None = None


def judge_recipe(name: str, product: ProductEvidence, limit: Limit) -> Judged:
    """Judge the recipe of this name."""
    for found in product.recipes:
        if found.recipe == name:
            break
    else:
        because = product.unmeasured or "the probe did not measure it; name it in probe(recipes=...)"
        return Judged(None, None, None, ("undecided", f"the error of {name} is unknown here: {because}"))
    gated = found.gated(limit)
    mean, upper = finite(gated.error.mean), finite(gated.error.upper_tolerance)
    return Judged(found, gated, loss_cost(found.loss), _objection(found, gated, product, limit), mean, upper)


def _objection(
    recipe: RecipeEvidence, gated: GatedError, product: ProductEvidence, limit: Limit
) -> ErrorObjection | None:
    verdict = recipe.judge(limit)
    if verdict == "safe":
        return None
    if limit.metric == "loss":
        return _loss_objection(recipe, product, limit, is_unsafe=verdict == "unsafe")
    error = gated.error
    if math.isnan(error.upper_tolerance):
        because = f": {gated.note}" if gated.note else "; probe longer"
        return "undecided", f"{recipe.samples} sampled steps are too few to bound its {gated.gate}{because}"
    if limit.bias is not None and not abs(recipe.bias) <= limit.bias and error.upper_tolerance <= limit.most:
        code: Literal["undecided", "over_bound"] = "undecided" if math.isnan(recipe.bias) else "over_bound"
        return code, f"its error along the gradient is {recipe.bias:.3g} on average, against the most of {limit.bias:g}"
    interval = f"{error.mean:.3g} on average ({error.low:.3g} to {error.high:.3g}, {recipe.samples} steps)"
    numbers = f"{error_words(gated, limit)}, {interval}, against the bound {limit.words}"
    if verdict == "unsafe":
        return "over_bound", numbers
    return "undecided", f"{numbers}: more samples may settle it"


def _loss_objection(
    recipe: RecipeEvidence, product: ProductEvidence, limit: Limit, *, is_unsafe: bool
) -> ErrorObjection:
    """Say why a recipe of a forward product does not fit the budget of loss on its own."""
    loss, budget = recipe.loss, limit.value
    if loss is None:
        return "undecided", f"what {recipe.recipe} does to the loss is unknown here: {no_loss(product)}"
    if math.isnan(loss.cost):
        return "undecided", f"{loss.samples} sampled step is too few to bound what it does to the loss; probe longer"
    numbers = f"costs {loss_words(loss)}, against the budget of {budget:g}"
    if is_unsafe or loss.kl_high <= budget:
        return "over_bound", numbers
    return "undecided", f"{numbers}: more samples may settle it"


def error_words(gated: GatedError, limit: Limit) -> str:
    """Return e.g. `row_error up to 0.04`, or `relative_error up to 0.02 (34 dB)` under a bound on the ratio."""
    in_db = f" ({gated.sqnr_low_db:.3g} dB)" if limit.metric == "sqnr_db" else ""
    return f"{gated.gate} up to {gated.error.upper_tolerance:.3g}{in_db}"


def loss_cost(loss: LossEvidence | None) -> LossCost | None:
    """Return the part of loss evidence that a plan keeps."""
    if loss is None:
        return None
    return LossCost(kl=loss.kl, kl_low=finite(loss.kl_low), kl_high=finite(loss.kl_high), cost=finite(loss.cost))


def loss_words(loss: LossEvidence) -> str:
    """Return e.g. `up to 1.2e-06 of the loss (kl 1.1e-06, 1e-06 to 1.2e-06, 8 steps)`."""
    parts = f"kl {loss.kl:.3g}, {loss.kl_low:.3g} to {loss.kl_high:.3g}, {loss.samples} steps"
    if loss.first_order_low > 0:
        parts += f"; a first-order increase of at least {loss.first_order_low:.3g}"
    if loss.labels == "empirical":
        parts += "; from the data's own labels, which may overstate it"
    return f"up to {loss.cost:.3g} of the loss ({parts})"


def no_loss(evidence: ProductEvidence) -> str:
    """Return why no step took what a forward product does to the loss, where none did."""
    if evidence.batch > 1 or any(word in evidence.op for word in ("convolution", "grouped")):
        return "no step takes what batches of matrices, experts and convolutions do to it"
    return "no sampled step took it: probe longer, in a loop that runs backward"


def finite(value: float) -> float | None:
    """Return a number that a document can hold, else None."""
    return value if math.isfinite(value) else None
