"""Choices of experts into counts, on the device where they are: many of one shape in a few operations.

Next to a forward every operation is cold, so there are as few as can be, and what they need besides the choices
themselves is kept from one time to the next.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from loka.probes.routing.sites import RoutingSite
from loka.probes.routing.trace import PHASES

_MOST_PLACES: Final[int] = 64  # of choices of other sites or rows, whose positions among the counts are kept
_FEW: Final[int] = 3  # stop tokens that are compared one by one

Choice = tuple[int, Tensor, int | None]  # site, index [.., k], and its version then; None where it is a copy


Rows = list[list[int]]  # tokens [row, 1] of a few rows in the memory of the host, where a list is less work than a copy


class Step:
    """A decode step whose rows may have ended: the tokens that they were fed, and which go on, once somebody looked.

    `running` [rows] stays None where all of them do.
    """

    __slots__ = ("running", "tokens")

    def __init__(self, tokens: Tensor | Rows) -> None:
        self.tokens = tokens
        self.running: Tensor | None = None


# What one forward chose in one shape, and which of its tokens count: those that are no padding, [tokens], and those of
# rows that go on at this step; all where both are None.
Part = tuple[list[Choice], Tensor | None, Step | None]


class Counter:
    """Counts what the sites of one model choose."""

    def __init__(self, sites: Sequence[RoutingSite], stop_tokens: Sequence[int]) -> None:
        self.sites = sites
        self.experts = max(site.experts for site in sites)
        self.unknown = 0  # choices of no expert that is known of its site, in all that has come to the host
        self.stop_tokens = tuple(stop_tokens)
        self._bins = self.experts + 2  # one before and one behind, for what is no expert
        self._stop_on: dict[torch.device, Tensor] = {}
        self._one_on: dict[torch.device, Tensor] = {}
        self._places: dict[tuple[torch.device, int, tuple[int, ...]], Tensor] = {}

    def zeros(self, rows: int, device: torch.device) -> Tensor:
        """Return counts of nothing: [phase, site, row, bin]."""
        return torch.zeros((len(PHASES), len(self.sites), rows, self._bins), dtype=torch.int32, device=device)

    def add(self, counts: Tensor, choices: Sequence[Choice], parts: Sequence[Part]) -> None:
        """Add choices of one shape to the counts of a phase, [site, row, bin]; `parts` are what they came in."""
        device, rows, many = counts.device, counts.shape[1], len(choices)
        index = torch.stack([choice[1] for choice in choices])
        index = index.long().view(many, -1, index.shape[-1])
        if any(valid is not None or (step is not None and step.running is not None) for _, valid, step in parts):
            index = torch.where(_marks(parts, index.shape[1], device)[:, :, None], index, -1)
        index = index.clamp_(-1, self._bins - 2).view(many, rows, -1)
        index += self._places_of(choices, rows, device)
        counts.view(-1).scatter_add_(0, index.view(-1), self._one(device).expand(index.numel()))

    def to_host(self, counts: Sequence[Tensor], rows: int) -> np.ndarray:
        """Return the sum of the counts of some devices as [row, phase, site, expert]. This waits for the devices."""
        if not counts:
            return np.zeros((rows, len(PHASES), len(self.sites), self.experts), np.uint32)
        found = counts[0].numpy(force=True)
        for other in counts[1:]:
            found = found + other.numpy(force=True)
        total = found.view(np.uint32).transpose(2, 0, 1, 3)[..., 1:].copy()
        for position, site in enumerate(self.sites):
            self.unknown += int(total[:, :, position, site.experts :].sum())
            total[:, :, position, site.experts :] = 0
        return total[..., :-1]

    def ended(self, steps: Sequence[Step]) -> Tensor:
        """Return which rows were fed a stop token in which step, [step, row]."""
        tokens = [step.tokens for step in steps]
        if isinstance(tokens[0], list) and all(isinstance(rows, list) for rows in tokens):
            fed = torch.tensor(tokens, device="cpu")
        else:
            fed = torch.stack([torch.tensor(rows, device="cpu") if isinstance(rows, list) else rows for rows in tokens])
        return self._is_stop(fed.view(len(steps), -1))

    def _is_stop(self, tokens: Tensor) -> Tensor:
        if len(self.stop_tokens) > _FEW:
            if tokens.device not in self._stop_on:
                self._stop_on[tokens.device] = torch.tensor(self.stop_tokens, device=tokens.device)
            return torch.isin(tokens, self._stop_on[tokens.device])
        found = tokens == self.stop_tokens[0]
        for token in self.stop_tokens[1:]:
            found |= tokens == token
        return found

    def _places_of(self, choices: Sequence[Choice], rows: int, device: torch.device) -> Tensor:
        """Return where the counts of expert 0 are, [choice, row, 1]."""
        positions = tuple([choice[0] for choice in choices])
        key = device, rows, positions
        if key not in self._places:
            while len(self._places) >= _MOST_PLACES:
                del self._places[next(iter(self._places))]
            first = np.array(positions)[:, None] * rows + np.arange(rows)
            self._places[key] = _to_device((first * self._bins + 1)[:, :, None], device)
        return self._places[key]

    def _one(self, device: torch.device) -> Tensor:
        if device not in self._one_on:
            self._one_on[device] = torch.ones(1, dtype=torch.int32, device=device)
        return self._one_on[device]


def _marks(parts: Sequence[Part], tokens: int, device: torch.device) -> Tensor:
    """Return which tokens of each choice count, [choice, token]."""
    every: Tensor | None = None
    marks = []
    for _, valid, step in parts:
        mark = None if valid is None else valid.to(device)
        if step is not None and step.running is not None:
            running = step.running.to(device)
            mark = running if mark is None else mark & running
        if mark is None:
            every = torch.ones(tokens, dtype=torch.bool, device=device) if every is None else every
            mark = every
        marks.append(mark)
    many = [len(choices) for choices, _, _ in parts]
    if min(many) == max(many):  # as a rule: of all sites
        return torch.stack(marks)[:, None].expand(-1, many[0], -1).reshape(-1, tokens)
    return torch.stack([mark for mark, times in zip(marks, many, strict=True) for _ in range(times)])


def _to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """Bring a few numbers to a device without waiting for it."""
    tensor = torch.from_numpy(values)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
