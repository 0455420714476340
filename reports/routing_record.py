"""What is known of a routing trace, as plain data and as tables: the one source of every form of the report.

`routing_report` returns JSON-able data, schema 1:

    {"schema": 1, "kind": "routing",
     "trace": {"model", "requests", "domains": {domain: requests}, "layers", "experts", "top_k", "hidden_size",
               "tokens": {"prefill", "decode"}},                    # times an expert was given a token
     "headline", "notes": [...],
     "summary": {"layers",                                          # that are not degenerate: all means are over these
                 "max_over_mean", "gini", "cv",                     # medians over layers
                 "total_variation", "total_variation_by_chance",    # means over layers and pairs of domains, or null
                 "pearson", "spearman",                             # prefill -> decode of single requests, means
                 "domain_pearson", "domain_spearman",               # of the sums of a domain's requests, means
                 "pearson_all_layers"},                             # degenerate layers included
     "degenerate_layers": [layer],
     "loads": [{"layer", "domain": null = all, "tokens", "max_over_mean", "gini", "cv", "busiest", "top_share",
                "unused": [expert], "degenerate"}],
     "shifts": [{"layer", "domains": [a, b], "total_variation", "by_chance", "n": [a, b]}],
     "correlations": [{"layer", "domain": null = mean of single requests, "pearson", "spearman", "n"}],
     "classification": {"domains", "requests", "splits", "chance", "accuracy", "deviation", "mean_layer",
                        "layer_deviation", "layers": [{"layer", "accuracy", "deviation"}], "left_out"} | null,
     "coactivation": {"within": [{"layers": [a, a], "dependence", "top_tenth",
                                  "pairs": [[expert, expert, share, times]]}],
                      "between": [the same, layers [a, b]]},
     "refused": {"shifts" | "classification": why there is none, in words}}

Numbers that do not exist, for want of tokens, are null. The measures are defined in `loka.probes.routing.statistics`.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, TypeVar

from loka.errors import EvidenceError
from loka.probes.routing.classify import guess_domain
from loka.probes.routing.statistics import (
    DEGENERATE,
    MOST_REQUESTS,
    coactivations,
    domain_shifts,
    layer_loads,
    phase_correlations,
)
from loka.probes.routing.trace import PHASES, RoutingTrace
from loka.reports.words import number, percent, plain

SCHEMA: Final[int] = 1

_SHOWN: Final[int] = 20  # rows of a table of pairs

RoutingReport = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingTable:
    """One table of the report; the first column is text, the others are numbers."""

    title: str
    legend: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def routing_report(trace: RoutingTrace) -> RoutingReport:
    """Return what is known of a trace. Raises EvidenceError when no token is in it."""
    loads = layer_loads(trace)
    if not any(load.tokens for load in loads):
        raise EvidenceError("The routing trace counts no token, so nothing can be said of it. Record requests.")
    refused: dict[str, str] = {}
    shifts = _or_why(refused, "shifts", lambda: domain_shifts(trace)) or ()
    guess = _or_why(refused, "classification", lambda: guess_domain(trace))
    tokens = {name: int(trace.counts[:, at].sum()) for at, name in enumerate(PHASES)}
    report: RoutingReport = {
        "schema": SCHEMA,
        "kind": "routing",
        "trace": {
            "model": trace.model,
            "requests": trace.requests,
            "domains": {domain: trace.domain.count(domain) for domain in trace.domains},
            "layers": list(trace.layers),
            "experts": trace.experts,
            "top_k": trace.top_k,
            "hidden_size": trace.hidden_size,
            "tokens": tokens,
        },
        "degenerate_layers": [load.layer for load in loads if load.domain is None and load.degenerate],
        "loads": [asdict(load) for load in loads],
        "shifts": [asdict(shift) for shift in shifts],
        "correlations": [asdict(each) for each in phase_correlations(trace)],
        "classification": None if guess is None else asdict(guess),
        "coactivation": {
            name: [asdict(each) for each in coactivations(trace, between=between)]
            for name, between in (("within", False), ("between", True))
        },
        "refused": refused,
    }
    report["summary"] = _summary(report)
    empty = int((trace.counts.sum(axis=(1, 2, 3)) == 0).sum())
    return {**report, "headline": _headline(report), "notes": _notes(report, empty)}


def _or_why(refused: dict[str, str], name: str, make: Callable[[], T]) -> T | None:
    try:
        return make()
    except EvidenceError as error:
        refused[name] = str(error)
        return None


def _summary(report: RoutingReport) -> dict[str, Any]:
    """Sum up over layers. A degenerate layer would stand for nothing but itself, so it is left out."""
    out = set(report["degenerate_layers"])
    loads = [row for row in report["loads"] if row["domain"] is None and row["layer"] not in out and row["tokens"]]
    shifts = [row for row in report["shifts"] if row["layer"] not in out]
    alone = [row for row in report["correlations"] if row["domain"] is None]
    summed = [row for row in report["correlations"] if row["domain"] is not None and row["layer"] not in out]
    kept = [row for row in alone if row["layer"] not in out]
    return {
        "layers": len(loads),
        **{name: _median(row[name] for row in loads) for name in ("max_over_mean", "gini", "cv")},
        "total_variation": mean(row["total_variation"] for row in shifts),
        "total_variation_by_chance": mean(row["by_chance"] for row in shifts),
        **{name: mean(row[name] for row in kept) for name in ("pearson", "spearman")},
        **{f"domain_{name}": mean(row[name] for row in summed) for name in ("pearson", "spearman")},
        "pearson_all_layers": mean(row["pearson"] for row in alone),
    }


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the numbers there are, None where there is none."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _headline(report: RoutingReport) -> str:
    summary, guess = report["summary"], report["classification"]
    parts = []
    if summary["max_over_mean"] is not None:
        parts.append(
            f"The busiest expert of a layer gets {number(summary['max_over_mean'])} times a balanced load (median of "
            f"{_layers(summary['layers'])})"
        )
    if summary["total_variation"] is not None:
        parts.append(
            f"two domains differ in {percent(summary['total_variation'])} of their load, where chance gives "
            f"{percent(summary['total_variation_by_chance'])}"
        )
    if summary["pearson"] is not None:
        parts.append(
            f"prefill foretells decode with a correlation of {number(summary['pearson'])} for a single request and "
            f"{number(summary['domain_pearson'])} for a domain"
        )
    if guess is not None:
        parts.append(
            f"the prefill names the domain in {percent(guess['accuracy'])} of requests (chance "
            f"{percent(guess['chance'])})"
        )
    return "; ".join(parts or ["Every layer is degenerate: all tokens go to the same few experts"]) + "."


def _layers(count: int) -> str:
    return f"{count} layer{'' if count == 1 else 's'}"


def _notes(report: RoutingReport, empty: int) -> list[str]:
    trace, notes = report["trace"], []
    every = [row for row in report["loads"] if row["domain"] is None]
    for row in every:
        if row["degenerate"]:
            few = trace["top_k"] or 1
            who = f"expert {row['busiest']} alone takes" if few == 1 else f"the same {few} experts take"
            notes.append(
                f"Layer {row['layer']} is degenerate: {who} {percent(row['top_share'])} of its tokens (over "
                f"{percent(DEGENERATE)} counts as that). It is left out of all figures over layers."
            )
    silent = [str(row["layer"]) for row in every if not row["tokens"]]
    if silent:
        notes.append(f"No token in layer {', '.join(silent)}: was it watched?")
    unused = sum(len(row["unused"]) for row in every)
    if unused:
        layers = sum(1 for row in every if row["unused"])
        notes.append(
            f"{unused} experts in {_layers(layers)} are never used; they count as a load of zero. A longer trace may "
            "use them."
        )
    for phase in PHASES:
        if not trace["tokens"][phase]:
            notes.append(f"The trace has no {phase}, so there is no correlation between prefill and decode.")
    if empty:
        notes.append(f"{empty} requests have no token.")
    if trace["requests"] > MOST_REQUESTS:
        notes.append(
            "Loads are of all requests; shift, guess, co-activation and correlations of single requests are of a fixed "
            f"draw of {MOST_REQUESTS:,} of them."
        )
    if trace["requests"] == 1:
        notes.append("There is one request: nothing can be said about how requests differ.")
    if report["classification"] and report["classification"]["left_out"]:
        out = report["classification"]["left_out"]
        notes.append(f"Too few requests to guess these domains, left out of that: {', '.join(map(plain, out[:5]))}.")
    return notes + list(report["refused"].values())


# ---- tables


def routing_tables(report: RoutingReport) -> tuple[RoutingTable, ...]:
    """Return the tables of the report, without those that would be empty."""
    tables = (_by_layer(report), _by_domain(report), _by_pair(report), *_by_experts(report))
    return tuple(table for table in tables if table.rows)


def _by_layer(report: RoutingReport) -> RoutingTable:
    guess = {row["layer"]: row["accuracy"] for row in (report["classification"] or {"layers": []})["layers"]}
    alone, summed = _grouped(report["correlations"], "layer")
    shifts = _collect(report["shifts"], "layer")
    rows = []
    for load in (row for row in report["loads"] if row["domain"] is None):
        layer = load["layer"]
        rows.append(
            (
                f"{layer}{' !' if load['degenerate'] else ''}",
                number(load["max_over_mean"]),
                number(load["gini"]),
                "-" if load["busiest"] is None else str(load["busiest"]),
                percent(load["top_share"]),
                str(len(load["unused"])),
                number(mean(row["total_variation"] for row in shifts.get(layer, []))),
                number(mean(row["pearson"] for row in alone.get(layer, []))),
                number(mean(row["pearson"] for row in summed.get(layer, []))),
                percent(guess.get(layer)),
            )
        )
    few = report["trace"]["top_k"] or 1
    return RoutingTable(
        title="Layers",
        legend="max/mean: load of the busiest expert over a balanced one; busy: which one; top: the share of the "
        f"{'busiest expert' if few == 1 else f'{few} busiest experts'}; unused: experts without a token; shift: total "
        "variation distance between two domains, mean; request, domain: correlation (Pearson) of prefill and decode "
        "counts; guess: how often this layer's prefill names the domain; !: degenerate",
        header=("layer", "max/mean", "Gini", "busy", "top", "unused", "shift", "request", "domain", "guess"),
        rows=tuple(rows),
    )


def _grouped(rows: Iterable[Mapping[str, Any]], key: str) -> tuple[dict[Any, list[Any]], dict[Any, list[Any]]]:
    """Return the rows over all, and those of a domain, by a key."""
    rows = list(rows)
    return (
        _collect([row for row in rows if row["domain"] is None], key),
        _collect([row for row in rows if row["domain"] is not None], key),
    )


def _collect(rows: Iterable[Mapping[str, Any]], key: str) -> dict[Any, list[Any]]:
    found: dict[Any, list[Any]] = {}
    for row in rows:
        found.setdefault(row[key], []).append(row)
    return found


def _by_domain(report: RoutingReport) -> RoutingTable:
    out = set(report["degenerate_layers"])
    loads = _collect([row for row in report["loads"] if row["layer"] not in out], "domain")
    both = _collect([row for row in report["correlations"] if row["layer"] not in out], "domain")
    one = loads.get(None, [])
    rows = [
        (
            plain(domain),
            str(requests),
            number(_median(row["max_over_mean"] for row in loads.get(domain, one))),
            number(_median(row["gini"] for row in loads.get(domain, one))),
            number(mean(row["pearson"] for row in both.get(domain, []))),
            number(mean(row["spearman"] for row in both.get(domain, []))),
        )
        for domain, requests in report["trace"]["domains"].items()
    ]
    return RoutingTable(
        title="Domains",
        legend="max/mean, Gini: medians over layers; Pearson, Spearman: of the domain's prefill and decode counts",
        header=("domain", "requests", "max/mean", "Gini", "Pearson", "Spearman"),
        rows=tuple(rows),
    )


def _by_pair(report: RoutingReport) -> RoutingTable:
    out = set(report["degenerate_layers"])
    pairs = _collect(
        ({**row, "domains": tuple(row["domains"])} for row in report["shifts"] if row["layer"] not in out), "domains"
    )
    far = sorted(pairs.items(), key=lambda pair: -(mean(row["total_variation"] for row in pair[1]) or 0.0))
    rows = [
        (
            " / ".join(map(plain, domains)),
            number(mean(row["total_variation"] for row in found)),
            number(mean(row["by_chance"] for row in found)),
            number(max(row["total_variation"] for row in found)),
        )
        for domains, found in far[:_SHOWN]
    ]
    return RoutingTable(
        title="Domain shift",
        legend="total variation distance between the loads of two domains, 0 to 1: mean over layers, the same for "
        f"shuffled domains, and the layer where it is largest{f'; first {_SHOWN} of {len(far)}' * (len(far) > _SHOWN)}",
        header=("domains", "mean", "by chance", "largest"),
        rows=tuple(rows),
    )


def _by_experts(report: RoutingReport) -> Iterable[RoutingTable]:
    out = set(report["degenerate_layers"])
    titles = {"within": "Experts used together", "between": "Experts used one after the other"}
    for name, title in titles.items():
        found = [row for row in report["coactivation"][name] if not out & set(row["layers"])]
        pairs = [(row["layers"], pair) for row in found for pair in row["pairs"]]
        pairs.sort(key=lambda each: -(each[1][2] - each[1][2] / each[1][3]))
        yield RoutingTable(
            title=title,
            legend=f"by the same requests; share: of all pairs of a request's tokens; times: what the loads alone "
            f"would give; {_SHOWN // 2} strongest pairs. Mean dependence over layers "
            f"{number(mean(row['dependence'] for row in found))}",
            header=("experts", "share", "times"),
            rows=tuple(_pair(layers, pair) for layers, pair in pairs[: _SHOWN // 2]),
        )


def _pair(layers: Sequence[int], pair: Sequence[float]) -> tuple[str, str, str]:
    first, second, share, times = pair
    where = f"layer {layers[0]}: {first:.0f}" if layers[0] == layers[1] else f"{layers[0]}.{first:.0f}"
    other = f"{second:.0f}" if layers[0] == layers[1] else f"{layers[1]}.{second:.0f}"
    return f"{where}, {other}", percent(share), number(times)
