"""LoKA's own placement: request groups and expert places found together, fewest bytes under a cap on device load.

Given the groups, each layer is a transportation problem (transport.py). Given the places, the groups are an assignment
problem with equal sizes (grouping.py). The two alternate from several starts, while the price of load on each device,
one for all layers, rises or falls with what it carries. Groups are formed from what the prefill tells (as they will be
when requests are served), places from denoised decode counts (smoothing.py). In the end places settle for groups as
uncertain predictions will form them: a request that fits two devices nearly as well counts on both.
"""

from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from loka.dispatch.placement.grouping import assign_equal, clusters_of, likely_groups, normalised
from loka.dispatch.placement.options import PlaceOptions
from loka.dispatch.placement.smoothing import Smoothed
from loka.dispatch.placement.transport import Load, Repair, carried, load_of, place_by_gain, places_under_load

_SWEEPS: Final[int] = 24
_STEP: Final[float] = 0.1  # of prices, in shares of the mean load; it falls with the sweeps
_SETTLED: Final[int] = 3  # of the starts, the best
_SETTLING: Final[int] = 14  # sweeps of prices once groups stand
_SETTLING_STEP: Final[float] = 0.12  # of these prices, as _STEP; with 0.02 to 0.12 they end alike, with 0.3 they swing
_STAYED: Final[float] = 0.5  # of the experts: with fewer, groups are told again for the places that came out
_ASKED: Final[int] = 3  # times at most
_FEW: Final[int] = 2  # starts, where only the order of magnitude matters
_WORK: Final[int] = 24_000  # layers x experts of all starts together
_MARGINS: Final[tuple[float, ...]] = (1.0, 0.75, 0.5, 0.25)
_COST: Final[float] = 0.1  # of what is saved beyond chance, that the whole margin may cost
_ROUNDING: Final[float] = 1e-6
_NEAR: Final[float] = 1.05  # a whole margin that is missed by so little is worth more than half of one that is kept


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Problem:
    """What is placed: requests' counts [request, layer * expert] and what is known of them, and the rules."""

    counts: np.ndarray  # float32
    smoothed: Smoothed
    layers: int
    slots: np.ndarray  # [device]
    affinity: np.ndarray  # [host, served]: share of a token's cost that is saved; symmetric
    margin: float
    options: PlaceOptions
    before: np.ndarray | None = None  # device of each expert in the placement that is replaced

    @property
    def devices(self) -> int:
        """How many devices there are."""
        return len(self.slots)

    @property
    def stay(self) -> np.ndarray:
        """What an expert gains by staying where it is, in tokens per request [layer, device, expert]."""
        shape = (self.layers, self.devices, self.counts.shape[1] // self.layers)
        if self.before is None or not self.options.move_tokens:
            return np.zeros(shape)
        held = self.before[:, None, :] == np.arange(self.devices)[None, :, None]
        return np.asarray(held * (self.options.move_tokens / len(self.counts)))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Joint:
    """Places [layer, expert] and groups [request]; `saved`: tokens per request whose cost is saved."""

    device: np.ndarray
    groups: np.ndarray
    saved: float
    value: float  # less the weight of the busiest devices
    held: bool  # the cap on load, with its margin
    ratio: float  # load to be prepared for over the mean load, of the busiest device


def affinity_of(options: PlaceOptions) -> np.ndarray:
    """Return what a token saves on each device, [host, served]: all at home, in the same node what that is cheaper."""
    node = np.arange(options.devices) // (options.devices // options.nodes)
    near = (1.0 - options.intra_cost) * (node[:, None] == node) if options.nodes > 1 else 0.0
    return np.asarray(np.maximum(np.eye(options.devices), near))


def solve(problem: Problem) -> tuple[Joint, Problem]:
    """Return the best of several starts, and the problem with the margin that it was solved for.

    The load cap holds with the whole margin, unless that costs more than a tenth of what is saved beyond chance (as
    where domains and devices are one to one: a device then works when its domain asks); then with a half, a quarter, or
    none. Deterministic for a seed.
    """
    if not problem.margin:
        return _best_start(problem, _starts(problem)), problem
    starts = _starts(problem)
    free = replace(problem, margin=0.0)
    bound = _best_start(free, starts[:_FEW])
    chance = float(problem.counts.mean(axis=0, dtype=np.float64).sum() * problem.affinity.mean())
    for share in _MARGINS:
        tried = replace(problem, margin=problem.margin * share)
        found = _best_start(tried, starts if share == 1.0 else starts[:_FEW])
        near = found.ratio <= problem.options.max_load * _NEAR
        if near and found.saved >= bound.saved - _COST * abs(bound.saved - chance) - _ROUNDING * chance:
            return found, tried
    return bound, free


def _best_start(problem: Problem, starts: list[np.ndarray]) -> Joint:
    found = sorted((_alternate(problem, groups) for groups in starts), key=lambda joint: -joint.value)
    settled = [_settled(problem, joint) for joint in found[:_SETTLED]]
    held = [joint for joint in settled if joint.held]
    return max(held, key=lambda joint: joint.value) if held else min(settled, key=lambda joint: joint.ratio)


def refined(problem: Problem, joint: Joint, use: np.ndarray) -> Joint:
    """Return the placement made anew for `use` [layer, device, expert], tokens per request of many more requests."""
    gain = gain_of(problem, use)
    device = places_under_load(
        gain, problem.counts, problem.slots, max_load=problem.options.max_load, margin=problem.margin
    )
    load = load_of(problem.counts, device, problem.devices, problem.margin)
    groups = assign_equal(_scores(problem, device), problem.options.slack)
    return _joint(problem, device, groups, load)


def gain_of(problem: Problem, use: np.ndarray) -> np.ndarray:
    """Return tokens saved per request by each expert on each device [layer, device, expert]."""
    return np.asarray(np.einsum("hd,lde->lhe", problem.affinity, use) + problem.stay)


def _starts(problem: Problem) -> list[np.ndarray]:
    """Return first groups: those of the placement before, clusters cut into equal parts, and random ones."""
    requests, options = len(problem.counts), problem.options
    rng = np.random.default_rng(options.seed)
    count = int(np.clip(_WORK // problem.counts.shape[1], 2, 10))
    labels = clusters_of(normalised(problem.smoothed.known.clip(min=0)), problem.devices, options.seed)
    starts = [np.argsort(np.argsort(labels, kind="stable"), kind="stable") * problem.devices // requests]
    if problem.before is not None:
        scores = carried(problem.smoothed.known, problem.before, problem.devices) @ problem.affinity
        starts.insert(0, assign_equal(scores, options.slack))
    starts += [rng.permutation(requests) % problem.devices for _ in range(count - 1)]
    return starts


def _alternate(problem: Problem, groups: np.ndarray) -> Joint:
    """Return where one start leads."""
    options, counts = problem.options, problem.counts
    prices = np.zeros(problem.devices)
    weight = np.repeat(counts.mean(axis=0, dtype=np.float64).reshape(problem.layers, 1, -1), problem.devices, axis=1)
    rush = np.zeros((problem.layers, problem.devices))
    best: Joint | None = None
    for sweep in range(_SWEEPS):
        gain = gain_of(problem, _use(problem, groups))
        device = place_by_gain(gain - (prices + rush)[:, :, None] * weight, problem.slots)
        load = load_of(counts, device, problem.devices, problem.margin)
        weight = load.weight
        prices = np.maximum(prices + _STEP / (1 + sweep / 8) * (load.ratio - options.max_load), 0.0)
        if options.busiest:  # prices chase the busiest device from one place to another; the best sweep counts
            found = _joint(problem, device, groups, load)
            best = found if best is None or found.value > best.value else best
            rush += (_rush(problem, device) - rush) / (sweep + 2)  # their mean settles where none is the busiest
        slack = options.slack if sweep > _SWEEPS // 2 else 0.0
        moved = assign_equal(_scores(problem, device), slack)
        if np.array_equal(moved, groups) and slack and (load.ratio.max() < options.max_load * 1.02):
            break
        groups = moved
    return best or _joint(problem, device, groups, load)


def _use(problem: Problem, groups: np.ndarray) -> np.ndarray:
    """Return denoised tokens per request that each group sends to each expert [layer, device, expert]."""
    return _use_of(problem, (groups == np.arange(problem.devices)[:, None]).astype(np.float32))


def _use_of(problem: Problem, member: np.ndarray) -> np.ndarray:
    """Return the same for requests that belong to several devices in part, `member` [device, request]."""
    use = (member @ problem.smoothed.cleaned).astype(np.float64) / member.shape[1]
    return np.asarray(use.reshape(problem.devices, problem.layers, -1).transpose(1, 0, 2))


def _scores(problem: Problem, device: np.ndarray) -> np.ndarray:
    """Return what each request is expected to save on each device, from its prefill [request, device]."""
    saved = carried(problem.smoothed.known, device, problem.devices).astype(np.float64)
    return np.asarray(saved @ problem.affinity)


def _rush(problem: Problem, device: np.ndarray) -> np.ndarray:
    """Return the price of load on each layer's busiest devices; they share a weight of `busiest` between them."""
    experts = problem.counts.shape[1] // problem.layers
    mean = problem.counts.mean(axis=0, dtype=np.float64).reshape(problem.layers, experts)
    served = np.stack([np.bincount(device[at], mean[at], problem.devices) for at in range(problem.layers)])
    busy = served / np.maximum(served.mean(axis=1, keepdims=True), 1e-12)
    share = np.exp(4.0 * (busy - busy.max(axis=1, keepdims=True)))
    return np.asarray(problem.options.busiest * share / share.sum(axis=1, keepdims=True))


def _busiest(problem: Problem, device: np.ndarray, use: np.ndarray) -> float:
    """Return what each layer's busiest device sends or receives, tokens per request summed over layers."""
    if not problem.options.busiest:
        return 0.0
    held = device[:, None, :] == np.arange(problem.devices)[None, :, None]
    home = (use * held).sum(axis=2)
    mean = problem.counts.mean(axis=0, dtype=np.float64).reshape(problem.layers, 1, -1)
    received = (mean * held).sum(axis=2) - home
    return float(np.maximum(received, use.sum(axis=2) - home).max(axis=1).sum())


def _joint(problem: Problem, device: np.ndarray, groups: np.ndarray, load: Load) -> Joint:
    use = _use(problem, groups)
    saved = float(np.take_along_axis(gain_of(problem, use), device[:, None, :], axis=1).sum())
    ratio = float(load.ratio.max())
    return Joint(
        device=device,
        groups=groups,
        saved=saved,
        value=saved - problem.options.busiest * _busiest(problem, device, use),
        held=ratio <= problem.options.max_load * (1 + 1e-9),
        ratio=ratio,
    )


def _settled(problem: Problem, joint: Joint) -> Joint:
    """Return the places for groups as they are likely to come out when requests are served, within the cap.

    Groups of the trace itself are fitted to its requests; later ones go where an uncertain score sends them. A score is
    of given places: where most experts move, what it said is of places that are gone, and it is asked again.
    """
    for _ in range(_ASKED):
        settled = _settled_once(problem, joint)
        stayed = (settled.device == joint.device).mean()
        joint = settled
        if stayed >= _STAYED:
            break
    return joint


def _settled_once(problem: Problem, joint: Joint) -> Joint:
    served = carried(problem.counts, joint.device, problem.devices)
    doubt = float((carried(problem.smoothed.known, joint.device, problem.devices) - served).std())
    member = likely_groups(_scores(problem, joint.device), doubt).T.astype(np.float32)
    gain = gain_of(problem, _use_of(problem, member))
    repair = Repair(gain, problem.counts, _priced(problem, joint, gain), problem.margin)
    repair.run(problem.options.max_load)
    groups = assign_equal(_scores(problem, repair.device), problem.options.slack)
    load = load_of(problem.counts, repair.device, problem.devices, problem.margin)
    return _joint(problem, repair.device, groups, load)


def _priced(problem: Problem, joint: Joint, gain: np.ndarray) -> np.ndarray:
    """Return the places [layer, expert] with the most gain, at prices of load that come to rest near the cap."""
    device, groups = joint.device, joint.groups
    prices, rush = np.zeros(problem.devices), np.zeros((problem.layers, problem.devices))
    best = joint
    for sweep in range(_SETTLING):
        load = load_of(problem.counts, device, problem.devices, problem.margin)
        prices = np.maximum(prices + _SETTLING_STEP / (1 + sweep / 4) * (load.ratio - problem.options.max_load), 0.0)
        if problem.options.busiest:  # as while groups and places alternated
            found = _joint(problem, device, groups, load)
            best = found if found.value > best.value else best
            rush += (_rush(problem, device) - rush) / (sweep + 2)
        placed = place_by_gain(gain - (prices + rush)[:, :, None] * load.weight, problem.slots)
        if np.array_equal(placed, device) and not (prices.any() or rush.any()):
            break
        device = placed
    return best.device if problem.options.busiest else device
