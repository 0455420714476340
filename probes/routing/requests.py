"""The requests that run together, and how many of their tokens each expert got: counted on the device, read once.

While a forward runs, a layer's choice is only put in a list: next to the products of a layer, every object that is made
and every line of code that is read for it is a cache miss. At the end of the forward the choices are sorted by shape,
and those of all layers and many steps are counted in one go, without waiting for the device. The counts come to the
host when the requests close.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from loka.errors import ArgumentError
from loka.probes.routing.sites import RoutingSite
from loka.probes.routing.spill import ClosedRequests
from loka.probes.routing.trace import PHASES

# How many remembered choices, and how many numbers in them, make it worth counting.
_MOST_CHOICES: Final[int] = 4096
_MOST_NUMBERS: Final[int] = 2**21

Choice = tuple[int, Tensor, int | None]  # site, index [.., k], and its version then; None where it is a copy
_Kind = tuple[int, torch.device, torch.Size]  # of choices that are counted together: phase, device, shape
_Part = tuple[list[Choice], Tensor | None]  # what one forward chose of a kind, and which of its tokens are no padding


@dataclass(slots=True, eq=False)
class OpenRequests:
    """Requests that run as the rows of one batch."""

    rows: int
    domain: tuple[str, ...]
    sites: Sequence[RoutingSite]
    cache: "weakref.ref[Any] | None" = None  # of the key-value cache in which they go on
    waits: bool = False  # for the next forward with as many rows, to go on in it
    running: Tensor | None = None  # [rows], false after a stop token; None: nobody has looked yet
    top_k: int | None = None
    hidden_size: int | None = None
    _kinds: dict[_Kind, list[_Part]] = field(default_factory=dict)
    _choices: int = 0
    _numbers: int = 0
    _counts: dict[torch.device, Tensor] = field(default_factory=dict)  # [phase, site, row, expert and its neighbours]
    _ran: list[Tensor] = field(default_factory=list)  # which rows ran, in decode steps that are not counted yet
    _steps: Tensor | int = 0

    def take(self, forward: "Forward") -> None:
        """Take over what the sites of a forward chose; raise ArgumentError where its tokens cannot be told apart."""
        shape: torch.Size | None = None
        device: torch.device | None = None
        chosen, forward.chosen = forward.chosen, []
        for choice in chosen:
            position, index, _ = choice
            if index.shape != shape or index.device != device:  # as a rule, once
                shape, device, size = index.shape, index.device, index.numel()
                part: list[Choice] = []
                counts = size > 0 and not index.is_meta
                if counts:
                    forward.check(self.sites[position], shape)
                    self._kinds.setdefault((forward.phase, device, shape), []).append((part, forward.valid))
            if not counts:
                continue
            part.append(choice)
            self._numbers += size
            if self.hidden_size is None:
                self.hidden_size = forward.width
        self._choices += len(chosen)
        if self._choices >= _MOST_CHOICES or self._numbers >= _MOST_NUMBERS:
            self.count()

    def stepped(self, ran: Tensor | None) -> None:
        """Count a decode step, of the rows that ran or of all."""
        if ran is None:
            self._steps = self._steps + 1
            return
        self._ran.append(ran)
        if len(self._ran) >= _MOST_CHOICES:
            self.count()

    def count(self) -> None:
        """Count what is remembered."""
        kinds, self._kinds, self._choices, self._numbers = self._kinds, {}, 0, 0
        with torch.inference_mode(False), torch.no_grad():
            if self._ran:
                ran, self._ran = self._ran, []
                self._steps = torch.stack(ran).sum(0) + self._steps
            for (phase, device, shape), parts in kinds.items():
                self._check([choice for part, _ in parts for choice in part], shape[-1])
                self._count_kind(parts, shape[-1], self._counts_on(device)[phase])

    def _check(self, choices: Sequence[Choice], top_k: int) -> None:
        for position, index, version in choices:
            if version is not None and index._version != version:
                raise ArgumentError(
                    f"{self.sites[position].name} overwrites its chosen experts while it runs, so they cannot "
                    'be counted afterwards. Name the router that gives them instead, with experts="*.router".'
                )
        if any(top_k < self.sites[position].experts for position in {choice[0] for choice in choices}):  # no mask
            self.top_k = max(self.top_k or 0, top_k)

    def _count_kind(self, parts: Sequence[_Part], top_k: int, counts: Tensor) -> None:
        """Add choices of one shape to the counts of a phase, [site, row, bin]; bin 0 is for what is no expert."""
        device, (_, rows, bins) = counts.device, counts.shape
        choices = [choice for part, _ in parts for choice in part]
        index = torch.stack([index for _, index, _ in choices]).long().view(len(choices), -1, top_k)
        if any(valid is not None for _, valid in parts):
            every = torch.ones(index.shape[1], dtype=torch.bool, device=device)
            counted = [every if valid is None else valid.to(device) for _, valid in parts]
            counted = [mark for mark, (part, _) in zip(counted, parts, strict=True) for _ in part]
            index = torch.where(torch.stack(counted)[:, :, None], index, -1)
        index = index.clamp_(-1, bins - 2).view(len(choices), rows, -1)
        first = _to_device([position * rows * bins + 1 for position, _, _ in choices], device)
        index += first[:, None, None] + torch.arange(0, rows * bins, bins, device=device)[:, None]
        one = torch.ones(1, dtype=counts.dtype, device=device)
        counts.view(-1).scatter_add_(0, index.view(-1), one.expand(index.numel()))

    def _counts_on(self, device: torch.device) -> Tensor:
        if device not in self._counts:
            bins = max(site.experts for site in self.sites) + 2
            shape = (len(PHASES), len(self.sites), self.rows, bins)
            self._counts[device] = torch.zeros(shape, dtype=torch.int32, device=device)
        return self._counts[device]

    def close(self) -> ClosedRequests:
        """Bring the counts to the host. This waits for the device."""
        self.count()
        experts = max(site.experts for site in self.sites)
        total = np.zeros((self.rows, len(PHASES), len(self.sites), experts), np.uint32)
        for counts in self._counts.values():
            total += counts.cpu().numpy().view(np.uint32).transpose(2, 0, 1, 3)[..., 1:-1]
        for position, site in enumerate(self.sites):
            if site.experts < experts:
                total[:, :, position, site.experts :] = 0
        steps = self._steps
        return ClosedRequests(
            counts=total,
            domain=self.domain,
            decode_steps=tuple(steps.tolist()) if isinstance(steps, Tensor) else (steps,) * self.rows,
        )


def _to_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Bring a few numbers to a device without waiting for it."""
    tensor = torch.tensor(values)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(slots=True, eq=False)
class Forward:
    """What the tokens of a running forward belong to, and what its sites have chosen so far."""

    requests: OpenRequests
    phase: int
    rows: int
    length: int | None  # tokens of a row, where known
    valid: Tensor | None  # [rows * length]
    given: tuple[Any, Any]  # tokens and mask, where they came by name
    width: int | None  # of its tokens, once known
    copies: bool  # of what is chosen: in inference mode, tensors carry no version by which a change could be seen
    chosen: list[Choice] = field(default_factory=list)
    _room: int = 0  # for so many choices, known once there is one

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
        return len(self.chosen) >= self._room and self._full(index)

    def _full(self, index: Tensor) -> bool:
        if self._room:
            return True
        self._room = min(_MOST_CHOICES, max(1, _MOST_NUMBERS // max(1, index.numel())))
        return self._room == 1

    def check(self, site: RoutingSite, shape: torch.Size) -> None:
        """Raise ArgumentError where the tokens of a choice [.., k] cannot be told apart."""
        tokens, rows = shape[:-1].numel(), self.requests.rows
        length = tokens // rows
        if tokens % rows or (rows > 1 and (self.rows != rows or self.length not in (None, length))):
            raise ArgumentError(
                f"{site.name} got {tokens} tokens, and the batch has {rows} rows"
                f"{'' if self.length is None else f' of {self.length}'}: which request a token belongs to cannot be "
                "told. Run one request at a time."
            )
        if self.valid is not None and self.valid.shape[0] != tokens:
            raise ArgumentError(
                f"{site.name} got {tokens} tokens, and the attention mask covers {self.valid.shape[0]}: which of them "
                "are padding cannot be told. Run one request at a time, without padding."
            )


@dataclass(slots=True, eq=False)
class Frame:
    """One module whose forward runs, and the forward of a batch that this is part of."""

    module: nn.Module
    forward: Forward
    error: BaseException | None  # that was being handled when it began
