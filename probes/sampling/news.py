"""What happened in a run that its reader should be told: each thing once, however many samples show it."""

from collections.abc import Iterator, Mapping

from loka.probes.records import Event, StepRecord


class News:
    """Remembers what has been told; `kinds` says of what kind it was."""

    def __init__(self) -> None:
        self.kinds: set[str] = set()
        self._told: set[tuple[str, ...]] = set()

    def of(self, step: StepRecord, hidden: Mapping[str, str]) -> Iterator[Event]:
        """Yield the news of a sampled step; `hidden` is site -> operator of products out of sight."""
        for entry in step.products:
            for operand in entry.operands:
                if operand.nan or operand.inf:
                    what = f"{operand.role} holds {operand.nan} NaN and {operand.inf} Inf"
                    key = ("nonfinite", entry.site, entry.product, operand.role)
                    yield from self._once(key, step.step, f"{entry.site} {entry.product}: {what}")
        for site, op in hidden.items():
            message = f"{site}: {op} computes its products out of sight; they are no part of the evidence"
            yield from self._once(("fused", site, op), step.step, message)

    def skipped(self, step: int, overhead: float) -> Iterator[Event]:
        """Yield that a sample was left out, the first time."""
        message = (
            f"the sample due at step {step} was left out, and more may be: they would cost more than the budget of "
            f"{overhead:.3g} of the run's own time. For more samples probe longer, or give probe(overhead=...) more"
        )
        yield from self._once(("over_budget",), step, message)

    def without_hook(self, step: int, failure: str) -> Iterator[Event]:
        """Yield that the loss hook is used no more."""
        message = (
            f"the loss hook failed at step {step} ({failure}); from there on the impact on the loss rests on the true "
            "labels, which overstate it where rows are outliers"
        )
        yield from self._once(("loss_hook",), step, message)

    def forgotten(self, step: int, operands: int) -> Iterator[Event]:
        """Yield that there was no memory for what could be learned of some operands."""
        if operands:
            message = (
                f"the distributions of {operands} operands are not kept: all of them together may take 16 MB and 4 % "
                "of the parameters' memory, and one a quarter of that"
            )
            yield from self._once(("memory",), step, message)

    def _once(self, key: tuple[str, ...], step: int, message: str) -> Iterator[Event]:
        if key not in self._told:
            self._told.add(key)
            self.kinds.add(key[0])
            yield Event(step=step, kind=key[0], message=message)
