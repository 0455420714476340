"""What a mod would do to the forward product of a site, computed on operands drawn from what the probe has learned.

The input is drawn from its copula, the weight as normal numbers of the measured energy and largest element of each of
its columns: the database holds no weight. An equivalent mod leaves the result as it is, so the ratio of the errors on
the same draw, after over before, is that of the true ones up to how well the draw stands for them; it is applied to the
measured error. All draws are seeded by the name of the site: the same run gives the same advice.
"""

import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from torch import Tensor

from loka.accumulation import reduced_product
from loka.amax import finite_amax
from loka.formats import PASS_OPERANDS, RECIPES, OperandSpec, Recipe
from loka.mods.keep_share import columns_to_keep
from loka.mods.smooth import Smooth, scales
from loka.numerics import gate_for, product_errors
from loka.probes.distributions.closed_form import ProductStatistics
from loka.probes.distributions.extremes import Extremes
from loka.probes.distributions.histograms import AMAX_BIN, BELOW, BINS_PER_OCTAVE, OperandHistograms
from loka.probes.distributions.learned import OperandDistribution
from loka.probes.judging.evidence import ProductEvidence, RecipeEvidence
from loka.probes.sampling.learning import EXTREMES, STATISTICS
from loka.quantize import fake_quantize
from loka.reports.advise.advice import Hit, Prediction, Predictions
from loka.reports.advise.case import Case

# Rows of the input and of the weight that are drawn; fewer where they are wide.
_ROWS: Final[int] = 256
_COLUMNS: Final[int] = 512
_FEWEST: Final[int] = 128  # a block of a weight
_ELEMENTS: Final[int] = 1 << 21
# What the error of a recipe must fall by to be called a gain: drawn errors are within some 5 % (DESIGN, section 10).
GAIN: Final[float] = 0.95

_ALPHA: Final[float] = Smooth().alpha or 0.5


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Drawn:
    """Operands of a forward product: x [rows, K], w [columns, K], and the largest elements of the real ones."""

    x: Tensor
    w: Tensor
    x_amax: float
    w_amax: float
    x_columns: Tensor  # [K]: largest |x| seen of every feature
    w_columns: Tensor  # [K]


def drawn(case: Case, site: str) -> Drawn | None:
    """Draw the operands of a site, once per advice; None where too little was learned of them."""
    key = f"drawn {site}"
    if key not in case.scratch:
        case.scratch[key] = _draw(case, site)
    found: Drawn | None = case.scratch[key]
    return found


def _draw(case: Case, site: str) -> Drawn | None:
    x = case.learned(site, "input")
    extremes, statistics = case.learned(site, EXTREMES), case.learned(site, STATISTICS)
    known = (x, OperandDistribution), (extremes, Extremes), (statistics, ProductStatistics)
    if not all(isinstance(value, kind) for value, kind in known) or not x.count or not extremes.weight_rows:
        return None
    if x.features != len(extremes.weight_amax):
        return None
    generator = torch.Generator().manual_seed(zlib.crc32(site.encode()))
    limit = max(_ELEMENTS // max(x.features, 1), _FEWEST)
    rows = x.sample(min(_ROWS, limit), generator)
    columns = torch.from_numpy(extremes.weight_amax.copy())
    spread = torch.from_numpy(extremes.weight_energy / extremes.weight_rows).sqrt().float()
    count = min(extremes.weight_rows, _COLUMNS, limit)
    weight = rows.new_empty(count, x.features).normal_(generator=generator).mul_(spread).clamp_(-columns, columns)
    return Drawn(
        x=rows,
        w=weight,
        x_amax=statistics.amax[0],
        w_amax=statistics.amax[1],
        x_columns=feature_amax(x),
        w_columns=columns,
    )


def feature_amax(distribution: OperandDistribution) -> Tensor:
    """Return the largest |x| seen of every feature [K]: the ends of its quantile grid."""
    grid = distribution.quantiles.grid()
    return torch.maximum(grid[0].abs(), grid[-1].abs())


@dataclass(frozen=True, slots=True)
class _Damage:
    error: float
    underflow: float


def damage(operands: Drawn, recipes: Iterable[Recipe], columns: int) -> dict[str, _Damage]:
    """Return what recipes do to drawn operands: the gated error of a product with `columns` columns, and underflow."""
    with torch.autocast("cpu", enabled=False):
        reference, result = operands.x @ operands.w.T, {}
        some = int(torch.count_nonzero(operands.x))
        for recipe in recipes:
            specs = [recipe.operand(role) for role in PASS_OPERANDS["fprop"]]
            x = fake_quantize(operands.x, specs[0], _amax(operands.x, specs[0], operands.x_amax))
            w = fake_quantize(operands.w, specs[1], _amax(operands.w, specs[1], operands.w_amax))
            product = x @ w.T if recipe.accumulation == "fp32" else reduced_product(x, w)
            error = product_errors(product.unsqueeze(0), reference)[0].gated(gate_for(columns))
            lost = 1.0 - int(torch.count_nonzero(x)) / some if some else 0.0
            result[recipe.name] = _Damage(error, lost)
    return result


def _amax(x: Tensor, spec: OperandSpec, known: float) -> Tensor | None:
    return finite_amax(x, (0, 1)).clamp_min(known) if spec.per_tensor else None


# --- the transforms, as the mods make them ---


def smoothed(operands: Drawn, behind: Tensor) -> Drawn:
    """Move the scale of features into the weight, as `loka.mods.Smooth` does by default.

    behind: [K], the largest |w| of every feature in all the weights that the scale moves into.
    """
    scale = scales(operands.x_columns, behind, _ALPHA, power_of_two=True)
    x_columns, w_columns = operands.x_columns / scale, operands.w_columns * scale
    return replace(
        operands,
        x=operands.x / scale,
        w=operands.w * scale,
        x_amax=float(x_columns.max()),
        w_amax=float(w_columns.max()),
        x_columns=x_columns,
        w_columns=w_columns,
    )


def weights_behind(case: Case, site: str) -> Callable[[Drawn], Tensor]:
    """Return what gives the largest |w| [K] of all that read what a site reads: a scale is chosen for them together."""

    def of(operands: Drawn) -> Tensor:
        columns = operands.w_columns
        for other in case.together(site):
            known = case.learned(other, EXTREMES)
            if isinstance(known, Extremes) and len(known.weight_amax) == len(columns):
                columns = torch.maximum(columns, torch.from_numpy(known.weight_amax.copy()))
        return columns

    return of


def rotated(operands: Drawn) -> Drawn:
    """Balance and mix the features of both operands, as `loka.mods.Hadamard` does by default."""
    from loka.mods.rotation import Mixing, Rotation, channel_scale  # brings all mods, and few runs call for this one

    energy = operands.x.square().mean(0)
    rotation = Rotation(Mixing(operands.x.shape[1]), scale=channel_scale(energy, operands.w))
    x, w = rotation(operands.x).float(), rotation.of_weight(operands.w).float()
    x_columns, w_columns = x.abs().amax(0), w.abs().amax(0)
    return replace(
        operands,
        x=x,
        w=w,
        x_amax=float(x_columns.max()),
        w_amax=float(w_columns.max()),
        x_columns=x_columns,
        w_columns=w_columns,
    )


def without_loud_rows(operands: Drawn, quiet_amax: float) -> Drawn:
    """Leave out what is larger than the largest element of all but the loud rows."""
    return replace(operands, x=operands.x.clamp(-quiet_amax, quiet_amax), x_amax=quiet_amax)


def _with_smaller_amax(operand: OperandHistograms, factor: float) -> OperandHistograms:
    """Return histograms as they are when the amax of the whole operand is so many times smaller.

    What lies above it then, the loud rows themselves, counts as exact; so few rows weigh next to nothing.
    """
    bins = min(round(BINS_PER_OCTAVE * math.log2(factor)), BELOW - 1)
    whole = operand.by_group[None, None]
    energy = np.zeros_like(whole.energy)
    energy[AMAX_BIN] = whole.energy[: 1 + bins].sum()
    energy[1 : BELOW - bins] = whole.energy[1 + bins : BELOW]
    energy[BELOW] = whole.energy[BELOW]
    return replace(operand, by_group={**operand.by_group, (None, None): replace(whole, energy=energy)})


# --- predictions ---


def of_transform(case: Case, hit: Hit, transform: Callable[[Drawn], Drawn], how: str, time: Prediction) -> Predictions:
    """Predict what a transform of both operands does to the recipes that the bound keeps a site from."""
    product = case.product(hit.sites[0])
    operands = drawn(case, hit.sites[0])
    if product is None or operands is None:
        nothing = Prediction(how="not told: too little was learned of its operands; sample more steps")
        return Predictions(row_error=nothing, underflow=nothing, time_us=time)
    wanted = {each.recipe: each for each in case.over_bound(product) if each.recipe in RECIPES}
    recipes = [RECIPES[name] for name in wanted]
    before = damage(operands, recipes, product.n)
    after = damage(transform(operands), recipes, product.n)
    ratios = {name: after[name].error / before[name].error for name in wanted if before[name].error > 0}
    if not ratios:
        nothing = Prediction(how="not told: the error of the drawn product is zero")
        return Predictions(row_error=nothing, underflow=nothing, time_us=time)
    best = min(ratios, key=lambda name: wanted[name].error.mean * ratios[name])
    measured = wanted[best].error.mean
    predicted = measured * ratios[best]
    useless = "" if ratios[best] <= GAIN else f"no gain: {best} {measured:.3g} would be {predicted:.3g}"
    return Predictions(
        row_error=Prediction(before=measured, after=predicted, recipe=best, how=how),
        underflow=_underflow(product, best, before[best].underflow, after[best].underflow),
        time_us=time,
        useless=useless,
    )


def of_loud_rows(case: Case, hit: Hit, time: Prediction) -> Predictions:
    """Predict what keeping the loud rows high does to the others: in closed form, with the amax of the others.

    Only a scale for the whole input feels it. A draw has no loud rows, only loud elements, and would not do.
    """
    site = hit.sites[0]
    product, extremes, statistics = case.product(site), case.learned(site, EXTREMES), case.learned(site, STATISTICS)
    operands = drawn(case, site)
    over = () if product is None else case.over_bound(product)
    named = [each for each in over if each.recipe in RECIPES and RECIPES[each.recipe].operand("input").per_tensor]
    wanted = next((each for each in named if RECIPES[each.recipe].has_closed_form), None)
    known = operands is not None and extremes.loud_amax > extremes.quiet_amax > 0 and bool(statistics.a.rows)
    if product is None or operands is None or wanted is None or not known:
        nothing = Prediction(how="not told: no recipe with one scale for the whole input is over the bound, or learned")
        useless = "" if wanted is not None else "no gain: the recipes over the bound give every row a scale of its own"
        return Predictions(row_error=nothing, underflow=nothing, time_us=time, useless=useless)
    recipe = RECIPES[wanted.recipe]
    quiet = replace(statistics, a=_with_smaller_amax(statistics.a, extremes.loud_amax / extremes.quiet_amax))
    now = statistics.row_error(recipe)
    ratio = quiet.row_error(recipe) / now if now > 0 else 1.0
    both = operands, without_loud_rows(operands, extremes.quiet_amax)
    before, after = (damage(each, [recipe], product.n)[recipe.name].underflow for each in both)
    how = "closed form with the largest element of the other rows, over that as it is; times the measured error"
    predicted = wanted.error.mean * ratio
    return Predictions(
        row_error=Prediction(before=wanted.error.mean, after=predicted, recipe=recipe.name, how=how),
        underflow=_underflow(product, recipe.name, before, after),
        time_us=time,
        useless="" if ratio <= GAIN else f"no gain: {recipe.name} {wanted.error.mean:.3g} would be {predicted:.3g}",
    )


def of_share(case: Case, hit: Hit, times: float) -> Predictions:
    """Predict what keeping columns in high precision takes, for an error so many times lower: nothing is drawn.

    Rounding errors add up as the energies of the terms do, E[x_k^2] |w_k|^2: what is left of their sum without the
    columns that are kept is left of the squared error. Rows that the mod multiplies again can only make it cheaper.
    """
    site = hit.sites[0]
    product, x, extremes = case.product(site), case.learned(site, "input"), case.learned(site, EXTREMES)
    underflow = Prediction(how="not told: the columns that stay in FP8 were not counted apart")
    over = [] if product is None else [each for each in case.over_bound(product) if each.recipe in RECIPES]
    known = isinstance(x, OperandDistribution) and isinstance(extremes, Extremes) and x.count
    if product is None or not over or not known or x.features != len(extremes.weight_energy):
        nothing = Prediction(how="not told: too little was learned of its operands; sample more steps")
        return Predictions(row_error=nothing, underflow=underflow, time_us=nothing)
    limit = case.bound.limit("fprop", product.site)
    best = min(over, key=lambda recipe: recipe.gated(limit).error.upper_tolerance)
    terms = (x.raw.mean.square() + x.raw.variance) * torch.from_numpy(extremes.weight_energy.copy())
    columns, left = columns_to_keep(terms, times)
    high = columns / x.features
    work = f"{high:.0%} of its work in high precision and {1 - high:.0%} in FP8"
    how = f"measured, times the root of the energy that {columns} columns, kept, leave to the others"
    if limit.metric == "row_error" and left > 0:
        apart = f"{site}.rest=row_error={limit.most / math.sqrt(left):.3g}"
        how += f". A run after that judges {site}.rest by its own, smaller result: --bound-for '{apart}' is as strict"
    return Predictions(
        row_error=Prediction(
            before=best.error.mean, after=best.error.mean * math.sqrt(left), recipe=best.recipe, how=how
        ),
        underflow=underflow,
        time_us=Prediction(how=f"not told: {work}, which was never timed"),
        useless="" if (1 + high) / 2 <= GAIN else f"no gain: that takes {work}, no cheaper than all in high precision",
    )


def _underflow(product: ProductEvidence, recipe: str, before: float, after: float) -> Prediction:
    """Return the underflow of the input: the measured share and, by the same draw, what becomes of it."""
    known = product.operands["input"].underflow.get(recipe) if "input" in product.operands else None
    how = "the share of the drawn input that a cast turns into zero"
    if known is None or not math.isfinite(known):
        return Prediction(before=before, after=after, recipe=recipe, how=how)
    return Prediction(before=known, after=known * after / before if before > 0 else after, recipe=recipe, how=how)


def unchanged(
    case: Case, sites: Iterable[str], how: str, holds: Callable[[Recipe], bool] = lambda recipe: True
) -> tuple[Prediction, Prediction]:
    """Return error and underflow that stay as they were measured: those of the worst of some sites' best recipes.

    `holds` says of which recipes that is true.
    """
    found: dict[str, RecipeEvidence] = {}
    for site in sites:
        product = case.product(site)
        recipes = [
            each
            for each in (product.recipes if product else ())
            if each.recipe in RECIPES and holds(RECIPES[each.recipe]) and math.isfinite(each.error.mean)
        ]
        if recipes:
            found[site] = min(recipes, key=lambda each: each.error.mean)
    if not found:
        nothing = Prediction(how=f"{how}; it was never measured")
        return nothing, nothing
    worst = max(found, key=lambda site: found[site].error.mean)
    recipe = found[worst]
    error = Prediction(before=recipe.error.mean, after=recipe.error.mean, recipe=recipe.recipe, how=how)
    product = case.product(worst)
    operand = product.operands.get("input") if product else None
    share = operand.underflow.get(recipe.recipe) if operand else None
    return error, Prediction(before=share, after=share, recipe=recipe.recipe, how=how)
