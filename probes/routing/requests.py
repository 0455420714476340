"""The requests that run together, and how many of their tokens each expert got: counted on the device, read once.

While a forward runs, a layer's choice is only put in a list: next to the products of a layer, every object that is made
and every line of code that is read for it is a cache miss. At the end of the forward the choices are sorted by shape,
and those of all layers and many steps are counted in one go, without waiting for the device. The counts come to the
host when the requests close.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any, Final

import torch
from torch import Tensor

from loka.errors import ArgumentError
from loka.probes.routing.counting import Choice, Counter, Part, Rows, Step
from loka.probes.routing.sites import INTEGERS, RoutingSite
from loka.probes.routing.spill import ClosedRequests

# How many remembered choices, and how many numbers in them, make it worth counting.
_MOST_CHOICES: Final[int] = 4096
_MOST_NUMBERS: Final[int] = 2**21

_Kind = tuple[int, torch.device, torch.Size]  # of choices that are counted together: phase, device, shape


@dataclass(slots=True, eq=False)
class OpenRequests:
    """Requests that run as the rows of one batch."""

    rows: int
    domain: tuple[str, ...]
    counter: Counter
    cache: "weakref.ref[Any] | None" = None  # of the key-value cache in which they go on
    waits: bool = False  # for the next forward with as many rows, to go on in it
    top_k: int | None = None
    hidden_size: int | None = None
    step: Step | None = None  # the latest of the decode, where rows of it may have ended
    again: "Forward | None" = None  # the latest decode step, where the next one may be just like it
    _parts: list[tuple[_Kind, Part]] = field(default_factory=list)  # that are not counted yet
    _choices: int = 0
    _numbers: int = 0
    _counted: int = 0  # numbers in choices that were counted
    _counts: dict[torch.device, Tensor] = field(default_factory=dict)  # [phase, site, row, expert and its neighbours]
    _fed: list[Step] = field(default_factory=list)  # decode steps of which nobody has looked which rows ran
    _running: Tensor | None = None  # [rows], false after a stop token; None: all run
    _steps: Tensor | int = 0

    def take(self, forward: "Forward") -> None:
        """Take over what the sites of a forward chose; raise ArgumentError where its tokens cannot be told apart."""
        chosen, steps = forward.chosen, forward.steps
        forward.chosen, forward.steps = [], []
        if not steps:
            self._add(forward, chosen, forward.valid, forward.step)
        else:
            alike = _are_alike(chosen)
            ends = [begin for begin, _, _ in steps] + [len(chosen)]
            self._add(forward, chosen[: ends[0]], forward.valid, forward.step, alike=alike)
            for at, (begin, valid, tokens) in enumerate(steps):
                if tokens is None:
                    self.step_all()
                else:
                    self.feed(tokens)
                forward.valid, forward.step = valid, self.step
                self._add(forward, chosen[begin : ends[at + 1]], valid, self.step, alike=alike)
        if self._choices >= _MOST_CHOICES or self._numbers >= _MOST_NUMBERS:
            self.count()

    def _add(
        self, forward: "Forward", chosen: list[Choice], valid: Tensor | None, step: Step | None, *, alike: bool = False
    ) -> None:
        """Remember choices, those that are alike together."""
        while chosen:
            position, index, _ = chosen[0]
            same = chosen if alike or _are_alike(chosen) else list(takewhile(partial(_is_like, index), chosen))
            size = index.numel()
            if size and not index.is_meta:
                forward.check(self.counter.sites[position], index, valid)
                self._parts.append(((forward.phase, index.device, index.shape), (same, valid, step)))
                self._choices += len(same)
                self._numbers += size * len(same)
                if self.hidden_size is None:
                    self.hidden_size = forward.width
            chosen = chosen[len(same) :]

    def step_all(self) -> None:
        """Count a decode step of all rows, also of those that had ended."""
        self._settle()
        self._steps = self._steps + 1
        self._running = self.step = None

    def feed(self, tokens: Tensor | Rows) -> None:
        """Count a decode step of the rows that go on; that hangs on these tokens, [rows, 1], and those before them."""
        self.step = step = Step(tokens)
        self._fed.append(step)
        self._numbers += self.rows
        if len(self._fed) >= _MOST_CHOICES:
            self.count()

    def _settle(self) -> None:
        """Look which rows ran in the latest decode steps."""
        if not self._fed:
            return
        steps, self._fed = self._fed, []
        ended = self.counter.ended(steps)
        if self._running is None and ended.device.type == "cpu" and not ended.any():  # elsewhere, one would wait
            self._steps = self._steps + len(steps)
            return
        running = ended.cumsum(0) == 0
        if self._running is not None:
            running &= self._running
        for step, ran in zip(steps, running.unbind(0), strict=True):
            step.running = self._running = ran
        self._steps = running.sum(0) + self._steps

    def count(self) -> None:
        """Count what is remembered."""
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):  # else nobody could write to the counts later on
                self._count()
        else:
            self._count()

    def _count(self) -> None:
        kinds: dict[_Kind, list[Part]] = {}
        for kind, part in self._parts:
            kinds.setdefault(kind, []).append(part)
        self._parts = []
        self._counted += self._numbers
        self._choices = self._numbers = 0
        self._settle()
        for (phase, device, shape), parts in kinds.items():
            choices = [choice for part in parts for choice in part[0]]
            self._check(choices, shape[-1])
            if device not in self._counts:
                self._counts[device] = self.counter.zeros(self.rows, device)
            self.counter.add(self._counts[device][phase], choices, parts)

    def _check(self, choices: Sequence[Choice], top_k: int) -> None:
        sites = self.counter.sites
        for position, index, version in choices:
            if version is not None and index._version != version:
                raise ArgumentError(
                    f"{sites[position].name} overwrites its chosen experts while it runs, so they cannot "
                    'be counted afterwards. Name the router that gives them instead, with experts="*.router".'
                )
        if top_k > (self.top_k or 0):
            positions = {choice[0] for choice in choices}
            if any(top_k < sites[position].experts for position in positions):  # no mask
                self.top_k = top_k

    def close(self) -> ClosedRequests:
        """Bring the counts to the host. This waits for the device."""
        self.count()
        steps = self._steps
        return ClosedRequests(
            counts=self.counter.to_host(list(self._counts.values()), self.rows),
            domain=self.domain,
            decode_steps=tuple(steps.tolist()) if isinstance(steps, Tensor) else (steps,) * self.rows,
            most=self._counted // max(1, self.rows),
        )


def _is_like(index: Tensor, choice: Choice) -> bool:
    """Whether a choice can be counted together with this one."""
    other = choice[1]
    return other.shape == index.shape and other.dtype is index.dtype and other.device == index.device


def _are_alike(chosen: Sequence[Choice]) -> bool:
    """Whether all choices can be counted together, as is the rule."""
    if not chosen:
        return True
    first = chosen[0][1]
    shape, dtype, device = first.shape, first.dtype, first.device
    for _, index, _ in chosen:  # `_is_like` written out: this runs for every choice there is
        if index.shape != shape or index.dtype is not dtype or index.device != device:
            return False
    return True


@dataclass(slots=True, eq=False)
class Forward:
    """What the tokens of a running forward belong to, and what its sites have chosen so far."""

    requests: OpenRequests
    phase: int
    rows: int
    length: int | None  # tokens of a row, where known
    valid: Tensor | None  # [rows * length]
    step: Step | None  # of a decode, where rows may have ended
    given: tuple[Any, Any]  # tokens and mask, where they came by name
    width: int | None  # of its tokens, once known
    copies: bool  # of what is chosen: in inference mode, tensors carry no version by which a change could be seen
    chosen: list[Choice] = field(default_factory=list)
    room: int = 0  # for so many choices, known once there is one that is not copied
    # Decode steps that went on in this very forward: how much was chosen before each, its `valid`, and what it was fed.
    steps: list[tuple[int, Tensor | None, Tensor | Rows | None]] = field(default_factory=list)

    def saw(self, position: int, index: Tensor) -> bool:
        """Remember what a site chose, [.., k]; return whether that is as much as should be kept."""
        version = None
        if self.copies:
            index = index.clone()
        else:
            try:
                version = index._version
            except RuntimeError:  # of inference mode inside the forward
                index = index.clone()
        self.chosen.append((position, index, version))
        room = self.room or min(_MOST_CHOICES, max(1, _MOST_NUMBERS // max(1, index.numel())))
        if not self.copies:
            self.room = room
        return len(self.chosen) >= room

    def check(self, site: RoutingSite, index: Tensor, valid: Tensor | None) -> None:
        """Raise ArgumentError where the tokens of a choice [.., k] cannot be told apart."""
        shape = index.shape
        if index.dtype not in INTEGERS or len(shape) < 2:
            raise ArgumentError(
                f"{site.name} was handed {index.dtype} {list(shape)}, where it had been handed its chosen experts "
                'before. Name the router instead, with experts="*.router".'
            )
        tokens, rows = shape[:-1].numel(), self.requests.rows
        length = tokens // rows
        if tokens % rows or (rows > 1 and (self.rows != rows or self.length not in (None, length))):
            raise ArgumentError(
                f"{site.name} got {tokens} tokens, and the batch has {rows} rows"
                f"{'' if self.length is None else f' of {self.length}'}: which request a token belongs to cannot be "
                "told. Run one request at a time."
            )
        if valid is not None and valid.shape[0] != tokens:
            raise ArgumentError(
                f"{site.name} got {tokens} tokens, and the attention mask covers {valid.shape[0]}: which of them "
                "are padding cannot be told. Run one request at a time, without padding."
            )
