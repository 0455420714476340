"""The parts of the study: what is done with a material in a process of its own, and what all of them add up to.

exchangeable, domain    predict the error from early batches, measure it on later ones (`collect`, `judge`)
impact                  predict the loss, measure it (`impact`)
training                predict from a training's past, measure its future (`training`)
sensitivity             what ranking twenty linears takes (`sensitivity`); of no material in particular
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from benchmarks.truth.collect import collect
from benchmarks.truth.impact import judge_impacts, load_impacts, study_impacts
from benchmarks.truth.judge import judge
from benchmarks.truth.materials import EARLY, LATER, LATER_DOMAIN, SPLITS, build, build_setup
from benchmarks.truth.promises import judge_promises
from benchmarks.truth.roads import OBSERVATIONS
from benchmarks.truth.rows import load
from benchmarks.truth.sensitivity import sensitivities
from benchmarks.truth.training import EVERY, STEPS, judge_training, load_courses, save_courses, train_probed

Task = tuple[str, str]  # material, part
Advance = Callable[[], None]

_QUICK_BATCHES: Final[int] = 3
_QUICK_STEPS: Final[int] = 200
_ROUNDS: Final[int] = 3


def file_of(folder: Path, task: Task) -> Path:
    """Return where a part keeps what it found."""
    return folder / f"{'-'.join(task)}.json"


def length_of(task: Task, *, quick: bool) -> int | None:
    """Return how often a part will say that it got on; None where that is not known before."""
    if task[1] in SPLITS:
        later = LATER if task[1] == "exchangeable" else LATER_DOMAIN
        return 2 * _QUICK_BATCHES if quick else EARLY + later
    return (_QUICK_STEPS if quick else STEPS) if task[1] == "training" else None


def run_part(task: Task, path: Path, advance: Advance, *, quick: bool) -> None:
    """Do one part and keep what it found in a file."""
    name, part = task
    limit = _QUICK_BATCHES if quick else None
    if part in SPLITS:
        collect(build(name), part, tuple(OBSERVATIONS), advance, limit).save(path)
    elif part == "impact":
        study_impacts(build(name), advance, limit).save(path)
    elif part == "training":
        steps = _QUICK_STEPS if quick else STEPS
        save_courses(path, train_probed(name, build_setup(name), advance, steps=steps, every=EVERY))
    else:
        found = sensitivities(advance, rounds=1 if quick else _ROUNDS)
        path.write_text(json.dumps(found, default=asdict), encoding="utf-8")


def judge_parts(folder: Path, tasks: Iterable[Task]) -> Mapping[str, Any]:
    """Return every table that the files in a folder give, by name."""
    paths = {task: file_of(folder, task) for task in tasks}
    paths = {task: path for task, path in paths.items() if path.exists()}

    def of(*parts: str) -> list[Path]:
        return [path for (_, part), path in paths.items() if part in parts]

    collected = [load(path) for path in of(*SPLITS)]
    results = {**judge(collected), **judge_promises(collected)} if collected else {}
    results |= judge_impacts([load_impacts(path) for path in of("impact")])
    results |= judge_training([course for path in of("training") for course in load_courses(path)])
    for path in of("sensitivity"):
        results["sensitivities of twenty linears"] = json.loads(path.read_text(encoding="utf-8"))
    return results
