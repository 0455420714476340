"""Bytes between devices against device load: one half of a routing trace is fitted to, the other half is judged.

    python -m benchmarks.moe_placement TRACE            # 8 devices, no replicas, five random halves, curve of loads
    python -m benchmarks.moe_placement TRACE --splits 30 --first-seed 300   # thirty other halves, with standard errors
    python -m benchmarks.moe_placement --scale          # time and memory for 10,000 requests x 58 layers x 256 experts

Requests of the judged half are sent to devices from their prefill alone: all at once, 16 at a time, and one by one,
always in groups equal within 10 %. Linear and EPLB serve requests in turn. Every figure is a ratio of counts.
"""

import argparse
import hashlib
import resource
import time
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.record import write_record
from loka.dispatch.placement.evaluate import Evaluation, evaluate
from loka.dispatch.placement.options import PlaceOptions
from loka.dispatch.placement.place import place
from loka.dispatch.placement.usage import usable_layers
from loka.probes.routing.trace import RoutingTrace

DEVICES: Final[int] = 8
SPLITS: Final[int] = 5
FIRST_SPLIT: Final[int] = 1000  # earlier ones were looked at while the method was made
CURVE: Final[tuple[float, ...]] = (1.05, 1.1, 1.2, 1.35, 1.6, 2.5)
WINDOWS: Final[dict[str, int]] = {"": 1024, ", 16 at a time": 16, ", one by one": 1}
TARGET: Final[dict[str, float]] = {"bytes": 0.80, "load": 1.2}


def halves(trace: RoutingTrace, split: int) -> tuple[RoutingTrace, RoutingTrace]:
    """Return two random halves of a trace's requests."""
    order = np.random.default_rng(split).permutation(trace.requests)
    return trace.select(requests=order[: trace.requests // 2]), trace.select(requests=order[trace.requests // 2 :])


def row(judged: Evaluation, name: str) -> dict[str, float]:
    """Return one method's figures, against linear and EPLB on the same requests."""
    costs = judged.methods
    sizes = np.array(costs[name].group_sizes)
    return {
        "bytes / linear": costs[name].bytes / costs["linear"].bytes,
        "bytes / eplb": costs[name].bytes / costs["eplb"].bytes,
        "busiest / linear": costs[name].busiest / costs["linear"].busiest,
        "load": costs[name].imbalance,
        "layer load": costs[name].layer_imbalance,
        "largest group": float(sizes.max() / sizes.mean()),
    }


def spread(rows: list[dict[str, float]]) -> str:
    """Return mean, lowest and highest of each figure; of many halves, the standard error of the mean as well.

    Halves of one trace overlap, so the error is that of drawing halves, not of drawing another trace.
    """
    parts = []
    for key in rows[0]:
        values = [each[key] for each in rows]
        error = f"+-{np.std(values, ddof=1) / len(values) ** 0.5:.4f} " if len(values) > SPLITS else ""
        parts.append(f"{key} {np.mean(values):.{4 if error else 3}f} {error}({min(values):.3f}-{max(values):.3f})")
    return "; ".join(parts)


def study(trace: RoutingTrace, splits: range, curve: tuple[float, ...]) -> dict[str, Any]:
    """Return what each method reaches on the halves that were not fitted to."""
    found: dict[str, list[dict[str, float]]] = {}
    for load in sorted(curve, key=lambda each: each != TARGET["load"]):
        for split in splits:
            fit, other = halves(trace, split)
            placement = place(fit, PlaceOptions(devices=DEVICES, max_load=load))
            for said, window in WINDOWS.items() if load == TARGET["load"] else ((f", cap {load:g}", 1024),):
                judged = evaluate(placement, other, window=window)
                found.setdefault(f"loka{said}", []).append(row(judged, "loka"))
            if load == TARGET["load"]:
                for name in ("linear", "eplb", "paper"):
                    found.setdefault(name, []).append(row(evaluate(placement, other), name))
                print(f"split {split}: {spread(found['loka'][-1:])} {placement.notes[-1:]}", flush=True)
    return {name: spread(rows) for name, rows in found.items()} | {"rows": found}


def clustered(requests: int, layers: int, experts: int, *, kinds: int = 40, seed: int = 0) -> RoutingTrace:
    """Return counts of requests of so many kinds, each with its own liking for experts, top-8, 128 decode steps."""
    rng, taste = np.random.default_rng(seed), np.random.default_rng(0)  # other requests, the same likings
    counts = np.empty((requests, 2, layers, experts), dtype=np.uint16)
    kind = rng.integers(kinds, size=requests)
    for layer in range(layers):
        likes = taste.gamma(0.5, 1.0, size=(kinds, experts)) + 0.2
        likes /= likes.sum(axis=1, keepdims=True)
        for phase, tokens in enumerate((512, 1024)):
            counts[:, phase, layer] = rng.poisson(tokens * likes[kind])
    return RoutingTrace(
        counts=counts,
        domain=tuple(f"kind {at}" for at in kind),
        layers=tuple(range(3, 3 + layers)),
        hidden_size=7168,
        top_k=8,
    )


def scale(requests: int, layers: int, experts: int) -> dict[str, Any]:
    """Return time and peak memory of placing a large model; the trace itself is part of the memory."""
    trace = clustered(requests, layers, experts)
    before = time.monotonic()
    cpu = time.process_time()
    placement = place(trace, PlaceOptions(devices=DEVICES))
    seconds, cpu = time.monotonic() - before, time.process_time() - cpu
    judged = evaluate(placement, clustered(requests // 10, layers, experts, seed=1))
    return {
        "seconds": round(seconds, 1),
        "CPU seconds": round(cpu, 1),
        "peak MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "trace MB": round(trace.counts.nbytes / 2**20),
        **{name: spread([row(judged, name)]) for name in ("paper", "loka")},
    }


def named(chosen: argparse.Namespace) -> tuple[str, str]:
    """Return the name of the record and the command that makes it; other halves never take the main record's place."""
    main_halves = chosen.splits is None and chosen.first_seed == FIRST_SPLIT
    usual = "moe_placement" if main_halves else "moe_placement_splits"
    given = {"splits": chosen.splits, "first-seed": chosen.first_seed, "record": chosen.record}
    default = {"splits": None, "first-seed": FIRST_SPLIT, "record": None}
    said = [f" --{option} {value}" for option, value in given.items() if value != default[option]]
    return chosen.record or usual, "python -m benchmarks.moe_placement TRACE" + "".join(said)


def main() -> None:
    """Run the study, or the measurement at scale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", nargs="?", type=Path)
    parser.add_argument("--record", help="name of the record, for another trace")
    parser.add_argument("--quick", action="store_true", help="one split, no curve; at scale, a twentieth")
    parser.add_argument("--splits", type=int, help=f"how many halves, {SPLITS} unless given; given, no curve")
    parser.add_argument("--first-seed", type=int, default=FIRST_SPLIT, help="of the first half; others follow")
    parser.add_argument("--scale", action="store_true", help="time and memory instead")
    chosen = parser.parse_args()
    if chosen.scale:
        size = (500, 12, 256) if chosen.quick else (10_000, 58, 256)
        settings: dict[str, Any] = {"requests": size[0], "layers": size[1], "experts": size[2], "devices": DEVICES}
        write_record(
            "moe_placement_scale", settings, scale(*size), command="python -m benchmarks.moe_placement --scale"
        )
        return
    if chosen.trace is None:
        parser.error("give a routing trace, or --scale")
    if chosen.splits is not None and chosen.splits < 1:
        parser.error("give at least one split")
    trace = RoutingTrace.load(chosen.trace)
    layers, notes = usable_layers(trace)
    settings = {
        "trace": hashlib.sha256(chosen.trace.read_bytes()).hexdigest(),
        "requests": trace.requests,
        "layers": len(layers),
        "notes": list(notes),
        "devices": DEVICES,
        "target": TARGET,
    }
    count = 1 if chosen.quick else chosen.splits or SPLITS
    whole = not chosen.quick and chosen.splits is None
    splits = range(chosen.first_seed, chosen.first_seed + count)
    results = study(trace.select(layers=layers), splits, CURVE if whole else (TARGET["load"],))
    name, command = named(chosen)
    write_record(name, settings, results, command=command)


if __name__ == "__main__":
    main()
