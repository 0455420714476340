"""Do the mods keep FP8 training on the course of high precision? Whole trainings, paired by seed and order of data.

    python -m benchmarks.mods.training [--workload NAME ...] [--seeds 5] [--rows FOLDER] [--quick]

Every arm of `arms` trains every workload of `workloads` from the same weights and batches per seed. Each finished
training is one line of FOLDER/rows.jsonl, kept between runs: an interrupted study goes on where it stopped. A record is
written when all is done, or from what there is with --record-only.
"""

import argparse
import json
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

import loka
from benchmarks.mods.arms import ARMS, BOUND, SPEEDUP, Arm, modified, naive_plan
from benchmarks.mods.show import shown
from benchmarks.mods.summary import summarised
from benchmarks.mods.workloads import WORKLOADS, Batch, Task, make, missing, rate
from benchmarks.record import write_record
from loka.dispatch.deciding.plan import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One finished training: the loss at each moment, up to where it ceased to be finite."""

    workload: str
    arm: str
    seed: int
    settings: str  # of the task; a row of another size is not taken for this one
    moments: tuple[str, ...]
    losses: tuple[float, ...]
    fp8_share: float  # of the floating-point operations of products, by the plan
    cpu_s: float

    @property
    def finite(self) -> bool:
        """Whether it arrived."""
        return len(self.losses) == len(self.moments)


def train(task: Task, arm: Arm, seed: int) -> Row:
    """Train one arm from one seed."""
    started = time.process_time()
    torch.manual_seed(seed)
    model = modified(task.build(), arm)
    optimizer = torch.optim.Adam(model.parameters(), lr=task.learning_rate, betas=(0.9, task.beta2), fused=True)
    share = 0.0
    if arm.numerics in _NAIVE:
        plan = _naive(task, arm)
        loka.convert(model, plan)
        share = plan.fp8_share()
    course = Course(task, model, optimizer, seed)
    if arm.numerics == "plan":
        plan = _planned(course)
        loka.convert(model, plan)
        share = plan.fp8_share()
    course.run_to(task.steps)
    return Row(
        workload=task.name,
        arm=arm.name,
        seed=seed,
        settings=_settings(task),
        moments=tuple(name for _, name in task.moments),
        losses=tuple(course.losses),
        fp8_share=share,
        cpu_s=time.process_time() - started,
    )


class Course:
    """A training that can be stopped for a conversion, and judges itself at the task's moments."""

    def __init__(self, task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        self.task, self.model, self.optimizer = task, model, optimizer
        self.losses: list[float] = []
        self._batches = task.batches(seed)
        self._moments = iter(task.moments)
        self._next = next(self._moments)[0]
        self._done = 0
        self._ahead: list[tuple[float, int]] = []  # loss before the step, and rows
        self._finite = True

    def run_to(self, stop: int) -> None:
        """Train until this many steps are done, or the loss is no longer finite."""
        for batch in islice(self._batches, stop - self._done):
            if not self._finite:
                return
            self._step(batch)

    def _step(self, batch: Batch) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate(self.task, self._done)
        self.optimizer.zero_grad()
        loss = self.task.loss(self.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        if self.task.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.task.clip)
        self.optimizer.step()
        self._done += 1
        self._ahead.append((loss.item(), len(batch[0])))
        self._finite = math.isfinite(self._ahead[-1][0])
        if self._done == self._next and self._finite:
            self._judge()

    def _judge(self) -> None:
        if self.task.held_out:
            value = held_out_loss(self.task, self.model)
        else:
            value = math.fsum(loss * rows for loss, rows in self._ahead) / sum(rows for _, rows in self._ahead)
        self._finite = math.isfinite(value)
        if self._finite:
            self.losses.append(value)
        self._ahead.clear()
        self._next = next(self._moments, (0, ""))[0]


@torch.no_grad()
def held_out_loss(task: Task, model: nn.Module) -> float:
    """Return the mean loss over the held-out rows, in the numerics that the model trains in."""
    parts = [(task.loss(model, batch).item(), len(batch[0])) for batch in task.held_out]
    return math.fsum(loss * rows for loss, rows in parts) / sum(rows for _, rows in parts)


_NAIVE = ("tensorwise", "tensorwise e4m3")
_plans: dict[tuple[str, str], Plan] = {}


def _naive(task: Task, arm: Arm) -> Plan:
    """Return the naive plan of an arm; it depends on shapes alone, so it is made once."""
    key = (task.name, arm.name)
    if key not in _plans:
        with torch.random.fork_rng():
            model = modified(task.build(), arm)
        batch = next(task.batches(0))

        def step() -> None:
            task.loss(model, batch).backward()  # type: ignore[no-untyped-call]  # torch does not annotate it

        _plans[key] = naive_plan(arm.numerics, model, step)
    return _plans[key]


def _planned(course: Course) -> Plan:
    """Train the first steps under the probe and return the plan that they support."""
    steps = course.task.probed
    with tempfile.TemporaryDirectory() as folder:
        db = Path(folder) / "run.db"
        with loka.probe(course.model, db, every=max(1, steps // 12), overhead=1e6):
            course.run_to(steps)
        return loka.plan(db, BOUND, assume_speedup=SPEEDUP, measure=False)


def _settings(task: Task) -> str:
    names = ("steps", "probed", "learning_rate", "warmup", "decays", "beta2", "clip")
    return json.dumps({name: getattr(task, name) for name in names} | task.settings)


def remaining(tasks: list[Task], seeds: int, rows: list[Row], *, turns: int = 3) -> Iterator[tuple[Task, Arm, int]]:
    """Yield what is still to be trained, turn by turn of `arms`: what is worth most comes first."""
    done = {(row.workload, row.arm, row.seed, row.settings) for row in rows}
    chosen = [(task, arm) for task in tasks for arm in ARMS if task.arms is None or arm.name in task.arms]
    for turn in range(turns):
        for seed in range(seeds):
            for task, arm in chosen:
                if arm.turn == turn and (task.name, arm.name, seed, _settings(task)) not in done:
                    yield task, arm, seed


def read_rows(path: Path) -> list[Row]:
    """Read the trainings that are finished; a last line that was cut off is none."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            data = json.loads(line)
            found.append(Row(**{**data, "moments": tuple(data["moments"]), "losses": tuple(data["losses"])}))
    return found


def append_row(path: Path, row: Row) -> None:
    """Write one finished training; after a line that was cut off, on a line of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if not text.endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(row)) + "\n")


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", default=["all"], choices=["all", *WORKLOADS])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", type=Path, default=Path(tempfile.gettempdir()) / "loka-mods-training")
    parser.add_argument("--turns", type=int, default=3, help="1: only the arms that matter most; 2: with single mods")
    parser.add_argument("--quick", action="store_true", help="one seed and few steps, without meaning")
    parser.add_argument("--record-only", action="store_true", help="train nothing, write the record of what there is")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = list(WORKLOADS) if "all" in arguments.workload else arguments.workload
    for name in names:
        if reason := missing(name):
            print(f"skipped: {reason}")
    tasks = [make(name, minimal=arguments.quick) for name in names if not missing(name)]
    with tempfile.TemporaryDirectory() as throwaway:
        path = (Path(throwaway) if arguments.quick else arguments.rows) / "rows.jsonl"
        if not arguments.record_only:
            seeds = 1 if arguments.quick else arguments.seeds
            for task, arm, seed in remaining(tasks, seeds, read_rows(path), turns=arguments.turns):
                row = train(task, arm, seed)
                append_row(path, row)
                last = f"{row.losses[-1]:.6f}" if row.losses else "none"
                state = "" if row.finite else " NOT FINITE"
                print(f"{task.name}, seed {seed}, {arm.name}: {last}{state} ({row.cpu_s:.1f} s)", flush=True)
        write(tasks, read_rows(path))


def write(tasks: list[Task], rows: list[Row]) -> None:
    """Summarise the rows of these tasks and write the record."""
    results: dict[str, Any] = {}
    for task in tasks:
        found = [row for row in rows if row.workload == task.name and row.settings == _settings(task)]
        if found:
            results[task.name] = summarised(found)
    settings = {task.name: json.loads(_settings(task)) for task in tasks}
    given = [each for each in sys.argv[1:] if each != "--record-only"]
    command = shlex.join(["python", "-m", "benchmarks.mods.training", *given])
    # A record of some workloads takes no place of that of all.
    name = "mods_training" if len(tasks) == len(WORKLOADS) else "_".join(["mods_training", *results])
    write_record(name, settings, results, command=command)
    print(shown({"results": results}))


if __name__ == "__main__":
    main()
