"""Trace where a mixture of experts sends its tokens while it runs, request by request.

    with loka.trace_routing(model, "routing.npz") as trace:
        with trace.domain("code"):
            model.generate(**batch)                      # every row of a batch is a request
        with trace.request(domain="chat"):               # or a scope says where a request begins and ends
            model(**prompt); model(**answer)

Hooks on the modules that choose or receive experts remember each choice; hooks on the model, and on the parts of it
that take tokens, say which request a token belongs to. Nothing of the model is changed, and all hooks go at the end.

What a request is: a row of a batch, first dimension first. It goes on in every forward that is given its key-value
cache, or in all forwards of a `request` scope. Flat tokens, [tokens] or [tokens, features], are one request. The first
forward is the prefill, those after it with a cache or of a single token the decode; `trace.phase` says otherwise.
Padding that the attention mask shows is not counted, nor is a row after it was fed a stop token. Rows of a beam search,
or of several sequences for a prompt, are requests of their own.
"""

import inspect
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loka.errors import ArgumentError, EvidenceError, LokaWarning
from loka.naming import unwrap
from loka.probes.routing.batches import batch_of, takes_batches
from loka.probes.routing.flow import Flow, Scope, Situation
from loka.probes.routing.sites import RoutingSite, routing_sites
from loka.probes.routing.spill import Spill, TraceFacts, check_domains
from loka.probes.routing.trace import PHASES

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
        self._here = Situation()
        self._flow: Flow | None = None
        self._exit = ExitStack()

    @property
    def requests(self) -> int:
        """How many requests have closed, and are safe."""
        return 0 if self._flow is None else self._flow.spill.requests

    # --- scopes

    @contextmanager
    def request(self, domain: str | Sequence[str] | None = None) -> Iterator[None]:
        """Take all forwards inside as one batch of requests; `domain` for all of its rows, or one for each."""
        here = self._here
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
        domains = self._here.domains
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
        phases = self._here.phases
        phases.append(PHASES.index(name))
        try:
            yield
        finally:
            phases.pop()

    # --- entering and leaving the block

    def __enter__(self) -> Self:
        """Install the hooks; raise ArgumentError where the trace cannot be written."""
        if self._flow is not None:
            raise ArgumentError("This trace has been recorded. Call loka.trace_routing(...) again for another one.")
        facts = TraceFacts(
            layers=tuple(site.layer for site in self.sites),
            experts=max(site.experts for site in self.sites),
            model=type(self._root).__name__,
            top_k=_config_number(self._root, ("num_experts_per_tok", "num_experts_per_token", "moe_top_k")),
        )
        self._flow = Flow(self.sites, Spill(self.path, facts), facts, self._domain, self._stop)
        parts = [module for module in self._root.modules() if module is self._root or takes_batches(module)]
        hooks = [hook for module in parts for hook in self._watch_batches(module, self._flow)]
        hooks += [self._watch_site(position, site, self._flow) for position, site in enumerate(self.sites)]
        for hook in hooks:
            self._exit.callback(hook.remove)
        # On CUDA `generate` may compile by itself.
        if "torch._dynamo" in sys.modules or any(parameter.is_cuda for parameter in self._root.parameters()):
            self._exit.enter_context(torch.compiler.set_stance("force_eager"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Remove the hooks, close what is open, write the trace; raise EvidenceError where nothing was seen."""
        self._exit.close()
        assert self._flow is not None
        spill = self._flow.spill
        self._flow.cut_off(self._here)
        try:
            self._flow.close_all()
        finally:
            if self._flow.seen and spill.requests:
                spill.finish()
            else:
                spill.discard()
        if not self._flow.seen and error is None:
            raise EvidenceError(
                f"No token was routed inside the block, so there is no trace. {len(self.sites)} sites were watched, "
                f"first {self.sites[0].name!r}; run the model, or a part that takes input_ids, inside."
            )
        unseen = [site.name for position, site in enumerate(self.sites) if position not in self._flow.seen]
        if unseen and spill.requests and error is None:
            warnings.warn(
                f"{len(unseen)} of {len(self.sites)} sites never ran, and are all zero in the trace: "
                f"{', '.join(unseen[:3])}. Their layer may run a fused kernel instead of its modules.",
                LokaWarning,
                stacklevel=2,
            )

    # --- hooks

    def _watch_batches(self, module: nn.Module, flow: Flow) -> tuple[RemovableHandle, RemovableHandle]:
        signature = inspect.signature(module.forward)
        whole, here = module is self._root, self._here

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for frame in here.frames:
                if frame.module is module:  # left by an exception that no hook sees
                    flow.cut_off(here)
                    break
            given = (kwargs.get("input_ids"), kwargs.get("attention_mask"))
            if flow.pass_on(module, given, here):
                return
            batch = batch_of(signature, args, kwargs)
            if batch is not None:
                flow.enter(module, batch, given, here, whole=whole)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if here.frames and here.frames[-1].module is module:
                flow.leave(here, output)

        return (
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, always_call=True),
        )

    def _watch_site(self, position: int, site: RoutingSite, flow: Flow) -> RemovableHandle:
        here, read = self._here, site.read

        def saw(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
            forward = here.forward
            if forward is None:
                return  # outside of a forward: a recomputation in backward, or a layer that is tried alone
            index = read(module, args, kwargs, output)
            if forward.width is None:
                forward.width = _width(args, kwargs)
            if forward.saw(position, index):
                flow.take(forward)

        if site.when == "before":
            return site.module.register_forward_pre_hook(saw, with_kwargs=True)
        return site.module.register_forward_hook(saw, with_kwargs=True)


def _width(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Return the width of the tokens that a module is handed."""
    hidden = args[0] if args else next(iter(kwargs.values()), None)
    return hidden.shape[-1] if isinstance(hidden, Tensor) and hidden.is_floating_point() else None


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
