"""Which requests a forward belongs to, and when they have ended.

Requests are followed by their key-value cache: they go on in every forward that is given it, and have ended when nobody
keeps it any more, or it begins anew. Where there is no cache a forward is all there is of its requests, unless a scope
holds several together.
"""

import logging
import sys
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from loka.errors import ArgumentError, LokaWarning
from loka.probes.routing.batches import Batch, cache_in, reference
from loka.probes.routing.requests import Forward, Frame, OpenRequests
from loka.probes.routing.sites import RoutingSite
from loka.probes.routing.spill import Spill, TraceFacts
from loka.probes.routing.trace import DECODE, PREFILL

log: Final = logging.getLogger("loka.probes")

_MOST_OPEN: Final[int] = 64  # batches; the oldest closes first
_FEW: Final[int] = 3  # stop tokens that are compared one by one


@dataclass(slots=True)
class Scope:
    """A stretch that the user has declared to be one batch of requests."""

    domain: str | Sequence[str] | None
    requests: OpenRequests | None = None


class Situation(threading.local):
    """What each thread has open."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.forward: Forward | None = None  # of the innermost frame
        self.scope: Scope | None = None
        self.domains: list[str] = []
        self.phases: list[int] = []


class Flow:
    """Follows requests through the forwards of a model, and hands those that have ended to the spill."""

    def __init__(
        self, sites: Sequence[RoutingSite], spill: Spill, facts: TraceFacts, domain: str, stop_tokens: Sequence[int]
    ) -> None:
        self.spill = spill
        self.seen: set[int] = set()  # positions of the sites that ran
        self._sites = sites
        self._facts = facts
        self._domain = domain
        self._stop_tokens = tuple(stop_tokens)
        self._stop_on: dict[torch.device, Tensor] = {}
        self._lock = threading.RLock()
        self._open: list[OpenRequests] = []  # oldest first
        self._warned = False

    # --- forwards

    def enter(self, module: nn.Module, batch: Batch, given: tuple[Any, Any], here: Situation, *, whole: bool) -> None:
        """Begin a forward of the `whole` model or of a part of it."""
        outer = here.forward
        if outer is None:
            with self._lock:
                requests, phase = self._place(batch, here, whole=whole)
            if phase == DECODE:
                self._step(requests, batch)
        else:
            requests, phase = outer.requests, outer.phase
        valid = self._valid(batch, requests, phase, outer)
        facts = (batch.rows, batch.length, valid, given, requests.hidden_size, torch.is_inference_mode_enabled())
        here.forward = Forward(requests, phase, *facts)
        here.frames.append(Frame(module, here.forward, sys.exception()))

    def pass_on(self, module: nn.Module, given: tuple[Any, Any], here: Situation) -> bool:
        """Begin a forward of a part that is given the very tokens and mask of the model around it, if this is one."""
        outer = here.forward
        if outer is None or given[0] is None or given[0] is not outer.given[0] or given[1] is not outer.given[1]:
            return False
        here.frames.append(Frame(module, outer, sys.exception()))
        return True

    def leave(self, here: Situation, output: Any) -> None:
        """End the innermost forward."""
        frame = here.frames.pop()
        forward, outermost = frame.forward, not here.frames
        here.forward = None if outermost else here.frames[-1].forward
        if output is None and sys.exception() is not frame.error:  # it failed
            self._drop(forward)
            return
        if here.forward is not forward:
            self.take(forward)
        if not outermost:
            return
        requests = forward.requests
        if requests.cache is None:
            cache = cache_in(output)
            requests.cache = None if cache is None else reference(cache)
            requests.waits = requests.waits or (cache is not None and requests.cache is None)
        if requests.cache is None and not requests.waits and here.scope is None:
            self.close(requests)

    def take(self, forward: Forward) -> None:
        """Bring to its requests what a forward has chosen so far."""
        self._note(forward)
        try:
            forward.requests.take(forward)
        except ArgumentError:
            self._drop(forward)
            raise

    def cut_off(self, here: Situation) -> None:
        """Forget the forwards that were left without an end, and their requests."""
        for frame in here.frames:
            self._drop(frame.forward)
        here.frames.clear()
        here.forward = None

    # --- requests

    def _place(self, batch: Batch, here: Situation, *, whole: bool) -> tuple[OpenRequests, int]:
        """Return the requests that a forward goes on with, or begins, and its phase."""
        self._close_ended(batch, here.scope)
        requests = self._going_on(batch, here.scope)
        first = requests is None or (batch.encoded and not batch.cached)
        if requests is None:
            requests = self._begin(batch, here)
        if here.scope is not None:
            here.scope.requests = requests
        if batch.cache is not None and requests.cache is None:
            requests.cache = reference(batch.cache)
        requests.waits = not whole or (batch.cache is not None and requests.cache is None)
        if here.phases:
            return requests, here.phases[-1]
        if first:
            return requests, DECODE if batch.cached and batch.length == 1 else PREFILL
        return requests, DECODE if batch.cached or batch.length == 1 else PREFILL

    def _close_ended(self, batch: Batch, scope: Scope | None) -> None:
        """Close requests that cannot go on: their cache is gone or begins anew, or others came while they waited."""
        for requests in tuple(self._open):
            if scope is not None and scope.requests is requests:
                continue
            cache = None if requests.cache is None else requests.cache()
            if cache is None:
                ended = requests.cache is not None or requests is not self._open[-1]
            else:
                ended = cache is batch.cache and (not batch.cached or requests.rows != batch.rows)
            if ended:
                self.close(requests)

    def _going_on(self, batch: Batch, scope: Scope | None) -> OpenRequests | None:
        if scope is not None:
            found = scope.requests if scope.requests in self._open else None
            if found is not None and found.rows != batch.rows:
                raise ArgumentError(
                    f"A request scope began with {found.rows} rows, and now a forward has {batch.rows}: which requests "
                    "they are cannot be told. Give each batch a scope of its own."
                )
            return found
        for requests in self._open:
            if batch.cached and requests.cache is not None and requests.cache() is batch.cache:
                return requests
        latest = self._open[-1] if self._open else None
        if latest is not None and latest.waits and latest.cache is None and latest.rows == batch.rows:
            return latest if batch.cached or batch.encoded else None
        return None

    def _begin(self, batch: Batch, here: Situation) -> OpenRequests:
        domain: str | Sequence[str] | None = here.domains[-1] if here.domains else None
        if domain is None and here.scope is not None:
            domain = here.scope.domain
        domain = self._domain if domain is None else domain
        domains = (domain,) * batch.rows if isinstance(domain, str) else tuple(domain)
        if len(domains) != batch.rows:
            raise ArgumentError(
                f"The request scope names {len(domains)} domains, and the batch has {batch.rows} rows. Give one for "
                "all rows, or one for each."
            )
        requests = OpenRequests(rows=batch.rows, domain=domains, sites=self._sites)
        self._open.append(requests)
        if len(self._open) > _MOST_OPEN:
            self.close(self._open[0])
        return requests

    def _step(self, requests: OpenRequests, batch: Batch) -> None:
        """Count a decode step of the rows that have not ended; a row ends when it is fed a stop token."""
        if not self._stop_tokens or batch.tokens is None or batch.length != 1:
            requests.running = None
            requests.stepped(None)
            return
        tokens, running = batch.tokens.select(1, 0), requests.running
        if len(self._stop_tokens) <= _FEW:
            for token in self._stop_tokens:
                goes_on = tokens != token
                running = goes_on if running is None else running & goes_on
        else:
            if tokens.device not in self._stop_on:
                self._stop_on[tokens.device] = torch.tensor(self._stop_tokens, device=tokens.device)
            goes_on = torch.isin(tokens, self._stop_on[tokens.device], invert=True)
            running = goes_on if running is None else running & goes_on
        assert running is not None
        requests.running = running
        requests.stepped(running)

    def _valid(self, batch: Batch, requests: OpenRequests, phase: int, outer: Forward | None) -> Tensor | None:
        """Return which tokens count: no padding, and no row that has ended."""
        valid = batch.valid
        if batch.hidden and batch.rows > 1:
            same = outer is not None and (outer.rows, outer.length) == (batch.rows, batch.length)
            valid = outer.valid if outer is not None and same else None
            if valid is None:
                self._warn_of_padding()
        running = requests.running
        if running is not None and phase == DECODE and (batch.rows, batch.length) == (requests.rows, 1):
            valid = running if valid is None else valid.to(running.device) & running
        return valid

    def close(self, requests: OpenRequests) -> None:
        """Bring the counts of requests to safety; nothing where that has happened."""
        with self._lock:
            if requests not in self._open:
                return
            self._open.remove(requests)
            closed = requests.close()
            top_k = self._facts.top_k or requests.top_k
            self._facts = replace(self._facts, top_k=top_k, hidden_size=requests.hidden_size or self._facts.hidden_size)
            self.spill.append(closed, self._facts)

    def close_all(self) -> None:
        """Close what is open."""
        while self._open:
            self.close(self._open[0])

    def _drop(self, forward: Forward) -> None:
        requests = forward.requests
        self._note(forward)
        with self._lock:
            if requests in self._open:
                log.info("%d requests were cut off by an exception, and are not in the trace", requests.rows)
                self._open.remove(requests)

    def _note(self, forward: Forward) -> None:
        for position, index, _ in forward.chosen if len(self.seen) < len(self._sites) else ():
            if position not in self.seen and not index.is_meta:
                self.seen.add(position)

    def _warn_of_padding(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "An attention mask came in a form that does not show which tokens are padding, so padding is counted "
                "as tokens. Pass the mask as [rows, tokens], or run one request at a time.",
                LokaWarning,
                stacklevel=2,
            )
