"""The figures of the loss and of training, and the numbers to hold, as tables on a terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def show_more(results: Mapping[str, Any], console: Console) -> None:
    """Print what there is of impact, training, sensitivities and numbers to hold."""
    impacts = {name: found for name, found in results.items() if name.startswith("loss impact, ")}
    training = {name: found for name, found in results.items() if name.startswith("training, ")}
    if impacts:
        console.print(_impact_table(impacts))
    if training:
        console.print(_training_table(training))
    if found := results.get("sensitivities of twenty linears"):
        console.print(_sensitivity_table(found))
    for entry in results["numbers to hold"]:
        if entry["found"] is not None:
            console.print(_number(entry), soft_wrap=True, markup=False, highlight=False)


def _impact_table(impacts: Mapping[str, Any]) -> Table:
    table = Table("material", "rows", "batches", "kl ratio, median", "range", "spearman", "1 batch", "2", "covers, %")
    table.title = "loss impact: predicted from early batches / measured on later ones"
    for name, found in impacts.items():
        ratio = found["predicted / measured kl"]
        table.add_row(
            name.removeprefix("loss impact, "),
            str(found["rows"]),
            f"{found['early batches']} / {found['later batches']}",
            f"{ratio['median']:.2f}",
            f"{ratio['lowest']:.2f} .. {ratio['highest']:.2f}",
            f"{found['spearman']:.3f}",
            f"{found['spearman, from one batch']:.3f}",
            f"{found['spearman, from two batches']:.3f}",
            f"{100 * found['interval has the change on a later batch']:.1f}",
        )
    return table


def _training_table(training: Mapping[str, Any]) -> Table:
    table = Table("pass", "rows", "horizon", "safe", "false safe", "tightest, %", "steps above, %", "drift, %")
    table.title = "training: safe, then within the horizon, all bounds together; tightest: each row's own bound"
    for name, found in training.items():
        table.add_row(
            name.removeprefix("training, "),
            str(found["rows"]),
            f"{found['horizon, steps, median']:.0f}",
            str(found["all bounds"]["safe"]),
            str(found["all bounds"]["false_safe"]),
            f"{100 * found['tightest']['share']:.2f}",
            f"{100 * found['tightest']['later steps above the bound']:.2f}",
            f"{100 * found['drift within the horizon, median']:.1f}",
        )
    return table


def _sensitivity_table(found: Mapping[str, Any]) -> Table:
    table = Table("", "plain steps", "quartiles", title=f"sensitivities of {found['linears']} linears")
    for name, ratio in found.items():
        if name.startswith("batch"):
            table.add_row(name, f"{ratio['median']:.1f}", f"{ratio['q25']:.1f} .. {ratio['q75']:.1f}")
    return table


def _number(entry: Mapping[str, Any]) -> str:
    """One number on a line: too much is said of each for a table."""
    where = f" ({entry['at']})" if entry["at"] else ""
    return f"{_verdict(entry):<18} {entry['what']}: {entry['found']:.4g}{where}"


def _verdict(entry: Mapping[str, Any]) -> str:
    if entry["limit"] is None:
        return "not promised"
    return f"held, {entry['limit']:g}" if entry["holds"] else f"missed, {entry['limit']:g}"
