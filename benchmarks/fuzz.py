"""10,000 spoiled files for every reader: each is refused with a LokaError or read, in bounded time and memory.

Files are spoiled as a disk or a transfer would (bits, stretches, lengths) and as somebody hostile would (values of any
kind in JSON, in array headers, in the tables of a database). A number makes the same file again: `--only "plan" --first
1234 --files 1`.
"""

import argparse
import json
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import RESULTS, write_record
from tests.fuzz.campaign import LIMIT_MIB, LIMIT_S, Outcome, run
from tests.fuzz.readers import READERS

FILES = 10_000


def main() -> int:
    """Run the study; return 1 where a reader failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run of 100 files for each reader")
    parser.add_argument("--files", type=int, default=0, help=f"files for each reader, {FILES} by default")
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    parser.add_argument("--processes", type=int, default=1, help="processes that search side by side")
    parser.add_argument("--only", choices=READERS, action="append", help="one reader; may be repeated")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    files = arguments.files or (100 if arguments.quick else FILES)
    results: dict[str, Any] = {}
    for name in arguments.only or READERS:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            numbers = range(arguments.first, arguments.first + files)
            outcome = run(READERS[name], Path(folder), numbers, arguments.processes)
        results[name] = _entry(outcome)
        print(f"{name}: {dict(outcome.counts)} in {time.monotonic() - began:.0f} s", flush=True)
        for failure in outcome.failures:
            print(f"  {failure}", flush=True)
    if (files, arguments.first) == (FILES, 0):
        settings = {"files of each reader": files, "limit, s of CPU": LIMIT_S, "limit, MiB": LIMIT_MIB}
        write_record("fuzz", settings, _with_others(results), command="python -m benchmarks.fuzz")
    return 1 if any(entry["failures"] for entry in results.values()) else 0


def _entry(outcome: Outcome) -> dict[str, Any]:
    counts = outcome.counts
    return {
        "files": sum(counts.values()),
        "read as the original": counts["same"],
        "read as something else": counts["other"],
        "refused with a LokaError": counts["refused"],
        "failures": counts["failed"],
        "slowest file, s of CPU": round(outcome.slowest_s, 3),
        "memory beyond the start, MiB": round(outcome.memory_mib, 1),
    }


def _with_others(results: dict[str, Any]) -> dict[str, Any]:
    """Add what today's record says of readers that were not run now: they can be run one by one."""
    path = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-fuzz.json"
    known = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else {}
    return {name: {**known, **results}[name] for name in READERS if name in known or name in results}


if __name__ == "__main__":
    sys.exit(main())
