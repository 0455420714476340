"""`loka explain`: every candidate of one site, with its time, its error and why it won or lost."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from loka.bounds import Bound, Limit
from loka.dispatch.deciding.candidates import Candidate
from loka.dispatch.deciding.decide import Decision
from loka.dispatch.deciding.judged import LossCost
from loka.dispatch.deciding.plan import Plan
from loka.dispatch.measuring.profile import TimeAt
from loka.errors import EvidenceError, nearest
from loka.formats import Pass
from loka.reports.fitting import keep_figures
from loka.reports.words import small


def decisions_of(plan: Plan, site: str, product: Pass | None = None) -> tuple[Decision, ...]:
    """Return a plan's decisions on one site; raise EvidenceError naming the nearest sites."""
    found = [each for each in plan.decisions if each.request.site == site]
    if not found:
        sites = sorted({each.request.site for each in plan.decisions})
        known = nearest(site, sites) or f" The first: {', '.join(map(repr, sites[:3]))}."
        raise EvidenceError(f"The run has no site {site!r} among its {len(sites)}.{known}")
    chosen = tuple(each for each in found if product is None or each.request.product == product)
    if not chosen:
        seen = ", ".join(each.request.product for each in found)
        raise EvidenceError(f"{site} was not seen in {product}; the run saw {seen}. Probe a loop that runs that pass.")
    return chosen


# (site, pass) -> recipe -> row error in closed form.
Predictions = Mapping[tuple[str, Pass], Mapping[str, float]]


def explain_text(
    decisions: Sequence[Decision],
    predictions: Predictions | None = None,
    bound: Bound | None = None,
    dynamics: Sequence[str] = (),
) -> Group:
    """Render each decision: what was chosen, every candidate in a table, and why each of them lost.

    `bound`: what the plan was made under; says which bound judged the site. `dynamics`: lines on the training around
    the site (`reports.dynamics.dynamics_lines`), which end it.
    """
    parts = [part for decision in decisions for part in _decision(decision, predictions or {}, bound)]
    return Group(*parts, *(Text(line) for line in dynamics))


def _limit(decision: Decision, bound: Bound | None) -> Limit | None:
    return None if bound is None else bound.limit(decision.request.product, decision.request.site)


def _held(limit: Limit | None) -> str:
    if limit is None:
        return ""
    bias = f", and an error along the gradient <= {limit.bias:g}" if limit.bias is not None else ""
    own = f", a bound of its own ({limit.pattern!r})" if limit.pattern is not None else ""
    budget = ", a budget that all forward products share" if limit.metric == "loss" else ""
    return f"held to {limit}{bias}{own}{budget}"


def _decision(decision: Decision, predictions: Predictions, bound: Bound | None) -> list[RenderableType]:
    heading = Text(str(decision.request), style="bold")
    why = Text(f"{decision.kernel}: {decision.why}")
    reasons = [
        Padding(Text.assemble((candidate.kernel, "bold"), f": {candidate.reason}"), (0, 0, 0, 2))
        for candidate in decision.rejected
    ]
    expected = predictions.get((decision.request.site, decision.request.product), {})
    listed = ", ".join(f"{recipe} {_number(error)}" for recipe, error in expected.items())
    closed_form = [Text(f"row error in closed form, without measuring: {listed}")] if listed else []
    held = [Text(words)] if (words := _held(_limit(decision, bound))) else []
    by_rows: list[RenderableType] = [Text(_over(decision)), _by_rows(decision)] if decision.times else []
    source = Text(f"times: {decision.time_source}\n")
    ranges = [part for each in decision.ranges or () for part in _range(each)]
    return [heading, *held, why, _table(decision), *reasons, *by_rows, *closed_form, source, *ranges]


def _range(decision: Decision) -> list[RenderableType]:
    """Render the decision on some of the rows of a product: its candidates at these, and why each of them lost."""
    share = "" if decision.share is None else f", {decision.share:.0%} of the calls"
    request = decision.request
    heading = Text(f"{request.site}.{request.product} with {_rows(decision)}{share}", style="bold")
    return [heading, *_decision(decision, {}, None)[1:]]


def _rows(decision: Decision) -> str:
    return f"{decision.m_min} to {decision.m_max} rows" if decision.m_max > decision.m_min else f"{decision.m_max} rows"


def _over(decision: Decision) -> str:
    """Return which row counts the times are over, and how many of the calls each stands for."""
    shares = (
        f"{each.rows} for {f'{each.weight:.0%}' if each.weight >= 0.005 else '<1%'}" for each in decision.times or ()
    )
    return f"times are means over {decision.over}; of the calls, {', '.join(shares)}"


def _by_rows(decision: Decision) -> Table:
    """Return the times at each row count, the chosen kernel first."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("us, by rows", no_wrap=True)
    for each in decision.times or ():
        table.add_column(str(each.rows), justify="right", no_wrap=True)
    others = ((each.kernel, each.times) for each in decision.rejected)
    for kernel, times in ((decision.kernel, decision.times), *others):
        if times:
            table.add_row(escape(kernel), *(_number(each.time_us) for each in times))
    return keep_figures(table)


def _table(decision: Decision) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("kernel", no_wrap=True)
    has_loss = decision.loss is not None or any(each.loss is not None for each in decision.rejected)
    error = "relative error" if decision.gate == "relative_error" else "row error"
    for name in ("time us", error, "upper", *(["kl"] if has_loss else [])):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("outcome", no_wrap=True)
    loss = [_kl(decision.loss)] if has_loss else []
    table.add_row(
        *(decision.kernel, _number(decision.time_us), "", _number(decision.error_upper)),
        *loss,
        "[bold green]chosen[/]",
    )
    for candidate in decision.rejected:
        table.add_row(
            escape(candidate.kernel),
            _number(candidate.time_us),
            _number(candidate.error_mean),
            _number(candidate.error_upper),
            *([_kl(candidate.loss)] if has_loss else []),
            candidate.code or "admissible",
        )
    return keep_figures(table)


def explain_json(
    decisions: Sequence[Decision], predictions: Predictions | None = None, bound: Bound | None = None
) -> str:
    """Return the same as JSON: one object per decision, `rejected` with code and reason."""
    predictions = predictions or {}
    return json.dumps([_plain(decision, predictions, bound) for decision in decisions], indent=2, allow_nan=False)


def _plain(decision: Decision, predictions: Predictions, bound: Bound | None) -> dict[str, Any]:
    request, limit = decision.request, _limit(decision, bound)
    return {
        "site": request.site,
        "pass": request.product,
        "op": request.op,
        "m": request.m,
        "n": request.n,
        "k": request.k,
        "dtype": request.dtype,
        "chosen": decision.kernel,
        "recipe": decision.recipe,
        "why": decision.why,
        "time_us": decision.time_us,
        "baseline": decision.baseline,
        "baseline_time_us": decision.baseline_time_us,
        "time_source": decision.time_source,
        "error_upper": decision.error_upper,
        "gate": decision.gate,
        "bound": None if limit is None else asdict(limit),
        "horizon": decision.horizon,
        "loss": _loss(decision.loss),
        "closed_form": dict(predictions.get((request.site, request.product), {})),
        **({"over": decision.over} if decision.over is not None else {}),
        **_times(decision.times),
        "rejected": [_candidate(candidate) for candidate in decision.rejected],
        **({"share": decision.share} if decision.share is not None else {}),
        **_ranges(decision, bound),
    }


def _ranges(decision: Decision, bound: Bound | None) -> dict[str, Any]:
    """Return the decisions on few rows and on many; nothing where there is one on all."""
    if decision.ranges is None:
        return {}
    rows = ({"m_min": each.m_min, "m_max": each.m_max} for each in decision.ranges)
    return {"ranges": [{**_plain(each, {}, bound), **ends} for each, ends in zip(decision.ranges, rows, strict=True)]}


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {
        "kernel": candidate.kernel,
        "recipe": candidate.recipe,
        "code": candidate.code,
        "reason": candidate.reason,
        "time_us": candidate.time_us,
        "spread_us": candidate.spread_us,
        "error_mean": candidate.error_mean,
        "error_upper": candidate.error_upper,
        "loss": _loss(candidate.loss),
        **_times(candidate.times),
    }


def _times(times: tuple[TimeAt, ...] | None) -> dict[str, Any]:
    """Return the time at each row count; nothing for a product of one shape."""
    return {} if times is None else {"times": [asdict(each) for each in times]}


def _loss(loss: LossCost | None) -> dict[str, float | None] | None:
    return None if loss is None else asdict(loss)


def _kl(loss: LossCost | None) -> str:
    return "" if loss is None else small(loss.kl)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
