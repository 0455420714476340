"""The picture of docs/accuracy.md: three products of a real training, what the probe said of them, what came after.

A Wukong trains on clicks under the probe, which makes its intervals; then it trains on, and every second step is
measured to see what the error became. For each verdict the picture shows a backward product and a recipe that have it.
It is drawn from the record alone: `--draw RECORD` draws it again.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import loka
from benchmarks.record import write_record
from loka.probes.storing.database import open_database, read_steps
from loka.reports.build import report_of
from loka.workloads.open_bandit import ClickLog, batches, load_open_bandit, split_by_time
from loka.workloads.wukong import Wukong, WukongConfig

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "accuracy.svg"
BOUND = 0.05
BATCH = 512
LEARNING_RATE = 5e-5
UNLIMITED = 100.0  # of the run's own time: here the samples count, not what they cost

# Of Okabe and Ito's palette, told apart by every eye; each verdict has a mark of its own as well.
COLOURS = {"safe": "#0072B2", "undecided": "#996B00", "unsafe": "#C04A00"}
WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 58, 180, 44, 64


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: ClickLog, steps: int, *, seed: int) -> None:
    """Train on, epoch by epoch, on batches in an order that `seed` begins."""
    done = 0
    while done < steps:
        for categorical, dense, click in batches(data, BATCH, seed=seed + done):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(model(categorical, dense), click).backward()
            optimizer.step()
            done += 1
            if done == steps:
                return


def errors(database: Path, after: int) -> dict[tuple[str, str, str], list[tuple[int, float]]]:
    """Return (step, row_error) per site, pass and recipe."""
    found: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    engine = open_database(database, create=False)
    for step in read_steps(engine):
        for seen in step.products:
            for recipe, error in seen.errors.items():
                found.setdefault((seen.site, seen.product, recipe), []).append((after + step.step, error.row_error))
    engine.dispose()
    return found


def choose(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a dgrad product and recipe for each verdict as flat records: the largest, of those unsafe the worst."""
    found = []
    for row in sorted(rows, key=lambda row: -row["flop_share"]):
        for recipe in row["recipes"] if row["pass"] == "dgrad" else ():
            facts = {key: recipe[key] for key in ("recipe", "verdict", "n", "horizon")}
            figures = {key: recipe["row_error"][key] for key in ("mean", "low", "high", "upper_tolerance")}
            if recipe["gate"] == "row_error" and None not in figures.values():
                found.append({"site": row["site"], "pass": row["pass"], **facts, **figures})
    worst = max((row for row in found if row["verdict"] == "unsafe"), key=lambda row: row["mean"])
    return [worst, *(next(row for row in found if row["verdict"] == each) for each in ("undecided", "safe"))]


def measure(folder: Path, steps: int, every: int, later: int) -> dict[str, Any]:
    """Probe a training, choose a product, and measure what its error becomes."""
    torch.manual_seed(0)
    data = split_by_time(load_open_bandit())[0]
    config = WukongConfig(
        cardinalities=data.cardinalities, num_dense=data.dense.shape[1], base_rate=max(data.click_rate, 1e-4)
    )
    model = Wukong(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    with loka.probe(model, folder / "run.db", every=every, overhead=UNLIMITED):
        train(model, optimizer, data, steps, seed=0)
    chosen = choose(report_of(folder / "run.db", loka.Bound(row_error=BOUND))["sites"])
    sites = {row["site"] for row in chosen}
    with loka.probe(model, folder / "later.db", every=2, overhead=UNLIMITED, filter_fn=lambda _, fqn: fqn in sites):
        train(model, optimizer, data, later, seed=1)
    seen, came = errors(folder / "run.db", 0), errors(folder / "later.db", steps)
    for row in chosen:
        key = (row["site"], row["pass"], row["recipe"])
        row |= {"seen": seen[key], "came": came[key]}
    return {"rows": chosen}


def mark(verdict: str, x: float, y: float, *, filled: bool) -> str:
    """Return the mark of one measurement: a shape per verdict, filled where it is evidence."""
    paint = f'fill="{COLOURS[verdict] if filled else "#ffffff"}" stroke="{COLOURS[verdict]}"'
    if verdict == "safe":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" {paint}/>'
    if verdict == "undecided":
        return f'<rect x="{x - 2.8:.1f}" y="{y - 2.8:.1f}" width="5.6" height="5.6" {paint}/>'
    return f'<path d="M{x:.1f} {y - 3.8:.1f}l3.6 6.4h-7.2z" {paint}/>'


def draw(settings: dict[str, Any], results: dict[str, Any]) -> str:
    """Return the picture as SVG."""
    rows = results["rows"]
    steps = settings["steps"]
    end = max(max(steps + (row["horizon"] or 0), row["came"][-1][0]) for row in rows)
    top = 1.08 * max(max(row["upper_tolerance"], *(error for _, error in row["seen"] + row["came"])) for row in rows)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / end

    def y(error: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * error / top

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="system-ui, sans-serif" font-size="12" fill="#222222">',
        "<title>The row error of three products over a training, with intervals and verdicts</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="24" font-size="14" font-weight="600">A Wukong in training: three dgrad products</text>',
    ]
    for tick in [0.02 * i for i in range(int(top / 0.02) + 1)]:
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.2f}</text>')
    for tick in range(0, end + 1, 100):
        parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick}</text>')
    middle = (HEIGHT - BOTTOM + TOP) / 2
    parts += [
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">',
        "row_error of a step</text>",
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 24}" text-anchor="middle">training step; filled: '
        "sampled by the probe, hollow: what came later</text>",
        f'<rect x="{LEFT}" y="{TOP}" width="{x(100) - LEFT:.1f}" height="{HEIGHT - TOP - BOTTOM}" fill="#88888820"/>',
        f'<text x="{x(50):.1f}" y="{TOP + 14}" text-anchor="middle" font-size="11">no evidence yet</text>',
        f'<path d="M{x(steps):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#888888" stroke-dasharray="2 3"/>',
        f'<text x="{x(steps) - 5:.1f}" y="{HEIGHT - BOTTOM - 8}" text-anchor="end" font-size="11">'
        "the report is made</text>",
        f'<path d="M{LEFT} {y(BOUND):.1f}H{WIDTH - RIGHT}" stroke="#222222" stroke-width="1.5"/>',
        f'<text x="{LEFT + 6}" y="{y(BOUND) + 15:.1f}" font-weight="600">bound {BOUND:g}</text>',
    ]
    below = float(TOP)  # labels stand beside the last marks, and clear of each other
    for row in sorted(rows, key=lambda row: -row["came"][-1][1]):
        below = max(y(row["came"][-1][1]), below + 46)
        parts += _row(row, x, y, steps)
        parts += _label(row, below)
    return "\n".join([*parts, "</svg>", ""])


def _row(row: dict[str, Any], x: Any, y: Any, steps: int) -> list[str]:
    """Draw the measurements of one row, the interval of its mean, and the tolerance as far as its horizon."""
    verdict = row["verdict"]
    colour = COLOURS[verdict]
    low, high, upper = (y(row[key]) for key in ("low", "high", "upper_tolerance"))
    begin, made, until = x(100), x(steps), x(steps + (row["horizon"] or 0))
    return [
        f'<rect x="{begin:.1f}" y="{high:.1f}" width="{made - begin:.1f}" height="{low - high:.1f}" '
        f'fill="{colour}" fill-opacity="0.18"/>',
        f'<path d="M{begin:.1f} {upper:.1f}H{until:.1f}" stroke="{colour}" stroke-width="1.5" stroke-dasharray="6 4"/>',
        *(mark(verdict, x(step), y(error), filled=True) for step, error in row["seen"]),
        *(mark(verdict, x(step), y(error), filled=False) for step, error in row["came"]),
    ]


def _label(row: dict[str, Any], at: float) -> list[str]:
    """Name a verdict, and what has it, at the right."""
    colour, left = COLOURS[row["verdict"]], WIDTH - RIGHT + 10
    return [
        f'<text x="{left}" y="{at - 4:.1f}" fill="{colour}" font-weight="600">{row["verdict"]}</text>',
        f'<text x="{left}" y="{at + 10:.1f}" fill="{colour}">{row["recipe"]}</text>',
        f'<text x="{left}" y="{at + 23:.1f}" fill="{colour}" font-size="10">{row["site"]}</text>',
    ]


def main() -> None:
    """Measure and draw, or draw a record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draw", type=Path, help="draw this record, and measure nothing")
    parser.add_argument("--output", type=Path, default=PICTURE)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.draw is not None:
        record = json.loads(options.draw.read_text(encoding="utf-8"))
        settings, results = record["settings"], record["results"]
    else:
        torch.set_num_threads(1)
        settings = (
            {"steps": 260, "every": 13, "later": 70} if not options.quick else {"steps": 130, "every": 3, "later": 8}
        )
        with tempfile.TemporaryDirectory() as folder:
            results = measure(Path(folder), settings["steps"], settings["every"], settings["later"])
        settings |= {"bound": BOUND, "batch": BATCH}
        write_record("accuracy_picture", settings, results)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(draw(settings, results), encoding="utf-8")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
