"""Capture: see every matrix product of a step, forward and backward, and know which site and pass it belongs to.

On a sampled step a `TorchDispatchMode` is entered around the root's forward and around backward; on all other steps
nothing is installed. A mode is always left in the scope that entered it.

How a product finds its site and pass:
- forward: by its weight operand (`SiteMap`), else by the running module.
- backward: autograd numbers its nodes, and the number of the node that runs is the number that was current when the
  forward product was dispatched. Which factor's gradient it is follows from the factor it shares with it (`Forward`).
- recompute under activation checkpointing runs during backward with grad mode on: it renews the numbers, and is not
  counted again.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from loka.formats import Pass
from loka.probes.capturing.collectives import COLLECTIVES, belongs_to_backward
from loka.probes.capturing.convolution import convolution_gemm, convolution_gradients
from loka.probes.capturing.flows import Flows
from loka.probes.capturing.products import (
    CONVOLUTION,
    CONVOLUTION_BACKWARD,
    COPIES,
    FUSED,
    PRODUCTS,
    WHOLE,
    Factor,
    Factors,
    Forward,
    Gemm,
    factors_of,
    gemm,
    obstacle,
    owed_gradients,
    own_tokens,
    per_expert,
)
from loka.probes.capturing.sites import OUTSIDE, SiteKey, SiteMap, is_plain
from loka.probes.capturing.sources import MODE_COST_S, SourceWatch
from loka.probes.capturing.storage import Place
from loka.probes.experts.slices import Slice
from loka.probes.sampling.dynamics import DynamicsMeter

# What it takes to look where the operands of an op lie, where results are followed; charged to the probe.
_FOLLOW_COST_S: Final[float] = 2e-6
# By identity: the packets live as long as torch does, and hashing one runs Python code at every op.
_OF_INTEREST: Final[frozenset[int]] = COLLECTIVES.union(id(packet) for packet in (*PRODUCTS, *COPIES, *FUSED, *WHOLE))
_PLAIN_TYPES: Final[frozenset[type]] = frozenset({Tensor, nn.Parameter})


@dataclass(frozen=True, slots=True)
class Sighting:
    """One product, seen once."""

    key: SiteKey
    product: Pass
    parameter: str
    gemm: Gemm
    node: int  # number of the autograd node of the forward product
    slice: Slice | None = None  # where the weight is one of a stack, as the experts of a layer are kept
    reads: tuple[Place, int] | None = None  # of a forward product: where its input lies, and its version

    @property
    def expert(self) -> int | None:
        """The expert whose product it is, where each is one of its own."""
        return None if self.slice is None else self.slice.expert


class Observer(Protocol):
    """What receives sightings. It may read the tensors only before it returns."""

    def saw(self, sighting: Sighting) -> None:
        """Take note of one product."""

    def lost(self) -> None:
        """Take note of a backward product whose forward was not sampled."""

    def hidden(self, site: str, op: str) -> None:
        """Take note of an operator that computes its products out of sight."""

    def failed(self, error: Exception) -> None:
        """Take note that looking at a product failed; the model's own result is not affected."""


class Capture(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not annotate it
    """Watch the products of one step and tell the observer; the results are exactly the model's own."""

    def __init__(self, sites: SiteMap, observer: Observer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self.sites = sites
        self.observer = observer
        self.probe_s = 0.0
        self.own_s = 0.0
        self._create_graph = self._grad_enabled = False
        self._nodes: dict[int, list[Forward]] = {}
        self._seen: dict[int, set[tuple[int, Factor]]] = {}  # by number: gradients of its products that were seen
        self._recomputed: dict[int, int] = {}  # by number of a checkpoint's node: products it has computed again
        self.dynamics: DynamicsMeter | None = None  # looks at modules too, where it is wanted
        self.flows: Flows | None = None  # follows results of layers, likewise
        self.sources: SourceWatch | None = None  # follows inputs of layers, as a mode of its own
        self.communicates = False  # whether a backward pass has talked to other ranks

    @contextmanager
    def building_graph(self, create_graph: bool) -> Iterator[None]:
        """Say whether the backward inside builds a graph: then grad mode is on without any recompute."""
        before, self._create_graph = self._create_graph, create_graph
        try:
            yield
        finally:
            self._create_graph = before

    @property
    def builds_graph(self) -> bool:
        """Whether the product just seen ran in grad mode, so that its gradient may come by."""
        return self._grad_enabled

    def entered(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A module's forward begins."""
        flows = self.flows
        if flows is not None and flows.minds(module):
            self._note(lambda: flows.entered(module, args, self.sites.name_of(module)))
        self._watch(module, lambda meter: meter.entered(module, args))

    def left(self, module: nn.Module, output: Any) -> None:
        """A module's forward ended."""
        flows = self.flows
        if flows is not None and ((outermost := not self.sites.inside_module) or flows.minds(module)):
            self._note(lambda: flows.left(module, output, self.sites.name_of(module), outermost=outermost))
        self._watch(module, lambda meter: meter.left(module, output))

    def _note(self, at: Callable[[], None]) -> None:
        """Take note of where results go: of no numbers, so that modes may stay."""
        try:
            at()
        except Exception as error:  # noqa: BLE001 - a probe must never stop the training it watches; it is told and ends
            self.observer.failed(error)

    def _watch(self, module: nn.Module, at: Callable[[DynamicsMeter], None]) -> None:
        """Show the meter a module that it watches, unless a checkpoint only runs it again."""
        meter = self.dynamics
        if meter is not None and id(module) in meter.watched and torch._C._current_autograd_node() is None:
            before = self.probe_s
            self._look(lambda: at(meter))
            meter.spent_s += self.probe_s - before

    def forget_gradients(self) -> None:
        """Expect every gradient once more: the graph is run backward again."""
        self._seen.clear()
        self._recomputed.clear()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from wrapping every dispatch: it costs 10 us an op, and the first one imports Dynamo.

        Nothing can be compiled in here: a capture runs under the eager stance, or before anything was compiled at all.
        """
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _PLAIN_TYPES.issuperset(types):
            if FakeTensor in types:
                return func(*args, **kwargs)  # shapes only, e.g. DTensor working out a layout
            return NotImplemented  # a tensor subclass: let it unpack; its local products come by again
        self.probe_s += MODE_COST_S
        packet = func._overloadpacket
        if self.flows is not None:
            self._follow(self.flows, func, args, kwargs)
        if id(packet) not in _OF_INTEREST and not torch.is_inference_mode_enabled():
            return func(*args, **kwargs)
        if id(packet) in COLLECTIVES:
            self.communicates |= belongs_to_backward(torch._C._current_autograd_node())
            return func(*args, **kwargs)
        if packet in PRODUCTS:
            started = time.perf_counter()
            result = func(*args, **kwargs)
            self.own_s += time.perf_counter() - started
            self._look(lambda: self._attribute(packet, args, kwargs))
            return result
        if packet in COPIES:
            result = func(*args, **kwargs)
            self._look(lambda: self._copied(result, args[0]))
            return result
        # Strided ones: torch has kernels for them, and takes jagged ones apart.
        nested = any(isinstance(each, Tensor) and each.is_nested for each in args)
        if packet in (WHOLE if nested else FUSED):
            self._look(lambda: self._hidden(packet))
        elif not nested and (packet in WHOLE or torch.is_inference_mode_enabled()) and _is_composite(func):
            result = self._apart(func, args, kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)

    def _apart(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a composite op, which arrives whole under inference mode, and inside a tensor subclass, in its parts."""
        if func is torch.ops.aten.dropout.default and not args[2]:
            return args[0]  # as by itself; taken apart it is a copy
        with self:
            return func.decompose(*args, **kwargs)

    def _follow(self, flows: Flows, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Show an operator to what follows results; of a composite op that is taken apart, its parts come by."""
        if not (torch.is_inference_mode_enabled() and _is_composite(func)):
            flows.ran(args, kwargs)
            self.probe_s += _FOLLOW_COST_S

    def _look(self, at: Callable[[], None]) -> None:
        """Look at something that has just happened, out of sight of every mode; charge the time to the probe."""
        started = time.perf_counter()
        self._grad_enabled = torch.is_grad_enabled()
        try:
            with _disable_current_modes(), torch.no_grad():
                at()
        except Exception as error:  # noqa: BLE001 - a probe must never stop the training it watches; it is told and ends
            self.observer.failed(error)
        self.probe_s += time.perf_counter() - started

    def _attribute(self, packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        node = torch._C._current_autograd_node()
        if packet is CONVOLUTION_BACKWARD:
            self._convolution_backward(node, args)
            return
        if packet is CONVOLUTION:
            factors = Factors("convolution", args[0], args[1])
        else:
            factors = factors_of(packet, args, kwargs)
        if packet is not torch.ops.aten._scaled_mm and not (is_plain(factors.p) and is_plain(factors.q)):
            self._unmeasured(packet, factors)
            return
        if node is None:
            self._forward(factors, args)
        elif self._grad_enabled and not self._create_graph:
            self._recompute(node, factors)
        elif packet is not CONVOLUTION:
            self._backward(node, factors)

    def _copied(self, copy: Tensor, original: Tensor) -> None:
        self.sites.alias(copy, original)
        if self.dynamics is not None:
            self.dynamics.copied(copy, original)

    def _unmeasured(self, packet: Any, factors: Factors) -> None:
        """Tell of a weight that multiplies a sparse tensor, of which nothing is measured."""
        if torch._C._current_autograd_node() is not None:
            return  # its forward has been told of
        sparse = any(each.layout not in (torch.strided, torch.jagged) for each in (factors.p, factors.q))
        owner = self.sites.find(factors.q) or self.sites.find(factors.p)
        if sparse and owner is not None and self.sites.admits(owner.module, owner.site):
            self.observer.hidden(owner.site, packet.__name__)

    def _hidden(self, packet: Any) -> None:
        if torch._C._current_autograd_node() is not None:
            return  # its forward has been told of
        key, module = self.sites.nameless()
        if self.sites.admits(module, key.owner):
            self.observer.hidden(key.owner, packet.__name__)

    # --- forward ---

    def _forward(self, factors: Factors, args: tuple[Any, ...]) -> None:
        forward = self._identify(factors)
        if forward is None:
            return
        if forward.admitted and _is_stacked(forward, factors):
            forward = replace(forward, own=own_tokens(factors.q.mT if forward.weight_is_p else factors.p))
        self._remember(forward)
        if forward.admitted:
            if factors.op == "convolution":
                found = convolution_gemm(args)
            else:
                found = _by_expert(gemm(factors, a_is_p=not forward.weight_is_p), forward, factors, "fprop")
            node = _next_number()
            x, place = (factors.q, forward.q) if forward.weight_is_p else (factors.p, forward.p)
            # The version of the tensor itself: a view made in here has one of its own, and inference keeps none.
            reads = None if x.is_inference() else (place, x._version)
            self.observer.saw(Sighting(forward.key, "fprop", forward.parameter, found, node, forward.slice, reads))

    def _identify(self, factors: Factors) -> Forward | None:
        """Find the site of a forward product: that of its weight operand, else that of the running module."""
        owner = self.sites.find(factors.q)
        weight_is_p = owner is None and (owner := self.sites.find(factors.p)) is not None
        stacked = None
        if owner is not None:
            key, module, parameter = SiteKey(owner.site), owner.module, owner.parameter
            stacked = self.sites.slice_of(owner, factors.p if weight_is_p else factors.q)
        elif self.sites.inside_module or self._grad_enabled:
            key, module = self.sites.nameless()
            parameter = ""
        else:
            return None  # an optimiser's own arithmetic, in a step scope that encloses it
        admitted = self.sites.admits(module, key.owner if key.owner != OUTSIDE else "")
        p, q = Place.of(factors.p, keep=True), Place.of(factors.q, keep=True)
        return Forward(key, parameter, p, q, weight_is_p, admitted, stacked)

    def _remember(self, forward: Forward) -> None:
        number = _next_number()
        self._nodes.setdefault(number, []).append(forward)

    def _recompute(self, node: Any, factors: Factors) -> None:
        """Renew what backward will look for; a product without a weight is the next one that the checkpoint ran."""
        number = node._sequence_nr()
        originals, position = self._nodes.get(number, ()), self._recomputed.get(number, 0)
        p, q = Place.of(factors.p, keep=True), Place.of(factors.q, keep=True)
        if position < len(originals):
            original = originals[position]
            if (original.p.shape, original.q.shape) == (p.shape, q.shape):
                self._recomputed[number] = position + 1
                self._remember(replace(original, p=p, q=q))
                return
        forward = self._identify(factors)
        if forward is not None:
            self._remember(forward)

    # --- backward ---

    def _backward(self, node: Any, factors: Factors) -> None:
        number = node._sequence_nr()
        first, second = Place.of(factors.p), Place.of(factors.q)
        candidates = self._nodes.get(number, [])
        if any(forward.repeats(first, second) for forward in candidates):
            return
        seen = self._seen.setdefault(number, set())
        owed = owed_gradients(node)
        ranking = []
        for index, forward in enumerate(candidates):
            missing = [factor for factor in owed if (index, factor) not in seen]
            ranking.append((-forward.shared(first, second), not missing, index, missing[0] if missing else "p"))
        for _, _, index, expected in sorted(ranking):
            forward = candidates[index]
            named = forward.classify(first, second, expected)
            if named is None:
                continue
            factor, saved_first = named
            seen.add((index, factor))
            if len(seen) == len(owed) * len(candidates):
                seen.clear()  # the graph may be run backward again
            if forward.admitted:
                # The rows of a gradient's product are those of the other factor: grad_output's.
                product = forward.pass_of(factor)
                found = _by_expert(gemm(factors, a_is_p=not saved_first), forward, factors, product)
                self.observer.saw(Sighting(forward.key, product, forward.parameter, found, number, forward.slice))
            return
        if not candidates and not _multiplies_for_others(node):
            self.observer.lost()

    def _convolution_backward(self, node: Any, args: tuple[Any, ...]) -> None:
        candidates = self._nodes.get(node._sequence_nr(), []) if node is not None else []
        if not candidates:
            self.observer.lost()
            return
        places = Place.of(args[1]), Place.of(args[2])
        forward = max(reversed(candidates), key=lambda forward: forward.shared(*places))
        if forward.admitted:
            for product, gradient in convolution_gradients(args):
                number = node._sequence_nr()
                self.observer.saw(Sighting(forward.key, product, forward.parameter, gradient, number))


def _by_expert(found: Gemm, forward: Forward, factors: Factors, product: Pass) -> Gemm:
    """Tell the experts of a batch of products apart, where their weights are a stack."""
    if forward.slice is None or not _is_stacked(forward, factors):
        return found
    return per_expert(found, forward.slice.experts, forward.own, of_tokens=product != "wgrad")


def _is_stacked(forward: Forward, factors: Factors) -> bool:
    """Whether a product is a batch with the weights of all experts."""
    stacked = forward.slice is not None and forward.slice.expert is None
    return stacked and factors.p.dim() == 3 and factors.q.dim() == 3 and not obstacle(factors.p, factors.q)


def _next_number() -> int:
    """Return the number that autograd gives to the node of the product which has just run."""
    return int(torch._C._autograd._get_sequence_nr()) - 1


def _multiplies_for_others(node: Any) -> bool:
    """Whether products under this node are no gradients of its own.

    Where it only stores a gradient, they are those of a hook, e.g. an optimiser in backward; where it is a checkpoint,
    those of another checkpoint inside it, which runs its forward without gradient again.
    """
    return str(node.name()).endswith(("AccumulateGrad", "CheckpointFunctionBackward"))


def _is_composite(func: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))
