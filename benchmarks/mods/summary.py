"""From finished trainings to figures: every arm against fp32, and against fp32 with the same mods, seed by seed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from benchmarks.mods.arms import ARMS, Arm
from benchmarks.paired import paired


class Trained(Protocol):
    """What is needed of a finished training."""

    @property
    def arm(self) -> str:
        """Its name."""

    @property
    def seed(self) -> int:
        """Its seed."""

    @property
    def moments(self) -> tuple[str, ...]:
        """When it was judged."""

    @property
    def losses(self) -> tuple[float, ...]:
        """The loss at each moment until it ceased to be finite."""

    @property
    def fp8_share(self) -> float:
        """Share of its products' work in FP8."""


Losses = Mapping[int, Sequence[float]]  # seed -> loss at each moment


def summarised(rows: Sequence[Trained]) -> dict[str, Any]:
    """Return the figures of one workload."""
    moments = rows[0].moments
    by_arm: dict[str, dict[int, Sequence[float]]] = {}
    shares: dict[str, list[float]] = {}
    for row in rows:
        by_arm.setdefault(row.arm, {})[row.seed] = row.losses
        shares.setdefault(row.arm, []).append(row.fp8_share)
    arms = {
        arm.name: _arm(arm, by_arm, len(moments)) | {"fp8 share": _mean(shares[arm.name])}
        for arm in ARMS
        if arm.name in by_arm
    }
    return {"moments": list(moments), "arms": arms}


def _arm(arm: Arm, by_arm: Mapping[str, Losses], moments: int) -> dict[str, Any]:
    own = by_arm[arm.name]
    whole = {seed: losses for seed, losses in own.items() if len(losses) == moments}
    fp32 = Arm(numerics="fp32").name
    same = Arm(numerics="fp32", mods=arm.mods).name
    return {
        "seeds": len(own),
        "not finite": len(own) - len(whole),
        "loss": _mean([losses[-1] for losses in whole.values()]),
        "course": [_mean([losses[at] for losses in whole.values()]) for at in range(moments)],
        "against fp32, %": compared(own, by_arm.get(fp32, {}), moments),
        "against fp32 with the same mods, %": compared(own, by_arm.get(same, {}), moments) if arm.mods else None,
        "losses by seed": {str(seed): list(losses) for seed, losses in sorted(own.items())},
    }


def compared(own: Losses, other: Losses, moments: int) -> dict[str, Any]:
    """Return the paired relative change at the end, on average over all moments, and at each moment, in percent."""
    both = [seed for seed in own if seed in other and len(own[seed]) == len(other[seed]) == moments]
    changes = [[100 * (own[seed][at] / other[seed][at] - 1) for at in range(moments)] for seed in sorted(both)]
    return {
        "end": _paired([each[-1] for each in changes]),
        "mean of the course": _paired([math.fsum(each) / moments for each in changes]),
        "course": _course([[each[at] for each in changes] for at in range(moments)]),
    }


def _course(changes: Sequence[Sequence[float]]) -> dict[str, list[float | None]]:
    found = [paired(each) for each in changes]
    return {name: [getattr(each, name) if each else None for each in found] for name in ("mean", "low", "high")}


def _paired(changes: Sequence[float]) -> dict[str, Any] | None:
    found = paired(changes)
    return None if found is None else asdict(found)


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
