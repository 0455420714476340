"""What `import loka` adds to `import torch`, and what the help of each command takes, in fresh processes."""

import argparse
import resource
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.record import write_record

_IMPORT = """
import time, torch
start = time.process_time()
import loka
print(time.process_time() - start)
"""
# Every command's help is what its user waits for before anything else.
_COMMANDS = ("", "demo", "report", "bench", "plan", "explain", "advise", "diff", "kernels", "env", "moe", "moe place")


def import_s() -> float:
    """Return the processor time that `import loka` takes after `import torch`, in a fresh process."""
    output = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=True).stdout
    return float(output.strip())


def process_s(command: Sequence[str]) -> float:
    """Return the processor time of a whole process, its children included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run, without meaning")
    rounds = 2 if parser.parse_args().quick else 10
    imports = [import_s() for _ in range(rounds)]
    times: dict[str, list[float]] = {"python -c pass": []}
    for _ in range(rounds):  # interleaved: each round has a bare interpreter beside every help
        times["python -c pass"].append(process_s([sys.executable, "-c", "pass"]))
        for command in _COMMANDS:
            words = [*command.split(), "--help"]
            times.setdefault(shlex.join(["loka", *words]), []).append(process_s([sys.executable, "-m", "loka", *words]))
    results: dict[str, Any] = {
        "import loka after import torch, s, median": statistics.median(imports),
        "import loka after import torch, s, worst": max(imports),
        **{f"{name}, s of CPU, median": statistics.median(taken) for name, taken in times.items()},
    }
    write_record("import_time", {"processes": rounds}, results)


if __name__ == "__main__":
    main()
