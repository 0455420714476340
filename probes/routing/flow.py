"""Which requests a forward belongs to, and when they have ended.

Requests are followed by their key-value cache: they go on in every forward that is given it, and have ended when nobody
keeps it any more, or it begins anew. Where there is no cache a forward is all there is of its requests, unless a scope
holds several together.
"""

import logging
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from loka.errors import ArgumentError, LokaWarning
from loka.probes.routing.batches import Batch, cache_in, cache_length, reference, valid_tokens
from loka.probes.routing.counting import Counter, Rows
from loka.probes.routing.requests import Forward, OpenRequests
from loka.probes.routing.spill import Spill, TraceFacts
from loka.probes.routing.trace import DECODE, PREFILL

log: Final = logging.getLogger("loka.probes")

_MOST_OPEN: Final[int] = 64  # batches; the oldest closes first
_FEW_ROWS: Final[int] = 64
_MOST_STEPS: Final[int] = 1024  # of a decode in a row that nobody has looked at


@dataclass(slots=True)
class Scope:
    """A stretch that the user has declared to be one batch of requests."""

    domain: str | Sequence[str] | None
    requests: OpenRequests | None = None


class Frame(NamedTuple):
    """A module with hooks whose forward runs, the forward of a batch that it is, and the one around it."""

    module: nn.Module
    forward: Forward
    outer: Forward | None
    error: BaseException | None  # that was being handled when it began


@dataclass(slots=True, eq=False)
class Situation:
    """What a thread has open."""

    forward: Forward | None = None  # the innermost
    frames: list[Frame] = field(default_factory=list)  # of modules with hooks
    scope: Scope | None = None
    domains: list[str] = field(default_factory=list)
    phases: list[int] = field(default_factory=list)


class Flow:
    """Follows requests through the forwards of a model, and hands those that have ended to the spill."""

    def __init__(self, counter: Counter, spill: Spill, facts: TraceFacts, domain: str) -> None:
        self.spill = spill
        self.seen: set[int] = set()  # positions of the sites that ran
        self.displaced: Callable[[], int] = int  # how many modules are watched no more: requests are incomplete then
        self._counter = counter
        self._facts = facts
        self._domain = domain
        self._lock = threading.RLock()
        self._open: tuple[OpenRequests, ...] = ()  # oldest first; another tuple with every change, for other threads
        self._warned = False

    @property
    def unknown(self) -> int:
        """How many choices of closed requests were of no expert that is known of its layer."""
        return self._counter.unknown

    # --- forwards

    def enter(self, batch: Batch, here: Situation, *, whole: bool) -> Forward:
        """Begin a forward of the `whole` model or of a part of it."""
        outer = here.forward
        if outer is not None:
            requests, phase = outer.requests, outer.phase
            self._catch_up(requests)
        else:
            requests, phase = self._place(batch, here, whole=whole)
            self._catch_up(requests)
            if phase == DECODE:
                self._step(requests, batch)
        valid = batch.valid
        if batch.hidden and batch.rows > 1:
            valid = self._valid_around(batch, outer)
        elif valid is None and outer is not None and batch.tokens is not None and batch.tokens is outer.given[0]:
            valid = outer.valid  # a part that is handed the tokens without their mask
        step = requests.step if phase == DECODE and batch.length == 1 and batch.rows == requests.rows else None
        facts = (batch.given, requests.hidden_size, torch.is_inference_mode_enabled())
        here.forward = Forward(requests, phase, batch.rows, batch.length, valid, step, *facts)
        if outer is None:
            plain = whole and phase == DECODE and batch.length == 1 and batch.cached > 0
            requests.again = here.forward if plain and batch.given[0] is batch.tokens is not None else None
        return here.forward

    def again(self, here: Situation, kwargs: Mapping[str, Any]) -> Forward | None:
        """Begin a decode step of the whole model that is just like the one before; None where it may be another thing.

        What `batch_of` and `enter` would do, in a small part of their time: this runs at every token.
        """
        if here.scope is not None or here.phases or len(among := self._open) != 1:
            return None
        requests = among[0]
        forward, cache, tokens = requests.again, kwargs.get("past_key_values"), kwargs.get("input_ids")
        if forward is None or cache is None or requests.cache is None or requests.cache() is not cache:
            return None
        if type(tokens) is not Tensor or tokens.shape != forward.given[0].shape or "decoder_input_ids" in kwargs:
            return None
        mask = kwargs.get("attention_mask")
        valid, hidden = (None, False) if mask is None else valid_tokens(mask, requests.rows, 1, cached=1)
        if hidden or not cache_length(cache):
            return None
        if len(forward.steps) >= _MOST_STEPS:
            self.take(forward)
        fed: Tensor | Rows | None = None
        if self._counter.stop_tokens:  # what they say now: the loop may use their memory again
            fed = tokens.tolist() if tokens.is_cpu and requests.rows <= _FEW_ROWS else tokens.clone()
        forward.steps.append((len(forward.chosen), valid, fed))
        forward.given = tokens, mask
        here.forward = forward
        return forward

    def leave(self, forward: Forward, here: Situation, output: Any) -> None:
        """End a forward that has gone well; `here.forward` is the one around it."""
        self.take(forward)
        if here.forward is not None:
            return
        requests = forward.requests
        if requests.cache is None:
            cache = cache_in(output)
            if cache is not None:
                requests.cache = reference(cache)
                requests.waits = requests.waits or requests.cache is None
            elif not requests.waits and here.scope is None:
                self.close(requests)

    def take(self, forward: Forward) -> None:
        """Bring to its requests what a forward has chosen so far."""
        if len(self.seen) < len(self._counter.sites):
            self._note(forward)
        try:
            forward.requests.take(forward)
        except ArgumentError:
            self.drop(forward)
            raise

    def _catch_up(self, requests: OpenRequests) -> None:
        """Take what plain decode steps have chosen since somebody looked."""
        again = requests.again
        # A part that was told apart may have taken the steps before their choices came: those are left without a step.
        if again is not None and (again.steps or again.chosen):
            self.take(again)

    def drop(self, forward: Forward) -> None:
        """Forget the requests of a forward that failed."""
        requests = forward.requests
        requests.again = None
        self._note(forward)
        with self._lock:
            if requests in self._open:
                log.info("%d requests were cut off by an exception, and are not in the trace", requests.rows)
                self._remove(requests)

    def cut_off(self, here: Situation) -> None:
        """Forget the forward that was left without an end, and its requests."""
        if here.forward is not None:
            self.drop(here.forward)
        for frame in here.frames:
            self.drop(frame.forward)
        here.frames.clear()
        here.forward = None

    # --- requests

    def _place(self, batch: Batch, here: Situation, *, whole: bool) -> tuple[OpenRequests, int]:
        """Return the requests that a forward goes on with, or begins, and its phase."""
        with self._lock:
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
        for requests in self._open:
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
        requests = OpenRequests(rows=batch.rows, domain=domains, counter=self._counter)
        self._open = (*self._open, requests)
        if len(self._open) > _MOST_OPEN:
            self.close(self._open[0])
        return requests

    def _step(self, requests: OpenRequests, batch: Batch) -> None:
        """Count a decode step of the rows that have not ended; a row ends when it is fed a stop token."""
        if self._counter.stop_tokens and batch.tokens is not None and batch.length == 1:
            requests.feed(batch.tokens.clone())  # the loop that gives them may use their memory again
        else:
            requests.step_all()

    def _valid_around(self, batch: Batch, outer: Forward | None) -> Tensor | None:
        """Return which tokens are no padding as far as the forward around knows, where the mask does not show it."""
        valid = None
        if outer is not None and outer.rows == batch.rows and outer.length == batch.length:
            valid = outer.valid
        if valid is None:
            self._warn_of_padding()
        return valid

    def close(self, requests: OpenRequests) -> None:
        """Bring the counts of requests to safety; nothing where that has happened."""
        with self._lock:
            if requests not in self._open:
                return
            self._remove(requests)
            self._catch_up(requests)
            requests.again = None
            if self.displaced():
                log.info("%d requests are not in the trace: a module was compiled in place", requests.rows)
                return
            closed = requests.close()
            top_k = self._facts.top_k or requests.top_k
            hidden_size = requests.hidden_size or self._facts.hidden_size
            if (top_k, hidden_size) != (self._facts.top_k, self._facts.hidden_size):
                self._facts = replace(self._facts, top_k=top_k, hidden_size=hidden_size)
            self.spill.append(closed, self._facts)

    def close_all(self) -> None:
        """Close what is open."""
        while self._open:
            self.close(self._open[0])

    def _remove(self, requests: OpenRequests) -> None:
        self._open = tuple([other for other in self._open if other is not requests])

    def _note(self, forward: Forward) -> None:
        for position, index, _ in forward.chosen:
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
