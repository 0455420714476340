"""A comparison on a terminal and as JSON. Names come out of databases and plans: untrusted, so made printable."""

import json
import math
from collections.abc import Sequence
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loka.dispatch.deciding.decide import Decision
from loka.reports.diff import Key, PlanDiff, RunDiff
from loka.reports.fitting import keep_figures
from loka.reports.words import number, plain, plural

_SHOWN: Final[int] = 50
# Columns that fold where the terminal is narrow.
_NAMES: Final[tuple[str, ...]] = ("product", "first kernel", "second kernel")


def diff_text(found: RunDiff | PlanDiff) -> Group:
    """Render a comparison: one sentence, then what differs, at most 50 lines of each kind."""
    parts: list[RenderableType] = [Text(headline(found), style="bold")]
    parts += _table(
        "Environment", ("what", "first", "second"), [(one.name, one.first, one.second) for one in found.environment]
    )
    if isinstance(found, RunDiff):
        parts += _run_tables(found)
    else:
        rows = [row for pair in found.decisions for row in _rows(*pair)]
        header = ("product", "first kernel", "upper", "time us", "second kernel", "upper", "time us")
        parts += _table("Decisions", header, rows)
        handed = [(one.name, one.first or "nobody", one.second or "nobody") for one in found.chains]
        parts += _table("Frozen, FP8 goes", ("product", "first to", "second to"), handed)
        outside = [(one.name, one.first or "its own", one.second or "its own") for one in found.outsides]
        parts += _table("Multiplied in the forward of", ("product", "first", "second"), outside)
    only = [(_name(key), "first") for key in found.only_first] + [(_name(key), "second") for key in found.only_second]
    return Group(*parts, *_table("Only on one side", ("product", "in"), only))


def headline(found: RunDiff | PlanDiff) -> str:
    """Return the comparison as one sentence."""
    if isinstance(found, PlanDiff):
        what = f"{len(found.decisions):,} of {plural(found.compared, 'decision')} changed"
        what += f"; {plural(len(found.chains), 'chain')} changed" if found.chains else ""
        what += f"; {plural(len(found.outsides), 'product')} reached otherwise" if found.outsides else ""
    else:
        what = (
            f"{len(found.errors):,} of {plural(found.compared, 'error')} changed beyond noise at "
            f"{100.0 * found.bound.confidence:g} % confidence; {plural(len(found.verdicts), 'verdict')} changed"
        )
        if found.uncompared:
            what += f"; {found.uncompared:,} could not be compared for lack of evidence"
    only = len(found.only_first) + len(found.only_second)
    return f"{what}; {plural(only, 'product')} only on one side." if only else f"{what}."


def diff_json(found: RunDiff | PlanDiff) -> str:
    """Return the comparison as JSON; what is not a finite number is null."""
    document: dict[str, Any] = {
        "kind": "runs" if isinstance(found, RunDiff) else "plans",
        "changed": found.changed,
        "headline": headline(found),
        "first": found.first,
        "second": found.second,
        "compared": found.compared,
        "environment": [{"what": one.name, "first": one.first, "second": one.second} for one in found.environment],
        "only_first": [{"site": site, "pass": product} for site, product in found.only_first],
        "only_second": [{"site": site, "pass": product} for site, product in found.only_second],
    }
    if isinstance(found, RunDiff):
        document |= _run_json(found)
    else:
        document["decisions"] = [
            {"site": one.request.site, "pass": one.request.product, "first": _decided(one), "second": _decided(two)}
            for one, two in found.decisions
        ]
        for name, links in (("chains", found.chains), ("outsides", found.outsides)):
            document[name] = [
                {"site": one.name, "first": one.first or None, "second": one.second or None} for one in links
            ]
    return json.dumps(document, indent=2, allow_nan=False)


def _run_json(found: RunDiff) -> dict[str, Any]:
    return {
        "bound": str(found.bound),
        "uncompared": found.uncompared,
        "errors": [
            {
                "site": one.site,
                "pass": one.product,
                "recipe": one.recipe,
                "first": _finite(one.first),
                "second": _finite(one.second),
                "ratio": _finite(one.ratio),
                "low": _finite(one.low),
                "high": _finite(one.high),
            }
            for one in found.errors
        ],
        "verdicts": [
            {
                "site": one.site,
                "pass": one.product,
                "recipe": one.recipe,
                "first": one.first,
                "second": one.second,
                "upper_first": _finite(one.upper_first),
                "upper_second": _finite(one.upper_second),
                "beyond_noise": one.beyond_noise,
            }
            for one in found.verdicts
        ],
    }


def _run_tables(found: RunDiff) -> list[RenderableType]:
    errors = [
        (
            _name((one.site, one.product)),
            one.recipe,
            number(one.first),
            number(one.second),
            f"{one.ratio:.3g}x ({one.low:.3g} to {one.high:.3g})",
        )
        for one in found.errors
    ]
    verdicts = [
        (
            _name((one.site, one.product)),
            one.recipe,
            f"{one.first} ({number(_finite(one.upper_first))})",
            f"{one.second} ({number(_finite(one.upper_second))})",
            "yes" if one.beyond_noise else "no",
        )
        for one in found.verdicts
    ]
    return [
        *_table("Errors", ("product", "recipe", "first", "second", "ratio"), errors),
        *_table("Verdicts (upper)", ("product", "recipe", "first", "second", "error changed"), verdicts),
    ]


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[RenderableType]:
    if not rows:
        return []
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows[:_SHOWN]:
        table.add_row(*(Text(plain(cell)) for cell in row))
    more = len(rows) - _SHOWN
    tail = [Text(f"{plural(more, 'more line')}: in the JSON", style="dim")] if more > 0 else []
    return [Text(f"\n{title}", style="bold"), keep_figures(table, *(_NAMES if "product" in header else header)), *tail]


def _key(decision: Decision) -> Key:
    return decision.request.site, decision.request.product


def _name(key: Key) -> str:
    return f"{key[0] or '(root)'}.{key[1]}"


def _rows(one: Decision, two: Decision) -> list[tuple[str, ...]]:
    """Return a line for a decision that changed, and where either runs few rows and many apart, one for each range."""
    rows: list[tuple[str, ...]] = [(_name(_key(one)), *_told(one), *_told(two))]
    if one.ranges is None and two.ranges is None:
        return rows
    few = [each.ranges[0].m_max for each in (one, two) if each.ranges is not None]
    up_to = f"up to {' / '.join(map(str, dict.fromkeys(few)))} rows"
    for at, words in enumerate((up_to, "more rows")):
        sides = [each.ranges[at] if each.ranges is not None else each for each in (one, two)]
        rows.append((f"  {words}", *_told(sides[0]), *_told(sides[1])))
    return rows


def _told(decision: Decision) -> tuple[str, str, str]:
    return decision.kernel, number(decision.error_upper), number(decision.time_us, 4)


def _decided(decision: Decision) -> dict[str, Any]:
    return {
        "kernel": decision.kernel,
        "recipe": decision.recipe,
        "error_upper": _finite(decision.error_upper),
        "time_us": _finite(decision.time_us),
        "why": decision.why,
        **({} if decision.ranges is None else {"ranges": [_range(each) for each in decision.ranges]}),
    }


def _range(decision: Decision) -> dict[str, Any]:
    return {"m_min": decision.m_min, "m_max": decision.m_max, "share": decision.share, **_decided(decision)}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
