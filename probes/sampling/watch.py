"""One who watches the samples of a run as they are taken and acts on them, such as the monitor of a plan."""

from collections.abc import Sequence
from typing import Protocol

from loka.formats import Pass, Recipe
from loka.probes.capturing.products import Gemm
from loka.probes.records import StepRecord


class Watch(Protocol):
    """Says what is measured in every sample, sees the operands, and learns what came of it.

    With a watch nothing is learned, weighed by the loss or left out because its verdict is settled. In a job of several
    ranks, `agrees` and `sampled` are called on all of them in the same order, whatever fails on one.
    """

    @property
    def urgent(self) -> bool:
        """Whether the next sample measures every product, whatever that costs."""

    def asks(self) -> bool:
        """Whether a sample is to be due with this step, beside those of the schedule."""

    def recipes(self, site: str, product: Pass) -> Sequence[Recipe]:
        """Return the recipes to measure a product under; with none it is not looked at."""

    def look(self, site: str, product: Pass, gemm: Gemm) -> None:
        """See a product that has just been measured. Its tensors are the model's own."""

    def agrees(self, *, allowed: bool, leaving: str) -> tuple[bool, str]:
        """Say whether a sample that is due, and that the budget allows or not, is taken; and why nothing more is.

        leaving: why this process wants to end, "" if it does not.
        """

    def sampled(self, record: StepRecord | None) -> None:
        """Take what a sample has shown; None where it failed."""

    def waits_for(self, site: str, product: Pass) -> bool:
        """Whether a product is to be measured in the next sample, before those whose turn it would be."""
