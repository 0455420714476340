"""One dated JSON record per study: figures with the device, the versions and the command that made them."""

import json
import shlex
import sys
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from loka.environment import environment_facts

RESULTS = Path(__file__).parent / "results"


def write_record(name: str, settings: dict[str, Any], results: dict[str, Any], *, command: str = "") -> Path:
    """Write benchmarks/results/<date>-<name>.json and print the figures; `command`: what to say instead of argv.

    A smoke run (--quick) is printed alone: its figures mean nothing, and must not take a record's place.
    """
    now = datetime.now(UTC)
    record = {
        "schema": 1,
        "name": name,
        "created": now.isoformat(timespec="seconds"),
        "command": command or shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "environment": environment_facts(),
        "threads": torch.get_num_threads(),
        "settings": settings,
        "results": {key: asdict(value) if is_dataclass(value) else value for key, value in results.items()},
    }
    path = RESULTS / f"{now:%Y-%m-%d}-{name}.json"
    for key, value in results.items():
        print(f"{key:<60} {value}")
    if "--quick" in sys.argv:
        print("a smoke run: no record is written")
        return path
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    return path
