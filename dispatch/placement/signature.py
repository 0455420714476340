"""How a request finds its device from its prefill alone: a score per device, linear in the shares of prefill tokens.

Numbers are kept as 16-bit codes around zero with one scale, so that a file is small, never holds a number that is not
finite, and means the same to everyone who reads it.
"""

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from loka.dispatch.placement.grouping import arrival_groups, assign_arriving, nearest_groups
from loka.dispatch.placement.usage import chunks, fractions
from loka.errors import ArgumentError, PlanError

Rule = Literal["nearest", "balanced"]
_ZERO: Final[int] = 2**15
_MOST: Final[int] = 2**16 - 1
_LARGEST: Final[float] = 1e12  # a scale with which sums of squares still fit into float32


@dataclass(frozen=True, kw_only=True, slots=True)
class Codes:
    """An array [device, layer, expert]: scale * (code - 32768)."""

    scale: float
    codes: tuple[tuple[tuple[int, ...], ...], ...]

    def __post_init__(self) -> None:
        """Refuse codes of more than 16 bits, a scale beyond reason, and rows of different lengths."""
        if not 0 <= self.scale <= _LARGEST:
            raise PlanError(f"The scale of codes is {self.scale}, outside of 0 to {_LARGEST:g}.")
        lengths = {len(row) for part in self.codes for row in part}
        if len({len(part) for part in self.codes}) != 1 or len(lengths) != 1:
            raise PlanError("The codes are not [device][layer][expert] with equal lengths.")
        if any(not 0 <= code <= _MOST for part in self.codes for row in part for code in row):
            raise PlanError(f"A code lies outside of 0 to {_MOST}.")

    @classmethod
    def of(cls, values: np.ndarray) -> "Codes":
        """Return the codes of an array of three dimensions; the largest magnitude uses the range."""
        largest = float(np.abs(values).max(initial=0.0))
        scale = largest / (_ZERO - 1) or 1.0
        codes = np.rint(values / scale).astype(np.int64) + _ZERO
        return cls(scale=scale, codes=tuple(tuple(tuple(row) for row in part) for part in codes.tolist()))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(devices, layers, experts)."""
        return len(self.codes), len(self.codes[0]), len(self.codes[0][0])

    def values(self) -> np.ndarray:
        """Return the array, float64."""
        return (np.array(self.codes, dtype=np.int64) - _ZERO) * self.scale


@dataclass(frozen=True, kw_only=True, slots=True)
class Signature:
    """What to compare a request's prefill with, per device.

    `balanced`: the score is the number of decode tokens that are expected to be saved; group sizes are kept equal.
    `nearest`: centroids of L2-normalised prefill counts; the nearest one wins, whatever the sizes.
    """

    rule: Rule
    typical: Codes  # [1, layer, expert]: prefill shares where a request has none
    share: Codes  # [device, layer, expert]
    root: Codes | None = None  # on the roots of the shares
    constant: Codes | None = None  # [1, 1, device]

    def scores(self, prefill: np.ndarray) -> np.ndarray:
        """Return the score of each request on each device, of prefill counts [request, layer, expert]."""
        typical, share = self.typical.values()[0], _flat(self.share)
        root = None if self.root is None else _flat(self.root)
        constant = 0.0 if self.constant is None else self.constant.values()[0, 0]
        parts = []
        for part in chunks(len(prefill)):
            shares = fractions(prefill[part], typical)
            if self.rule == "nearest":
                length = np.maximum(np.linalg.norm(shares, axis=1, keepdims=True), 1e-12)
                parts.append(2 * (shares / length) @ share.T - (share**2).sum(axis=1))
            else:
                score = shares @ share.T + constant
                parts.append(score if root is None else score + np.sqrt(shares) @ root.T)
        return np.concatenate(parts).astype(np.float64)

    def groups(self, prefill: np.ndarray, *, window: int, slack: float) -> np.ndarray:
        """Return the device of each request, in order of arrival, `window` of them decided together."""
        scores = self.scores(prefill)
        if self.rule == "nearest":
            return nearest_groups(scores)
        return assign_arriving(scores, window, slack)


def groups_of(
    signature: Signature | None, prefill: np.ndarray, devices: int, *, window: int, slack: float
) -> np.ndarray:
    """Return the device of each request: by its signature, or in turn where a method does not look at requests."""
    if window < 1:
        raise ArgumentError(f"A window of {window} requests decides nothing. Give a number from 1.")
    if signature is None:
        return arrival_groups(len(prefill), devices)
    return signature.groups(prefill, window=window, slack=slack)


def _flat(codes: Codes) -> np.ndarray:
    values = codes.values()
    return values.reshape(len(values), -1).astype(np.float32)
