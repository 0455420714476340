"""Which evidence calls for which mod: one row per rule, with its threshold and where that comes from.

A detector yields every place that it can look at, with its figure; the threshold is applied to all alike. A place where
the figure is reached and nothing would be gained is named with the reason, and not advised: because every recipe is
within the bound there, or because the prediction shows no gain.
"""

import math
from dataclasses import replace
from typing import Any, Final

from loka.mods.no_bias import BIAS_SLOTS
from loka.probes.judging.trajectories import DIVERGED_BY, Trajectory
from loka.reports.advise.advice import Hit, Prediction, Predictions, Rule
from loka.reports.advise.case import Case
from loka.reports.advise.detect import (
    ALIGNMENT,
    SMALL_FLOPS,
    cancelling_norms,
    diverging_biases,
    loud_rows,
    misaligned,
    movable_outliers,
    parallel_linears,
    rotatable_outliers,
    scaled_norms,
    stretched_swishes,
    unexplained,
)
from loka.reports.advise.line import Line
from loka.reports.advise.predict import (
    of_loud_rows,
    of_share,
    of_transform,
    rotated,
    smoothed,
    unchanged,
    weights_behind,
)
from loka.reports.advise.times import fused_time, padded_time
from loka.reports.words import percent

_TRAINED: Final[str] = "not told: the model computes something else and is trained further, which no draw foresees"


# --- predictors ---


def _trained(case: Case, hit: Hit, underflow: Prediction, time: str) -> Predictions:
    return Predictions(row_error=Prediction(how=_TRAINED), underflow=underflow, time_us=Prediction(how=time))


def _without_bias(case: Case, hit: Hit) -> Predictions:
    time = "not told: a bias is added in the epilogue of its GEMM, which was never timed without"
    return _trained(case, hit, Prediction(how=_TRAINED), time)


def _without_mean(case: Case, hit: Hit) -> Predictions:
    return _trained(case, hit, Prediction(how=_TRAINED), "not told: norms are not timed, only products are")


def _without_exponential(case: Case, hit: Hit) -> Predictions:
    part = _part(case, hit.targets[0])
    soft, hard = part.recent("underflow"), part.recent("hard_underflow")
    how = "Swish and HardSwish of the same sampled rows, cast row-wise to e4m3: the share of the non-zero that is lost"
    known = math.isfinite(soft) and math.isfinite(hard)
    underflow = Prediction(before=soft, after=hard, recipe="rowwise", how=how) if known else Prediction(how=_TRAINED)
    time = "not told: activations are not timed, only products are"
    useless = f"no gain: {percent(soft)} would underflow as well" if known and hard >= soft else ""
    return replace(_trained(case, hit, underflow, time), useless=useless)


def _keeping_rows_high(case: Case, hit: Hit) -> Predictions:
    time = Prediction(how="not told: the loud rows are one more, small product, which was never timed")
    return of_loud_rows(case, hit, time)


_DRAWN_BOTH: Final[str] = "the drawn product {} and as it is; their ratio times the measured error"


def _smoothing(case: Case, hit: Hit) -> Predictions:
    writer = case.writer(hit.sites[0])
    if writer:
        decision = case.decisions.get((hit.sites[0], "fprop"))
        now = decision.time_us if decision is not None else None
        time = Prediction(before=now, after=now, how=f"unchanged: the scales go into {writer}")
    else:
        time = Prediction(how="not told: the run does not say what writes its input, and scales go there or nowhere")
    behind = weights_behind(case, hit.sites[0])
    how = _DRAWN_BOTH.format("with its features smoothed")
    return of_transform(case, hit, lambda operands: smoothed(operands, behind(operands)), how, time)


def _rotating(case: Case, hit: Hit) -> Predictions:
    time = Prediction(how="not told: the rotation of its input was never timed")
    return of_transform(case, hit, rotated, _DRAWN_BOTH.format("with its features balanced and rotated"), time)


def _keeping_share_high(case: Case, hit: Hit) -> Predictions:
    return of_share(case, hit, _times(hit))


def _times(hit: Hit) -> float:
    """Return by what factor the error has to fall: rounded up, never to what is no factor."""
    return max(math.ceil(hit.value * 100) / 100, 1.01)


def _padding(case: Case, hit: Hit) -> Predictions:
    error, underflow = unchanged(case, hit.sites, "zeros are exact, and enter no scale")
    time = padded_time(case, hit.sites[0], ALIGNMENT)
    return Predictions(row_error=error, underflow=underflow, time_us=time, useless=_slower(time))


def _fusing(case: Case, hit: Hit) -> Predictions:
    how = "each row of a weight keeps a scale of its own: at most the error of the worst of them"
    error, underflow = unchanged(case, hit.sites, how, lambda recipe: recipe.operand("weight").group_rows == 1)
    time = fused_time(case, hit.sites)
    return Predictions(row_error=error, underflow=underflow, time_us=time, useless=_slower(time))


def _folding(case: Case, hit: Hit) -> Predictions:
    how = "not told: it changes the weight that is cast, and the database holds no weight"
    time = "not told: norms are not timed, only products are"
    return Predictions(row_error=Prediction(how=how), underflow=Prediction(how=how), time_us=Prediction(how=time))


def _slower(time: Prediction) -> str:
    if time.before is None or time.after is None or time.after < time.before:
        return ""
    return f"no gain: {time.before:.4g} us would be {time.after:.4g} us"


def _within_bound(case: Case) -> str:
    over = any(case.over_bound(product) for product in case.forward())
    return "" if over else "every forward product of a linear layer is within the bound, with every recipe measured"


def _some_within_bound(case: Case) -> str:
    products = [product for product in case.forward() if product.recipes]
    over = any(len(case.over_bound(product)) == len(product.recipes) for product in products)
    return "" if over else "no forward product of a linear layer is over the bound with every recipe measured"


def _only(mod: str, hit: Hit, found: Predictions, **options: Any) -> Line:
    """Write an equivalent mod for the places of a hit, to measure its gain under the recipe of the prediction."""
    recipe = {"recipe": found.row_error.recipe} if found.row_error.recipe else {}
    return Line(mod=mod, options={**options, **recipe, "only": list(hit.targets)})


def _one_module(case: Case, hit: Hit) -> str | tuple[str, ...]:
    """Return what a filter lets pass for one bias; attention has two biases, and takes both or none."""
    module = hit.targets[0].rpartition(".")[0]
    outside = case.layer(module).outside
    return (outside, module) if outside and outside == module.rpartition(".")[0] else module


def _without(case: Case, hit: Hit, found: Predictions) -> Line:
    """Write NoBias for one bias; where heads were seen, `keep` names those with a bias, and the mod need not look."""
    heads = case.heads()
    keep = [site for site in heads if case.has_bias(site) and BIAS_SLOTS.get(case.layer(site).runs) == "bias"]
    kept = {"keep": keep} if heads else {}
    return Line(mod="NoBias", options=kept, alone=hit.targets[0], passes=_one_module(case, hit))


def _fold(case: Case, hit: Hit, found: Predictions) -> Line:
    """Write FoldNorm for one norm; its filter passes the linears behind it as well."""
    return Line(mod="FoldNorm", alone=hit.targets[0], passes=(*hit.targets, *hit.sites))


def _part(case: Case, name: str) -> Trajectory:
    return next(each for each in case.trajectories if each.name == name)


# --- the table ---


_MORE_SAMPLES: Final[str] = (
    "distributions of inputs are learned from the third measurement of a product on: probe for longer, or more often "
    "(every=...), or with more overhead"
)
_NO_MODULES: Final[str] = (
    "the run saw none as a module; {} written as functions can be exchanged, too, but nothing is known of them"
)

RULES: Final[tuple[Rule, ...]] = (
    Rule(
        name="diverging_bias",
        mod="NoBias",
        kind="architectural",
        figure="growth of the L2 norm of a bias that does not settle",
        threshold=DIVERGED_BY,
        source="LoKA (arXiv 2605.10886): biases that never settle reach 0.1",
        lacks="no bias was seen on 8 sampled steps or more",
        detect=diverging_biases,
        predict=_without_bias,
        use=_without,
    ),
    Rule(
        name="mean_cancellation",
        mod="BlockNorm",
        kind="architectural",
        figure="growth of rounding errors by subtracting the mean, rms / standard deviation",
        threshold=2.0,
        source="arithmetic: a twice as large error is what a format with one mantissa bit less makes",
        lacks=_NO_MODULES.format("norms"),
        detect=cancelling_norms,
        predict=_without_mean,
        use=lambda case, hit, found: Line(mod="BlockNorm", first=256, options={"only": list(hit.targets)}),
    ),
    Rule(
        name="exponential_stretch",
        mod="HardSwish",
        kind="architectural",
        figure="share of the input of a Swish below -3",
        threshold=0.05,
        source="judgement: N(0, 1) has 0.1 % there; HardSwish is zero there, Swish tiny and never zero",
        lacks=_NO_MODULES.format("activations"),
        detect=stretched_swishes,
        predict=_without_exponential,
        use=lambda case, hit, found: Line(mod="HardSwish", options={"only": list(hit.targets)}),
    ),
    Rule(
        name="loud_rows",
        mod="KeepRowsHigh",
        kind="equivalent",
        figure="share of an input's energy in its loud rows",
        threshold=0.5,
        source="judgement: most of it; the first token of a language model was measured at 99.7 %",
        lacks=_MORE_SAMPLES,
        spared=_within_bound,
        detect=loud_rows,
        predict=_keeping_rows_high,
        use=lambda case, hit, found: _only("KeepRowsHigh", hit, found, columns=0),
    ),
    Rule(
        name="channel_outliers",
        mod="Smooth",
        kind="equivalent",
        figure="largest feature over the median feature of an input",
        threshold=20.0,
        source="LLM.int8() (arXiv 2208.07339): outlier features are up to 20 times the others",
        lacks=_MORE_SAMPLES,
        spared=_within_bound,
        detect=movable_outliers,
        predict=_smoothing,
        use=lambda case, hit, found: _only("Smooth", hit, found),
    ),
    Rule(
        name="channel_outliers_rotated",
        mod="Hadamard",
        kind="equivalent",
        figure="largest feature over the median feature of an input",
        threshold=20.0,
        source="LLM.int8() (arXiv 2208.07339): outlier features are up to 20 times the others",
        lacks=_MORE_SAMPLES,
        spared=_within_bound,
        detect=rotatable_outliers,
        predict=_rotating,
        use=lambda case, hit, found: _only("Hadamard", hit, found),
    ),
    # After those that look for a cause: what has none can only be paid for.
    Rule(
        name="no_outliers",
        mod="KeepShareHigh",
        kind="equivalent",
        figure="smallest error that a recipe was seen to have, over the bound",
        threshold=1.0,
        source="the bound",
        lacks="the bound is one on the loss, or an error has no finite limit yet: probe for longer",
        spared=_some_within_bound,
        detect=unexplained,
        predict=_keeping_share_high,
        use=lambda case, hit, found: _only("KeepShareHigh", hit, found, times=_times(hit)),
    ),
    Rule(
        name="misaligned",
        mod="PadToAlignment",
        kind="equivalent",
        figure=f"elements beyond a multiple of {ALIGNMENT} in k or n",
        threshold=1.0,
        source=f"FP8 GEMMs take k and n that are multiples of {ALIGNMENT}; others are padded at every call",
        lacks="no forward product of a linear layer was seen",
        detect=misaligned,
        predict=_padding,
        use=lambda case, hit, found: Line(mod="PadToAlignment", options={"only": list(hit.targets)}),
    ),
    Rule(
        name="parallel_linears",
        mod="FuseParallelLinears",
        kind="equivalent",
        figure="small linears that read one input",
        threshold=2.0,
        source=f"judgement: each of at most {SMALL_FLOPS / 1e9:.3g} GFLOP (2048 x 512 x 512), where casts cost most",
        lacks="the run saw no linear layer that shares its input with another of the same module",
        detect=parallel_linears,
        predict=_fusing,
        use=lambda case, hit, found: Line(mod="FuseParallelLinears", options={"only": list(hit.targets)}),
    ),
    # Last: it looks at what the others suggest.
    Rule(
        name="norm_scale",
        mod="FoldNorm",
        kind="equivalent",
        figure="suggestions that would drop the scale of a norm",
        threshold=1.0,
        source="folding alone gains nothing: only with a mod that it enables",
        lacks="no norm was seen whose output a linear reads",
        detect=scaled_norms,
        predict=_folding,
        use=_fold,
    ),
)
