"""Trace where a mixture of experts sends its tokens while it runs, request by request.

    with loka.trace_routing(model, "routing.npz") as trace:
        with trace.domain("code"):
            model.generate(**batch)                      # every row of a batch is a request
        with trace.request(domain="chat"):               # or a scope says where a request begins and ends
            model(**prompt); model(**answer)

What stands in front of the modules that choose or receive experts remembers each choice; what stands in front of the
model, and of the parts of it that take tokens, says which request a token belongs to. Nothing of the model is changed,
and all of that goes at the end.

What a request is: a row of a batch, first dimension first. It goes on in every forward that is given its key-value
cache, or in all forwards of a `request` scope. Flat tokens, [tokens] or [tokens, features], are one request. The first
forward is the prefill, those after it with a cache or of a single token the decode; `trace.phase` says otherwise.
Padding that the attention mask shows is not counted, nor is a row after it was fed a stop token. Rows of a beam search,
or of several sequences for a prompt, are requests of their own.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from torch import nn

from loka.errors import ArgumentError, EvidenceError, LokaWarning
from loka.naming import unwrap
from loka.probes.routing.counting import Counter
from loka.probes.routing.flow import Flow, Scope
from loka.probes.routing.sites import RoutingSite, routing_sites
from loka.probes.routing.spill import Spill, TraceFacts, check_domains
from loka.probes.routing.trace import PHASES
from loka.probes.routing.watching import Here, Watch

_UNKNOWN: Final[str] = "unknown"


def trace_routing(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    experts: str | Sequence[str] | None = None,
    domain: str = _UNKNOWN,
    stop_tokens: Sequence[int] | None = None,
) -> "RoutingRecorder":
    """Return a context manager that writes the routing trace of what runs inside it to `path`.

    - `experts`: names (globs, or re:regex) of modules that choose or receive experts, where they are not found by
      themselves.
    - `domain`: of requests that no scope names one for.
    - `stop_tokens`: after one of them, a row of a batch has ended; by default those of the model's generation config,
      and its padding token; () for none.

    Inside the block a compiled model runs eagerly. Requests are kept in `<path>.partial` as they close, and survive a
    crash there (`loka moe convert` makes a trace of them). Of several processes each needs a path of its own. Raises
    ArgumentError and EvidenceError, before anything runs where that can be.
    """
    return RoutingRecorder(model, Path(path), routing_sites(unwrap(model), experts), domain, stop_tokens)


class RoutingRecorder:
    """What `loka.trace_routing` returns: a context manager, whose methods say what the forwards inside belong to."""

    def __init__(
        self,
        model: nn.Module,
        path: Path,
        sites: tuple[RoutingSite, ...],
        domain: str,
        stop_tokens: Sequence[int] | None,
    ) -> None:
        self.path = path
        self.sites = sites
        self._root = unwrap(model)
        self._domain = check_domains([domain])[0]
        self._stop = _stop_tokens(self._root) if stop_tokens is None else tuple(stop_tokens)
        self._copied = isinstance(model, nn.DataParallel) and len(model.device_ids) > 1
        self._here = Here()
        self._flow: Flow | None = None
        self._watch: Watch | None = None

    @property
    def requests(self) -> int:
        """How many requests have closed, and are safe."""
        return 0 if self._flow is None else self._flow.spill.requests

    # --- scopes

    @contextmanager
    def request(self, domain: str | Sequence[str] | None = None) -> Iterator[None]:
        """Take all forwards inside as one batch of requests; `domain` for all of its rows, or one for each."""
        here = self._here.now
        if here.scope is not None:
            raise ArgumentError("A request scope is open already, and they do not nest. Use trace.domain inside it.")
        if domain is not None:
            check_domains([domain] if isinstance(domain, str) else domain)
        scope = here.scope = Scope(domain)
        try:
            yield
        finally:
            here.scope = None
            if scope.requests is not None and self._flow is not None:
                self._flow.close(scope.requests)

    @contextmanager
    def domain(self, name: str) -> Iterator[None]:
        """Give this domain to the requests that begin inside; the innermost one counts."""
        domains = self._here.now.domains
        domains.append(check_domains([name])[0])
        try:
            yield
        finally:
            domains.pop()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the forwards inside as "prefill" or "decode", whatever they look like."""
        if name not in PHASES:
            raise ArgumentError(f"There is no phase {name!r}. Say 'prefill' or 'decode'.")
        phases = self._here.now.phases
        phases.append(PHASES.index(name))
        try:
            yield
        finally:
            phases.pop()

    # --- entering and leaving the block

    def __enter__(self) -> Self:
        """Begin to watch; raise ArgumentError where the trace cannot be written."""
        if self._flow is not None:
            raise ArgumentError("This trace has been recorded. Call loka.trace_routing(...) again for another one.")
        facts = TraceFacts(
            layers=tuple(site.layer for site in self.sites),
            experts=max(site.experts for site in self.sites),
            model=type(self._root).__name__,
            top_k=_config_number(self._root, ("num_experts_per_tok", "num_experts_per_token", "moe_top_k")),
        )
        counter = Counter(self.sites, self._stop)
        self._flow = Flow(counter, Spill(self.path, facts), facts, self._domain)
        self._watch = Watch(self._root, self.sites, self._flow, self._here, copied=self._copied)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the model as it was, close what is open, write the trace; raise EvidenceError where there is none."""
        assert self._flow is not None
        assert self._watch is not None
        spill = self._flow.spill
        displaced = self._watch.end()
        self._flow.cut_off(self._here.now)
        try:
            self._flow.close_all()
        finally:
            if self._flow.seen and spill.requests:
                spill.finish()
            else:
                spill.discard()
        if displaced and error is None:
            told = (
                f"{displaced} of the watched modules were compiled in place while their routing was traced, and what "
                "they routed afterwards was not seen. Call compile() before the block."
            )
            if not spill.requests:
                raise EvidenceError(f"{told} No request had ended before, so there is no trace.")
            warnings.warn(
                f"{told} Requests that had ended before are in the trace: {spill.requests}.", LokaWarning, stacklevel=2
            )
        if not self._flow.seen and error is None:
            raise EvidenceError(
                f"No token was routed inside the block, so there is no trace. {len(self.sites)} sites were watched, "
                f"first {self.sites[0].name!r}; run the model, or a part that takes input_ids, inside."
            )
        if error is None and spill.requests:
            self._tell_what_is_missing(self._flow)

    def _tell_what_is_missing(self, flow: Flow) -> None:
        """Warn of what was routed, or may have been, and is not in the trace."""
        missing = []
        if flow.unknown:
            missing.append(
                f"{flow.unknown} choices are of no expert that is known of its layer, and not in the trace: experts "
                "without weights, or tokens that a layer leaves to other ranks or to nobody."
            )
        unseen = [site.name for position, site in enumerate(self.sites) if position not in flow.seen]
        if unseen:
            missing.append(
                f"{len(unseen)} of {len(self.sites)} sites never ran, and are all zero in the trace: "
                f"{', '.join(unseen[:3])}. Their layer may run a fused kernel instead of its modules."
            )
        for words in missing:
            warnings.warn(words, LokaWarning, stacklevel=3)


def _stop_tokens(model: nn.Module) -> tuple[int, ...]:
    """Return the tokens after which `generate` feeds a row no more of its own."""
    config = getattr(model, "generation_config", None)
    found: set[int] = set()
    for name in ("eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        found |= set(value if isinstance(value, list | tuple) else [] if value is None else [value])
    return tuple(sorted(found))


def _config_number(model: nn.Module, names: Sequence[str]) -> int | None:
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)
