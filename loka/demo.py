"""`loka demo`: the whole path on a real model and a real click log, in about a minute on two CPU cores.

A Wukong trains on the Open Bandit log under the probe; the report says which of its GEMMs are safe in FP8; one plan is
made from times measured here, another under an assumed speed-up, so that FP8 kernels really run on a machine without
FP8 hardware; then training goes on twice from the same point, in high precision and as planned, over several seeds.
"""

import copy
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from loka.bounds import Bound
from loka.dispatch.deciding.plan import Plan
from loka.dispatch.deciding.planner import plan as make_plan
from loka.dispatch.running.convert import convert
from loka.errors import ArgumentError
from loka.probes.sampling.session import probe
from loka.reports.build import built_of
from loka.reports.render import rendered
from loka.reports.table import print_table
from loka.workloads.open_bandit import ClickLog, batches, load_open_bandit, split_by_time
from loka.workloads.quality import log_loss, normalized_entropy
from loka.workloads.wukong import Wukong, WukongConfig

_BATCH: Final[int] = 512
_LEARNING_RATE: Final[float] = 5e-5
_PROBED_STEPS: Final[int] = 240
_EVERY: Final[int] = 5
# A demonstration wants evidence within a minute; a training would leave this at 0.01 and take longer to get it.
_OVERHEAD: Final[float] = 1.0
_SEEDS: Final[tuple[int, ...]] = (0, 1, 2)
_CONTINUED_STEPS: Final[int] = 60
_ASSUMED_SPEEDUP: Final[float] = 1.3
_MEASURE_S: Final[float] = 8.0
_BOUND: Final = Bound(row_error=0.05)

Tick = Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Quality:
    """Held-out quality of one model."""

    entropy: float
    loss: float


def run_demo(out: Path, console: Console) -> None:
    """Run the demo, print what it finds, and leave database, reports and plans in `out`.

    Raises ArgumentError when `out` cannot be a folder, and what the stages raise.
    """
    folder = _folder(out)
    torch.manual_seed(0)
    train, validation, test = split_by_time(load_open_bandit())
    held_out = (validation, test)
    model = Wukong(
        WukongConfig(
            cardinalities=train.cardinalities, num_dense=train.dense.shape[1], base_rate=max(train.click_rate, 1e-4)
        )
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=_LEARNING_RATE)
    rows = sum(len(part.click) for part in (train, *held_out))
    console.rule("1  Probe a training run")
    console.print(
        f"A Wukong ({sum(p.numel() for p in model.parameters()):,} parameters) on {rows:,} real impressions, split by "
        f"time; one step in {_EVERY} is probed, which may double the time. A real training keeps the defaults: one "
        "step in 100, and 1 % of the time."
    )
    database = folder / "run.db"
    with (
        _bar(console, "training under the probe", _PROBED_STEPS) as tick,
        probe(model, database, every=_EVERY, overhead=_OVERHEAD, loss="bce"),
    ):
        _train(model, optimizer, train, _PROBED_STEPS, seed=0, tick=tick)

    console.rule("2  Which GEMMs are safe, and is FP8 faster here?")
    measured, assumed = _plans(database, folder, console)
    built = built_of(database, _BOUND)
    for name in ("json", "html"):
        (folder / f"report.{name}").write_text(rendered(built, name), encoding="utf-8")
    print_table(built.report, console)
    console.print()
    console.print(f"[bold]On this machine:[/] {escape(measured.notes[0])}")

    console.rule("3  Go on training: high precision against the plan")
    console.print(f"[bold]The plan that runs:[/] {escape(' '.join(assumed.notes[:2]))}")
    arms = _compare(model, optimizer, assumed, train, held_out, console)
    _tell(arms, held_out, console)
    console.rule("Files")
    for name, what in _FILES.items():
        console.print(f"{folder / name}  {what}", highlight=False, soft_wrap=True)


_FILES: Final[dict[str, str]] = {
    "report.html": "the per-layer safety report: open it in a browser",
    "report.json": "the same, for programs",
    "plan.json": "the plan that ran here, under an assumed speed-up",
    "plan-measured.json": "the plan from times measured on this machine",
    "run.db": "the probe database: try `loka explain` on it",
}


def _folder(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(
            f"The demo cannot write into {out}: {error.strerror}. Give --out a folder that can be made."
        ) from error
    return out


@contextmanager
def _bar(console: Console, what: str, total: int) -> Iterator[Tick]:
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.update(task, advance=1)


def _train(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: ClickLog, steps: int, *, seed: int, tick: Tick
) -> None:
    done = 0
    while done < steps:
        for categorical, dense, click in batches(data, _BATCH, seed=1000 * seed + done):
            loss = F.binary_cross_entropy_with_logits(model(categorical, dense), click)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
            optimizer.step()
            tick()
            done += 1
            if done == steps:
                return


def _plans(database: Path, folder: Path, console: Console) -> tuple[Plan, Plan]:
    """Plan twice: with times measured here, and with emulated kernels counted as faster."""
    with console.status("measuring every kernel on the model's shapes"):
        measured = make_plan(database, _BOUND, budget_s=_MEASURE_S)
    assumed = make_plan(database, _BOUND, assume_speedup=_ASSUMED_SPEEDUP)
    measured.save(folder / "plan-measured.json")
    assumed.save(folder / "plan.json")
    return measured, assumed


def _compare(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    train: ClickLog,
    held_out: tuple[ClickLog, ...],
    console: Console,
) -> dict[str, list[_Quality]]:
    """Continue from the same weights and optimiser state, with the same batches, once per arm and seed."""
    arms: dict[str, list[_Quality]] = {"high precision": [], "plan": []}
    with _bar(console, "training both arms", len(arms) * len(_SEEDS) * _CONTINUED_STEPS) as tick:
        for seed in _SEEDS:
            for arm, qualities in arms.items():
                copied = copy.deepcopy(model)
                if arm == "plan":
                    convert(copied, plan)
                continued = torch.optim.Adam(copied.parameters(), lr=_LEARNING_RATE)
                continued.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # it would share the tensors
                _train(copied, continued, train, _CONTINUED_STEPS, seed=seed + 1, tick=tick)
                qualities.append(_quality(copied, held_out))
    return arms


@torch.no_grad()
def _quality(model: nn.Module, parts: tuple[ClickLog, ...]) -> _Quality:
    logits, clicks = [], []
    for part in parts:
        for categorical, dense, click in batches(part, _BATCH, drop_last=False):
            logits.append(model(categorical, dense))
            clicks.append(click)
    scores: Tensor = torch.cat(logits)
    labels: Tensor = torch.cat(clicks)
    return _Quality(normalized_entropy(scores, labels), log_loss(scores, labels))


def _tell(arms: dict[str, list[_Quality]], held_out: tuple[ClickLog, ...], console: Console) -> None:
    """Print the quality of both arms, and their paired difference with its spread over seeds."""
    clicks = int(sum(float(part.click.sum()) for part in held_out))
    for arm, qualities in arms.items():
        values = [quality.entropy for quality in qualities]
        console.print(
            f"normalised entropy, {arm}: {statistics.mean(values):.5f} (seeds {min(values):.5f} to {max(values):.5f})",
            highlight=False,
        )
    pairs = zip(arms["high precision"], arms["plan"], strict=True)
    changes = [100 * (plan.loss / high.loss - 1) for high, plan in pairs]
    console.print(
        f"relative log loss of the plan against high precision, paired by seed: {statistics.mean(changes):+.4f} % "
        f"(seeds {min(changes):+.4f} to {max(changes):+.4f} %; {len(changes)} seeds, {_CONTINUED_STEPS} steps each).",
        highlight=False,
    )
    console.print(
        f"With {clicks} clicks held out, this log cannot tell a good model from its base rate (entropy 1); what it can "
        "show is that the two arms stay together.",
        highlight=False,
    )
