"""Seconds of processor time that a test may hold to a number, on a machine of any speed.

On one where `_work` takes NOMINAL_S or less they are held to it as it stands. On slower ones (an EPYC with AVX2 alone,
or any that others share: 0.015 to 0.036) what was measured counts for as much less.
"""

import statistics
import time
from typing import Final

NOMINAL_S: Final = 0.010


def seconds_since(began: float) -> float:
    """Return the processor time since `time.process_time()` was `began`, as on the machine of the numbers."""
    seconds = time.process_time() - began
    return seconds * min(1.0, NOMINAL_S / statistics.median(_work_s() for _ in range(5)))


def _work_s() -> float:
    begin = time.process_time()
    _work()
    return time.process_time() - begin


def _work() -> int:
    """Do what reading, judging and deciding do most: small objects, looked up, compared, sorted and joined."""
    rows = [{"site": f"layer{i % 97}", "error": (i * 7919) % 1009 / 1009} for i in range(12_000)]
    best: dict[str, float] = {}
    for row in sorted(rows, key=lambda row: (row["site"], row["error"])):
        best[row["site"]] = min(best.get(row["site"], 1.0), row["error"])
    return len(",".join(f"{site}:{error:.4g}" for site, error in best.items()))
