"""The requests that run together, and how many of their tokens each expert got: counted on the device, read once.

A layer's choice is only remembered when it is made. Many of them, of all layers and several steps, are then counted
in one go, so that tracing adds next to no work to a step of a few tokens and never waits for the device. The counts
come to the host when the requests close.
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


@dataclass(slots=True)
class _Choice:  # not frozen: one is made for every layer of every step, and that takes three times as long
    """What one site chose in one forward: index [tokens, k]; `valid` [tokens] is false on padding."""

    phase: int
    length: int
    position: int
    index: Tensor
    version: int
    valid: Tensor | None


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
    _choices: list[_Choice] = field(default_factory=list)
    _numbers: int = 0
    _counts: dict[torch.device, Tensor] = field(default_factory=dict)  # [phase, layer, rows * (experts + 1)]
    _steps: Tensor | int = 0

    def add(self, position: int, index: Tensor, phase: int, length: int, valid: Tensor | None) -> None:
        """Remember what a site chose; index [rows * length, k], row after row."""
        inference = index.is_inference()
        if inference:
            index = index.clone()  # carries no version by which a change could be seen
        version = 0 if inference else index._version
        self._choices.append(_Choice(phase, length, position, index, version, valid))
        self._numbers += index.numel()
        if len(self._choices) >= _MOST_CHOICES or self._numbers >= _MOST_NUMBERS:
            self.count()

    def stepped(self, steps: Tensor | int) -> None:
        """Count decode steps, one number for each row or for all."""
        self._steps = steps + self._steps  # truth values and a number give numbers

    def count(self) -> None:
        """Count what is remembered."""
        choices, self._choices, self._numbers = self._choices, [], 0
        groups: dict[tuple[Any, ...], list[_Choice]] = {}
        for choice in choices:
            if not choice.index.is_inference() and choice.index._version != choice.version:
                raise ArgumentError(
                    f"{self.sites[choice.position].name} overwrites its chosen experts while it runs, so they cannot "
                    'be counted afterwards. Name the router that gives them instead, with experts="*.router".'
                )
            key = (choice.phase, choice.length, choice.index.device, choice.index.dtype, choice.index.shape)
            groups.setdefault(key, []).append(choice)
        with torch.inference_mode(False), torch.no_grad():
            for (phase, length, device, _, _), group in groups.items():
                self._count_group(group, phase, length, self._counts_on(device))

    def _count_group(self, group: Sequence[_Choice], phase: int, length: int, counts: Tensor) -> None:
        device, bins = counts.device, counts.shape[-1] // self.rows
        index = torch.stack([choice.index for choice in group]).long()  # [choice, token, k]
        known = _to_device([self.sites[choice.position].experts for choice in group], device)[:, None, None]
        index = torch.where((index < 0) | (index >= known), bins - 1, index)  # given to no expert
        if any(choice.valid is not None for choice in group):
            every = torch.ones(index.shape[1], dtype=torch.bool, device=device)
            valid = torch.stack([every if choice.valid is None else choice.valid.to(device) for choice in group])
            index = torch.where(valid[:, :, None], index, bins - 1)
        row = torch.arange(index.shape[1], device=device).div(length, rounding_mode="floor")
        layer = _to_device([choice.position for choice in group], device)
        index += row[None, :, None] * bins + layer[:, None, None] * counts.shape[-1]
        target = counts[phase].view(-1)
        target.scatter_add_(0, index.view(-1), torch.ones(1, dtype=counts.dtype, device=device).expand(index.numel()))

    def _counts_on(self, device: torch.device) -> Tensor:
        if device not in self._counts:
            bins = max(site.experts for site in self.sites) + 1
            shape = (len(PHASES), len(self.sites), self.rows * bins)
            self._counts[device] = torch.zeros(shape, dtype=torch.int32, device=device)
        return self._counts[device]

    def close(self) -> ClosedRequests:
        """Bring the counts to the host. This waits for the device."""
        self.count()
        layers, experts = len(self.sites), max(site.experts for site in self.sites)
        total = np.zeros((self.rows, len(PHASES), layers, experts), np.uint32)
        for counts in self._counts.values():
            shaped = counts.cpu().numpy().reshape(len(PHASES), layers, self.rows, experts + 1)
            total += np.moveaxis(shaped[..., :experts], 2, 0).astype(np.uint32)
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
class Frame:
    """One running forward of a model, or of a part that takes a batch; `length`: tokens of a row, where known."""

    module: nn.Module
    requests: OpenRequests
    phase: int
    rows: int
    length: int | None
    valid: Tensor | None  # [rows * length]
    outermost: bool
    error: BaseException | None  # that was being handled when it began
    given: tuple[Any, Any]  # tokens and mask, where they came by name

    def saw(self, position: int, index: Tensor, width: int | None) -> None:
        """Hand on what a site chose, index [.., k]; raise ArgumentError where its tokens cannot be told apart."""
        requests, site = self.requests, self.requests.sites[position]
        index = index if index.ndim == 2 else index.reshape(-1, index.shape[-1])
        tokens, rows = index.shape[0], requests.rows
        if tokens == 0:
            return
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
        requests.add(position, index, self.phase, length, self.valid)
        requests.hidden_size = requests.hidden_size or width
        if index.shape[-1] < site.experts:  # and no mask over the experts
            requests.top_k = max(requests.top_k or 0, index.shape[-1])
