"""From a trace to a placement: linear, EPLB, the paper's and LoKA's, side by side.

linear: experts in order, requests in turn. eplb: DeepSeek's balancing of load per layer, requests in turn. paper:
K-means groups and greedy coverage (arXiv 2604.23150). loka: groups and places found together (joint.py). Replicas,
where asked for, fill every device further: by load for EPLB, by the group's use for the paper, and where they save for
LoKA.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Final

import numpy as np

from loka.dispatch.placement.eplb import eplb_hosts
from loka.dispatch.placement.grouping import assign_arriving, normalised, paper_groups
from loka.dispatch.placement.joint import Joint, Problem, affinity_of, gain_of, refined, solve
from loka.dispatch.placement.options import PlaceOptions
from loka.dispatch.placement.record import MethodPlacement, Placement, physical_of
from loka.dispatch.placement.signature import Codes, Signature
from loka.dispatch.placement.smoothing import Smoothed, smooth
from loka.dispatch.placement.usage import (
    check_devices,
    device_of,
    group_use,
    hosts_of,
    only_layers,
    slots_of,
    trace_hash,
    typical_shares,
    usable_layers,
)
from loka.errors import ArgumentError
from loka.probes.routing.trace import RoutingTrace
from loka.version import VERSION

SAMPLE: Final[int] = 768  # requests that groups and predictions are fitted to; places are fitted to all of them
WINDOW: Final[int] = 128  # requests per device that are decided together, as in the paper's batches

_log = logging.getLogger("loka.placement")
Tick = Callable[[int, int, str], None]


def place(
    trace: RoutingTrace, options: PlaceOptions, *, previous: Placement | None = None, on_progress: Tick | None = None
) -> Placement:
    """Place the experts of a trace by every method. Raises ArgumentError for what cannot be placed.

    `previous`: the placement in force; with `options.move_tokens` an expert moves only where that pays.
    """
    check_devices(options.devices, options.nodes, trace.experts, options.replicas)
    layers, notes = usable_layers(trace, options.layers)
    used = only_layers(trace, layers)
    before = None if previous is None else _before(previous, layers, options.devices, trace.experts)
    steps: dict[str, Callable[[], tuple[MethodPlacement, tuple[str, ...]]]] = {
        "linear": lambda: _linear(used, options),
        "eplb": lambda: _eplb(used, options),
        "paper": lambda: _paper(used, options),
        "loka": lambda: _loka(used, options, before),
    }
    methods = {}
    for at, (name, make) in enumerate(steps.items()):
        if on_progress is not None:
            on_progress(at, len(steps), name)
        methods[name], more = make()
        notes += more
    for note in notes:
        _log.info("%s", note)
    return Placement(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        devices=options.devices,
        nodes=options.nodes,
        experts=trace.experts,
        layers=layers,
        slack=options.slack,
        methods=methods,
        provenance={
            "trace": trace_hash(trace),
            "requests": str(trace.requests),
            "model": trace.model,
            "loka": VERSION,
        },
        settings={
            name: float(value)
            for name, value in asdict(options).items()
            if name not in ("layers", "devices", "nodes") and value is not None and np.isfinite(value)
        },
        hidden_size=trace.hidden_size,
        notes=notes,
    )


def _before(previous: Placement, layers: tuple[int, ...], devices: int, experts: int) -> np.ndarray:
    """Return the device of each expert in the placement that is replaced, [layer, expert]."""
    missing = [layer for layer in layers if layer not in previous.layers]
    if missing or (previous.devices, previous.experts) != (devices, experts):
        raise ArgumentError(
            f"The previous placement is of {previous.experts} experts on {previous.devices} devices"
            f"{f', without layers {missing[:5]}' if missing else ''}; this one is of {experts} on {devices}. "
            "Give one of the same model and devices, or none."
        )
    rows = [previous.layers.index(layer) for layer in layers]
    return device_of(previous.hosts("loka"))[rows]


def _linear(trace: RoutingTrace, options: PlaceOptions) -> tuple[MethodPlacement, tuple[str, ...]]:
    device = np.repeat(np.arange(options.devices), slots_of(trace.experts, options.devices))
    hosts = hosts_of(np.tile(device, (len(trace.layers), 1)), options.devices)
    use = np.zeros(hosts.shape)  # replicas of what comes next in order
    for at in range(options.devices):
        use[:, at] = -((np.arange(trace.experts) - int(device.searchsorted(at, side="right"))) % trace.experts)
    return MethodPlacement(physical_to_logical=physical_of(with_replicas(hosts, use, options.replicas))), ()


def _eplb(trace: RoutingTrace, options: PlaceOptions) -> tuple[MethodPlacement, tuple[str, ...]]:
    load = trace.decode.sum(axis=0, dtype=np.float64)
    capacity = slots_of(trace.experts, options.devices) + options.replicas
    hosts = eplb_hosts(load, capacity, nodes=options.nodes, groups=options.expert_groups)
    return MethodPlacement(physical_to_logical=physical_of(hosts)), ()


def _paper(trace: RoutingTrace, options: PlaceOptions) -> tuple[MethodPlacement, tuple[str, ...]]:
    sample = _sample(trace, options.seed)
    groups, cluster = paper_groups(sample.decode, options.devices, clusters=options.clusters, seed=options.seed)
    use = group_use(sample.decode, groups, options.devices)
    hosts = hosts_of(greedy_coverage(use, slots_of(trace.experts, options.devices)), options.devices)
    points = normalised(sample.prefill)
    centroids = np.stack([points[np.isin(groups, np.flatnonzero(cluster == at))].mean(axis=0) for at in cluster])
    signature = Signature(
        rule="nearest",
        typical=Codes.of(typical_shares(sample.prefill)[None]),
        share=Codes.of(centroids.reshape(options.devices, len(trace.layers), trace.experts)),
    )
    physical = physical_of(with_replicas(hosts, use, options.replicas))
    return MethodPlacement(physical_to_logical=physical, signature=signature), ()


def greedy_coverage(use: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Return the paper's first phase [layer, expert] -> device: each expert to the group that uses it most, with room.

    Experts in the order of their use (the paper names no order), heaviest first; ties go to the device with most room.
    """
    layers, _, experts = use.shape
    device = np.empty((layers, experts), dtype=np.int64)
    for layer in range(layers):
        left = slots.copy()
        for expert in np.argsort(-use[layer].sum(axis=0), kind="stable"):
            wanted = np.where(left > 0, use[layer, :, expert], -1.0)
            best = np.flatnonzero(wanted == wanted.max())
            at = int(best[left[best].argmax()])
            device[layer, expert] = at
            left[at] -= 1
    return device


def with_replicas(hosts: np.ndarray, use: np.ndarray, replicas: int, *, only_useful: bool = False) -> np.ndarray:
    """Return `hosts` with each device's most-used missing experts added, as many as `replicas` per layer."""
    if not replicas:
        return hosts
    missing = np.where(hosts, -np.inf, use)
    order = np.argsort(-missing, axis=2, kind="stable")[:, :, :replicas]
    value = np.take_along_axis(missing, order, axis=2)
    result = hosts.copy()
    np.put_along_axis(result, order, (value > 0) if only_useful else np.isfinite(value), axis=2)
    return np.asarray(result | hosts)


def _loka(
    trace: RoutingTrace, options: PlaceOptions, before: np.ndarray | None
) -> tuple[MethodPlacement, tuple[str, ...]]:
    sample = _sample(trace, options.seed)
    smoothed = smooth(sample.prefill, sample.decode)
    spread = float(np.sqrt(2 / trace.requests))  # of the mean of this many requests, and of as many to come
    problem = Problem(
        counts=sample.decode.reshape(sample.requests, -1).astype(np.float32),
        smoothed=smoothed,
        layers=len(trace.layers),
        slots=slots_of(trace.experts, options.devices),
        affinity=affinity_of(options),
        margin=options.caution * spread,
        options=options,
        before=before,
    )
    joint, problem = solve(problem)
    use = group_use(sample.decode, joint.groups, options.devices) / sample.requests
    signature = _signature(problem, joint)
    if trace.requests > sample.requests:
        groups = assign_arriving(signature.scores(trace.prefill), WINDOW * options.devices, options.slack)
        use = group_use(trace.decode, groups, options.devices) / trace.requests
        joint = refined(problem, joint, use)
        signature = _signature(problem, joint)
    hosts = with_replicas(
        hosts_of(joint.device, options.devices), gain_of(problem, use), options.replicas, only_useful=True
    )
    notes = _load_notes(joint, problem.margin / spread if spread else 0.0, options)
    return MethodPlacement(physical_to_logical=physical_of(hosts), signature=signature), notes


def _load_notes(joint: Joint, caution: float, options: PlaceOptions) -> tuple[str, ...]:
    """Return what to know of the load cap, where it is not what was asked for."""
    if not joint.held:
        reached = f"{joint.ratio:.2f} x the mean is what the busiest device should be prepared for"
        return (f"loka: a load of {options.max_load:g} could not be promised for other requests; {reached}",)
    if caution < options.caution * (1 - 1e-9):
        kept = f"{caution:g} x the deviation of a batch's mix"
        return (f"loka: the load cap is kept with {kept}; {options.caution:g} would cost a tenth of what is saved",)
    return ()


def _signature(problem: Problem, joint: Joint) -> Signature:
    """Return how requests find their device under a placement."""
    smoothed: Smoothed = problem.smoothed
    hosts = hosts_of(joint.device, problem.devices)
    hosted = np.einsum("hd,lhe->dle", problem.affinity, hosts).reshape(problem.devices, -1)
    share, root, constant = smoothed.regression.weights(hosted)
    shape = (problem.devices, problem.layers, -1)
    return Signature(
        rule="balanced",
        typical=Codes.of(smoothed.typical[None]),
        share=Codes.of(share.reshape(shape)),
        root=Codes.of(root.reshape(shape)),
        constant=Codes.of(constant[None, None]),
    )


def _sample(trace: RoutingTrace, seed: int) -> RoutingTrace:
    """Return at most SAMPLE requests of a trace, drawn without replacement."""
    if trace.requests <= SAMPLE:
        return trace
    drawn = np.random.default_rng(seed).choice(trace.requests, SAMPLE, replace=False)
    return trace.select(requests=np.sort(drawn))
