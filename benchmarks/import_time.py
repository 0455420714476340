"""What `import loka` adds to `import torch`, in fresh processes, and what `loka --help` takes."""

import argparse
import statistics
import subprocess
import sys
from typing import Any

from benchmarks.record import write_record

_IMPORT = """
import time, torch
start = time.process_time()
import loka
print(time.process_time() - start)
"""
_HELP = """
import time
start = time.process_time()
import torch
middle = time.process_time()
import sys
sys.argv = ["loka", "--help"]
from loka.cli import main
try:
    main()
except SystemExit:
    pass
print()
print(time.process_time() - start, middle - start)
"""


def _last_line(code: str) -> list[float]:
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return [float(value) for value in output.strip().split("\n")[-1].split()]


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run, without meaning")
    rounds = 2 if parser.parse_args().quick else 10
    imports = [_last_line(_IMPORT)[0] for _ in range(rounds)]
    helps = [_last_line(_HELP) for _ in range(rounds)]
    results: dict[str, Any] = {
        "import loka after import torch, s, median": statistics.median(imports),
        "import loka after import torch, s, worst": max(imports),
        "loka --help, s of CPU, median": statistics.median(total for total, _ in helps),
        "of which import torch, s, median": statistics.median(torch_s for _, torch_s in helps),
    }
    write_record("import_time", {"processes": rounds}, results)


if __name__ == "__main__":
    main()
