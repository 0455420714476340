"""What bounds LoKA's placement on requests not seen: what their prefill tells, how many were fitted, or the load cap.

    python -m benchmarks.moe.placement_bounds TRACE [--splits 10] [--first-seed 100]

Each half of a trace is judged as in `benchmarks.moe_placement`, and then with one thing known that a server does not
know: which experts the requests will use when they are sent to devices, or when experts are placed.
"""

import argparse
import hashlib
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.moe_placement import DEVICES, halves, spread
from benchmarks.record import write_record
from loka.dispatch.placement.evaluate import evaluate, flow
from loka.dispatch.placement.grouping import assign_equal
from loka.dispatch.placement.options import PlaceOptions
from loka.dispatch.placement.place import place
from loka.dispatch.placement.smoothing import smooth
from loka.dispatch.placement.transport import carried
from loka.dispatch.placement.usage import device_of, group_use, hosts_of, usable_layers
from loka.probes.routing.trace import RoutingTrace

SPLITS: Final[int] = 10
FIRST_SEED: Final[int] = 100  # halves that the method was made on


def moved(decode: np.ndarray, groups: np.ndarray, device: np.ndarray) -> float:
    """Return the tokens that leave their device, of decode [request, layer, expert] and places [layer, expert]."""
    flows = flow(group_use(decode, groups, DEVICES), hosts_of(device, DEVICES))
    return float((flows * (1 - np.eye(DEVICES))).sum())


def peak(served: np.ndarray, weight: np.ndarray | None = None) -> float:
    """Return the largest load over the mean one, of tokens [request, device] and a weight per request."""
    load = np.average(served, axis=0, weights=weight)
    return float(load.max() / load.mean())


def mix_of(fit: tuple[str, ...], other: tuple[str, ...]) -> np.ndarray:
    """Return weights of the other requests with which their domains are as frequent as in the fitted half."""
    names = np.array(other)
    return np.array([np.mean(np.array(fit) == name) / np.mean(names == name) for name in other])


def told(trace: RoutingTrace) -> float:
    """Return the share of the variance of requests' decode counts that the others tell from its prefill."""
    counts = trace.decode.reshape(trace.requests, -1).astype(np.float64)
    left = ((smooth(trace.prefill, trace.decode).known - counts) ** 2).sum()
    return float(1 - left / ((counts.mean(axis=0) - counts) ** 2).sum())


def bounds(fit: RoutingTrace, other: RoutingTrace) -> dict[str, dict[str, float]]:
    """Return bytes over linear's and loads, by what is known."""
    options = PlaceOptions(devices=DEVICES)
    placement = place(fit, options)
    judged = evaluate(placement, other).methods
    same = evaluate(place(other, options), other).methods
    device = device_of(placement.hosts("loka"))
    order = np.tile(np.arange(other.experts) * DEVICES // other.experts, (len(other.layers), 1))
    linear = moved(other.decode, np.arange(other.requests) % DEVICES, order)
    served = [
        carried(each.decode.reshape(each.requests, -1).astype(np.float64), device, DEVICES) for each in (fit, other)
    ]
    knowing = moved(other.decode, assign_equal(served[1]), device) / linear
    return {
        "judged": {
            "bytes / linear": judged["loka"].bytes / judged["linear"].bytes,
            "load": judged["loka"].imbalance,
            "load on the fitted half": peak(served[0]),
            "load at the fitted mix of domains": peak(served[1], mix_of(fit.domain, other.domain)),
            "variance told by prefill": told(fit),
        },
        "groups by what was decoded": {"bytes / linear": knowing},
        "fitted to the judged half": {"bytes / linear": same["loka"].bytes / same["linear"].bytes},
    }


def main() -> None:
    """Judge so many halves and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--splits", type=int, default=SPLITS)
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--quick", action="store_true", help="one split, no record")
    chosen = parser.parse_args()
    trace = RoutingTrace.load(chosen.trace)
    layers, notes = usable_layers(trace)
    trace = trace.select(layers=layers)
    found: dict[str, list[dict[str, float]]] = {}
    for split in range(chosen.first_seed, chosen.first_seed + (1 if chosen.quick else chosen.splits)):
        for name, figures in bounds(*halves(trace, split)).items():
            found.setdefault(name, []).append(figures)
        print(f"split {split}: {found['judged'][-1]}", flush=True)
    settings = {
        "trace": hashlib.sha256(chosen.trace.read_bytes()).hexdigest(),
        "splits": [chosen.first_seed, chosen.splits],
        "devices": DEVICES,
        "notes": list(notes),
    }
    command = (
        f"python -m benchmarks.moe.placement_bounds TRACE --splits {chosen.splits} --first-seed {chosen.first_seed}"
    )
    results = {name: spread(rows) for name, rows in found.items()} | {"rows": found}
    write_record("moe.placement_bounds", settings, results, command=command)


if __name__ == "__main__":
    main()
