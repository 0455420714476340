"""Predict from early steps, measure on later unseen ones: collect every material, judge, write a dated record.

Each (material, part) runs in a process of its own, one thread each, as many at a time as `--jobs`.
"""

import argparse
import contextlib
import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.record import write_record
from benchmarks.truth.collect import TRUTH_ROWS
from benchmarks.truth.materials import EARLY, LATER, LATER_DOMAIN, MATERIALS, STUDIED, missing
from benchmarks.truth.numbers import numbers_to_hold
from benchmarks.truth.parts import Task, file_of, judge_parts, length_of, run_part
from benchmarks.truth.show import show
from benchmarks.truth.training import CUTS, EVERY, STEPS

_STEP_DONE: Final[str] = "step done"


def main() -> None:
    """Run the study, or one part of it in a process of its own."""
    arguments = _arguments()
    torch.set_num_threads(1)
    if arguments.part:
        _run_one(arguments)
        return
    console = Console()
    if arguments.rows:
        arguments.rows.mkdir(parents=True, exist_ok=True)
        _study(arguments, arguments.rows, console)
    else:
        with tempfile.TemporaryDirectory() as folder:
            _study(arguments, Path(folder), console)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.truth", description=__doc__)
    parts = list(dict.fromkeys(part for source in MATERIALS.values() for part in source.parts))
    parser.add_argument("--material", action="append", choices=MATERIALS, help="only this one; may be repeated")
    parser.add_argument("--only", action="append", choices=parts, help="only this part; may be repeated")
    parser.add_argument("--quick", action="store_true", help="a smoke run on three batches, without meaning")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default 2)")
    parser.add_argument("--rows", type=Path, help="keep what was collected in this folder")
    parser.add_argument("--judge-only", action="store_true", help="judge what --rows has from an earlier run")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)  # a material and one of its parts, in this process
    arguments = parser.parse_args()
    if (arguments.judge_only or arguments.part) and not arguments.rows:
        parser.error("--judge-only needs --rows FOLDER, where an earlier run has kept what it collected")
    return arguments


def _run_one(arguments: argparse.Namespace) -> None:
    task = tuple(arguments.part)

    def advance() -> None:
        print(_STEP_DONE, flush=True)

    run_part(task, file_of(arguments.rows, task), advance, quick=arguments.quick)


def _study(arguments: argparse.Namespace, folder: Path, console: Console) -> None:
    started = time.perf_counter()
    wanted = arguments.material or (["wukong"] if arguments.quick else list(MATERIALS))
    if not arguments.judge_only:
        skipped = {name: reason for name in wanted if (reason := missing(name))}
        for reason in skipped.values():
            console.print(f"skipped: {reason}")
        wanted = [name for name in wanted if name not in skipped]
        if not wanted:
            sys.exit(1)
    tasks = [(name, part) for name in wanted for part in MATERIALS[name].parts]
    if arguments.only:
        tasks = [task for task in tasks if task[1] in arguments.only]
    if not arguments.judge_only:
        _run_all(sorted(tasks, key=lambda task: -MATERIALS[task[0]].minutes), arguments, folder, console)
    results = dict(judge_parts(folder, tasks))
    results["numbers to hold"] = numbers_to_hold(results)
    results["wall time, s"] = round(time.perf_counter() - started)
    show(results, console)
    if arguments.quick or arguments.only or arguments.material:
        return  # a part of the study is no record
    settings = {
        "materials": wanted,
        "recipes": [recipe.name for recipe in STUDIED],
        "early batches": EARLY,
        "later batches": {"exchangeable": LATER, "domain": LATER_DOMAIN},
        "rows of the truth": TRUTH_ROWS,
        "training": {"steps": STEPS, "one step is sampled in": EVERY, "evidence taken at": CUTS},
        "jobs": arguments.jobs,
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it would print every figure; the tables above are for reading
        path = write_record("truth", settings, results, command="make truth")
    console.print(f"wrote {path}")


def _run_all(tasks: list[Task], arguments: argparse.Namespace, folder: Path, console: Console) -> None:
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(arguments.jobs) as pool:

        def run(task: Task) -> None:
            bar = progress.add_task(" ".join(task), total=length_of(task, quick=arguments.quick))
            _run_part(task, arguments, folder, lambda: progress.advance(bar))

        list(pool.map(run, tasks))


def _run_part(task: Task, arguments: argparse.Namespace, folder: Path, advance: Callable[[], Any]) -> None:
    """Run one part in a process of its own; raise RuntimeError with its last words where it fails."""
    command = [sys.executable, "-m", "benchmarks.truth", "--part", *task, "--rows", str(folder)]
    command += ["--quick"] if arguments.quick else []
    log = file_of(folder, task).with_suffix(".log")
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == _STEP_DONE:
                advance()
        code = process.wait()
    if code:
        words = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
        raise RuntimeError(f"{' '.join(task)} ended with code {code}. Its last words:\n{words}")


if __name__ == "__main__":
    main()
