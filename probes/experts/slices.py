"""Stacks of weights: experts that a layer keeps as one parameter [experts, rows, columns]."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Slice:
    """Which matrix of a stacked parameter the weight of a product is; None: all of them, one product for each."""

    expert: int | None
    experts: int
