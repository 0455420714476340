"""`loka diff`: what differs between two probed runs, or two plans, and whether it is more than noise.

Errors are compared as the ratio of their geometric means over the steps that are evidence, with the interval of Welch's
t on their logarithms, at a confidence shared by all ratios (Bonferroni). An error changed when its interval leaves out
1. A verdict can change without that: the bound then lies close, and the report of either run says how close. Under a
bound on the loss, a verdict on fprop is that of its cost in loss, alone against the budget; what is compared as a ratio
stays the error.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loka.bounds import Bound
from loka.dispatch.deciding.by_rows import kernel_for
from loka.dispatch.deciding.decide import Decision
from loka.dispatch.deciding.plan import Plan
from loka.dispatch.deciding.planner import check_loss
from loka.document import SQLITE_HEADER
from loka.errors import ArgumentError
from loka.formats import Pass
from loka.probes.judging.evidence import (
    MIN_SAMPLES,
    ProductEvidence,
    RecipeEvidence,
    RunEvidence,
    Verdict,
    load_evidence,
)
from loka.probes.storing.same_model import check_same_model, model_differences

Key = tuple[str, Pass]

_INSTEAD: Final[str] = "Compare two of the same model, or only the sites that both have with --common."
# Logarithms closer than this differ by rounding alone.
_ROUNDING: Final[float] = 1e-9
_LONGEST_TEXT: Final[int] = 64  # bytes of white space that may precede a plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One fact that is not the same on both sides, e.g. the device."""

    name: str
    first: str
    second: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorChange:
    """One error that changed. `ratio` is second over first, with its interval."""

    site: str
    product: Pass
    recipe: str
    first: float  # mean over steps
    second: float
    ratio: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class VerdictChange:
    """One recipe that is judged otherwise."""

    site: str
    product: Pass
    recipe: str
    first: Verdict
    second: Verdict
    upper_first: float  # what the verdict compares with the bound
    upper_second: float
    beyond_noise: bool  # whether the error itself changed


@dataclass(frozen=True, kw_only=True, slots=True)
class RunDiff:
    """What differs between two runs. `compared` errors have a ratio; `uncompared` lack evidence on either side."""

    first: str  # run ids
    second: str
    bound: Bound
    environment: tuple[Difference, ...]
    only_first: tuple[Key, ...]
    only_second: tuple[Key, ...]
    errors: tuple[ErrorChange, ...]  # the largest change first
    verdicts: tuple[VerdictChange, ...]
    compared: int
    uncompared: int

    @property
    def changed(self) -> bool:
        """Whether an error, a verdict or the set of products differs; the environment alone is no change."""
        return bool(self.errors or self.verdicts or self.only_first or self.only_second)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanDiff:
    """What differs between two plans; `decisions` pairs those with another kernel or recipe."""

    first: str  # hashes
    second: str
    environment: tuple[Difference, ...]
    only_first: tuple[Key, ...]
    only_second: tuple[Key, ...]
    decisions: tuple[tuple[Decision, Decision], ...]
    compared: int
    chains: tuple[Difference, ...] = ()  # sites that hand FP8 on to another one, or to none
    outsides: tuple[Difference, ...] = ()  # sites whose weight another module multiplies with, or their own

    @property
    def changed(self) -> bool:
        """Whether a decision, a way to a product or the set of products differs; the environment alone is no change."""
        return bool(self.decisions or self.chains or self.outsides or self.only_first or self.only_second)


def diff(
    first: str,
    second: str,
    bound: Bound,
    *,
    runs: tuple[str | None, str | None] = (None, None),
    common: bool = False,
) -> RunDiff | PlanDiff:
    """Compare two probe databases (path or URL; `runs` picks one of each) or two plans.

    Raises ArgumentError for one of each kind or a file that is neither, EvidenceError for different models unless
    `common`, and what opening them raises.
    """
    kinds = [_is_plan(first), _is_plan(second)]
    if kinds == [True, True]:
        if any(runs):
            raise ArgumentError("--run-a and --run-b choose a run of a probe database; a plan holds none. Leave them.")
        return diff_plans(Plan.load(first), Plan.load(second), common=common)
    if any(kinds):
        plan, database = (first, second) if kinds[0] else (second, first)
        raise ArgumentError(
            f"{plan} is a plan and {database} is not: loka diff compares two probe databases or two plans. "
            "Give two of a kind."
        )
    evidence = [
        load_evidence(db, run, confidence=bound.confidence) for db, run in zip((first, second), runs, strict=True)
    ]
    return diff_runs(evidence[0], evidence[1], bound, common=common)


def diff_runs(first: RunEvidence, second: RunEvidence, bound: Bound, *, common: bool = False) -> RunDiff:
    """Compare two runs of one model; with `common`, the sites that two models share. Raises EvidenceError."""
    for evidence in (first, second):
        check_loss(evidence, bound)
    if not common:
        check_same_model(first.info.fingerprint, second.info.fingerprint, instead=_INSTEAD)
    mine, others = _by_key(first.products), _by_key(second.products)
    shared = [key for key in mine if key in others]
    pairs = [
        (key, one, two)
        for key in shared
        for one in mine[key].recipes
        for two in others[key].recipes
        if one.recipe == two.recipe
    ]
    comparable = [pair for pair in pairs if _comparable(pair[1], pair[2])]
    alpha = (1.0 - bound.confidence) / max(len(comparable), 1)
    ratios = {(key, one.recipe): _change(key, one, two, alpha) for key, one, two in comparable}
    changes = [change for change in ratios.values() if not change.low <= 1.0 <= change.high]
    beyond = {((change.site, change.product), change.recipe) for change in changes}
    verdicts = [
        VerdictChange(
            site=key[0],
            product=key[1],
            recipe=one.recipe,
            first=one.judge(limit),
            second=two.judge(limit),
            upper_first=one.upper(limit),
            upper_second=two.upper(limit),
            beyond_noise=(key, one.recipe) in beyond,
        )
        for key, one, two in pairs
        if one.judge(limit := bound.limit(key[1], key[0])) != two.judge(limit)
    ]
    return RunDiff(
        first=first.info.id,
        second=second.info.id,
        bound=bound,
        environment=_run_environment(first, second, shared),
        only_first=() if common else tuple(key for key in mine if key not in others),
        only_second=() if common else tuple(key for key in others if key not in mine),
        errors=tuple(sorted(changes, key=lambda change: -abs(math.log(change.ratio)))),
        verdicts=tuple(verdicts),
        compared=len(comparable),
        uncompared=len(pairs) - len(comparable),
    )


def diff_plans(first: Plan, second: Plan, *, common: bool = False) -> PlanDiff:
    """Compare two plans for one model; with `common`, the sites that two models share. Raises EvidenceError."""
    if not common:
        check_same_model(first.fingerprint, second.fingerprint, instead=_INSTEAD)
    mine, others = ({(d.request.site, d.request.product): d for d in plan.decisions} for plan in (first, second))
    shared = [key for key in mine if key in others]
    common_sites = {site for site, _ in shared} if common else None
    names = dict.fromkeys((*first.environment, *second.environment))
    facts = [(name, first.environment.get(name, ""), second.environment.get(name, "")) for name in names]
    facts += [("model", first.model, second.model), ("bound", str(first.bound), str(second.bound))]
    return PlanDiff(
        first=first.hash,
        second=second.hash,
        environment=_differing(facts),
        only_first=() if common else tuple(key for key in mine if key not in others),
        only_second=() if common else tuple(key for key in others if key not in mine),
        decisions=tuple((mine[key], others[key]) for key in shared if _decided_otherwise(mine[key], others[key])),
        compared=len(shared),
        chains=_links(first.chains, second.chains, common_sites),
        outsides=_links(first.outsides, second.outsides, common_sites),
    )


def _links(first: Mapping[str, str], second: Mapping[str, str], among: Set[str] | None) -> tuple[Difference, ...]:
    """Return the sites that two plans link to something else, or only one of them to anything; `among`: of these."""
    sites = [site for site in dict.fromkeys((*first, *second)) if among is None or site in among]
    return _differing((site, first.get(site, ""), second.get(site, "")) for site in sites)


def _decided_otherwise(one: Decision, two: Decision) -> bool:
    """Whether two plans run a product differently: where few rows and many are apart, at a row count that was timed.

    Where between those the boundary lies is a matter of times, which differ from one measurement to the next.
    """
    if one.recipe != two.recipe or (one.ranges is None and two.ranges is None):
        return (one.kernel, one.recipe) != (two.kernel, two.recipe)
    seen = {each.rows for decision in (one, two) for each in decision.times or ()}
    seen |= {part.request.m for decision in (one, two) for part in decision.parts}
    return any(kernel_for(one.kernel, (rows,)) != kernel_for(two.kernel, (rows,)) for rows in seen)


def _is_plan(name: str) -> bool:
    """Return whether a name is a plan file rather than a database; raise ArgumentError for text that is neither."""
    path = Path(os.path.expanduser(name))
    if "://" in name or not path.is_file():
        return False  # opening it as a database says what is wrong with it
    try:
        with path.open("rb") as stream:
            start = stream.read(_LONGEST_TEXT)
    except OSError as error:
        raise ArgumentError(f"{name} could not be read: {error.strerror}. Check its permissions.") from error
    if start.startswith(SQLITE_HEADER):
        return False
    if start.lstrip().startswith(b"{"):
        return True
    raise ArgumentError(
        f"{name} is neither a probe database nor a plan, which is what loka diff compares. `loka.probe(model, db=...)` "
        "writes the one, `loka plan` the other."
    )


def _by_key(products: Sequence[ProductEvidence]) -> Mapping[Key, ProductEvidence]:
    return {(product.site, product.product): product for product in products}


def _comparable(one: RecipeEvidence, two: RecipeEvidence) -> bool:
    enough = min(one.samples, two.samples) >= MIN_SAMPLES and one.gate == two.gate
    return enough and math.isfinite(one.log_mean) and math.isfinite(two.log_mean)


def _change(key: Key, one: RecipeEvidence, two: RecipeEvidence, alpha: float) -> ErrorChange:
    """Return the ratio of two errors with Welch's interval at level 1 - alpha."""
    ratio = two.log_mean - one.log_mean
    half = max(_welch(one, two, alpha), _ROUNDING)
    return ErrorChange(
        site=key[0],
        product=key[1],
        recipe=one.recipe,
        first=one.error.mean,
        second=two.error.mean,
        ratio=_exp(ratio),
        low=_exp(ratio - half),
        high=_exp(ratio + half),
    )


def _exp(value: float) -> float:
    return math.exp(value) if value < 709.0 else math.inf


def _welch(one: RecipeEvidence, two: RecipeEvidence, alpha: float) -> float:
    """Return the half-width of the interval for the difference of two means of logarithms."""
    from scipy import special

    parts = [(each.log_deviation**2 / each.samples, each.samples - 1) for each in (one, two)]
    variance = sum(part for part, _ in parts)
    shares = sum(part**2 / freedom for part, freedom in parts)
    if not shares > 0.0:  # both constant
        return 0.0
    return -float(special.stdtrit(variance**2 / shares, alpha / 2)) * math.sqrt(variance)


def _run_environment(first: RunEvidence, second: RunEvidence, shared: Sequence[Key]) -> tuple[Difference, ...]:
    """Return what differs around the two runs: machine, versions, model, and the shapes of the products they share."""
    facts = [(name, of(first), of(second)) for name, of in _FACTS.items()]
    if differences := model_differences(first.info.fingerprint, second.info.fingerprint):
        sizes = [f"{len(run.info.fingerprint):,}" for run in (first, second)]
        facts.append(("parameters", sizes[0], f"{sizes[1]}: {differences[0]}"))
    mine, others = _by_key(first.products), _by_key(second.products)
    facts += [(f"shape of {key[0]}.{key[1]}", _shape(mine[key]), _shape(others[key])) for key in shared]
    return _differing(facts)


_FACTS: Final[Mapping[str, Callable[[RunEvidence], str]]] = {
    "device": lambda run: run.info.environment.device,
    "torch": lambda run: run.info.environment.torch,
    "python": lambda run: run.info.environment.python,
    "loka": lambda run: run.info.environment.loka,
    "model": lambda run: run.info.model,
    "world size": lambda run: f"{run.info.world_size}",
    "weights": lambda run: "trained" if run.progress.weights_changed else "frozen",
    "recipes": lambda run: ", ".join(run.info.recipes),
}


def _shape(product: ProductEvidence) -> str:
    return f"{product.batch} x {product.m} x {product.k} x {product.n} {product.dtype}"


def _differing(facts: Iterable[tuple[str, str, str]]) -> tuple[Difference, ...]:
    return tuple(Difference(name=name, first=one, second=two) for name, one, two in facts if one != two)
