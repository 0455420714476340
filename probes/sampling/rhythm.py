"""Which forwards make up a sample: when one is due, where it begins, and how long its backward is waited for.

A step is one forward of the root. A loop may run several before each backward (contrastive losses), some of them
without gradient (a teacher, an evaluation); a sample begins with the first forward after a backward and takes all up to
the next.
"""

from dataclasses import dataclass
from typing import Final

# The fractional parts of its multiples fill the unit interval evenly, however many are taken (Weyl's golden sequence).
_GOLDEN: Final[float] = (5**0.5 - 1) / 2
# Forwards that may pass before a sample gives up on a backward that the loop has not shown yet.
_PATIENCE: Final[int] = 8


@dataclass(slots=True)
class Rhythm:
    """Counts forwards and backwards. The rhythm of a loop is what the stretch before its last backward has shown."""

    every: int
    steps: int = 0
    backwards: int = 0
    awaits_backward: bool = False
    with_gradient: bool = False  # whether a forward has come with grad mode on
    _due_since: int = -1  # the step at which a sample became due; -1: none is
    _owes_another: bool = False  # whether the next window's sample became due while that one waited
    _began: int = 0  # the step with which the running sample began
    _captured: int = 0  # forwards of the running sample so far
    _since_backward: int = 0  # forwards with grad mode on
    _per_backward: int = 1
    _trains: bool = False

    def _is_due(self) -> bool:
        """Whether a sample is due with this step: one in each window of `every`, each time at another place.

        A loop that takes turns (a discriminator and a generator, tasks, domains) would show one of them for ever at
        every 10th or 100th step. The first window's place is its first step.
        """
        window, place = divmod(self.steps, self.every)
        return place == int(self.every * (window * _GOLDEN % 1))

    def ask(self) -> None:
        """Have a sample fall due with the next step, beside those of the schedule."""
        if self._due_since < 0:
            self._due_since = self.steps

    def is_over(self) -> bool:
        """Whether the running sample ends before the forward that now begins."""
        if not self.awaits_backward or (self._is_due() and not self._trains):
            return True
        return self.steps - self._began > max(_PATIENCE, 2 * self._per_backward)

    def spans_one_step(self) -> bool:
        """Whether no other forward has come since the running sample began."""
        return self.steps - self._began == 1

    def forward(self, *, grad: bool, by_hand: bool = False) -> bool:
        """Count a step; say whether a sample is to begin with it."""
        if self._is_due():
            self._owes_another = self._due_since >= 0
            self._due_since = self._due_since if self._owes_another else self.steps
        starts = self._due_since >= 0 and (by_hand or self._is_first(grad))
        self.steps += 1
        self._since_backward += grad
        self.with_gradient |= grad
        if starts:
            self._due_since, self._owes_another = self.steps if self._owes_another else -1, False
        return starts

    def _is_first(self, grad: bool) -> bool:
        if grad:
            return self._since_backward == 0 or self._since_backward >= self._per_backward
        # Where the loop trains, a forward without gradient shows only a third; take it if nothing else comes.
        return not self._trains or self.steps - self._due_since >= self.every

    def begin(self) -> None:
        """Begin a sample with the step just counted."""
        self._began = self.steps - 1
        self._captured = 0
        self.awaits_backward = False

    def captures(self, *, grad: bool) -> bool:
        """Whether the forward just counted belongs to the running sample."""
        first = self.steps - 1 == self._began
        if not first and not (grad and self._captured < self._per_backward):
            return False
        self._captured += 1
        self.awaits_backward |= grad
        return True

    def backward(self) -> None:
        """Take note that a backward begins."""
        self.backwards += 1
        self._trains = True
        self._per_backward = max(self._since_backward, 1)
        self._since_backward = 0
