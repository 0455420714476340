"""What stands in front of a model, of the parts of it that take tokens, and of the modules that choose experts.

As a rule that is a `Call`: hooks would send the module the long way through `nn.Module.__call__`, which takes several
times longer than what is done here. Hooks of ours stay where a call would see other arguments than they do: behind
hooks that were there before, which may change them, and in replicas, which take the calls of their original along.
"""

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from threading import Lock, get_ident, local
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from loka.calls import Call, copies_leave_it, mark
from loka.errors import LokaWarning
from loka.probes.routing.batches import batch_of, takes_batches
from loka.probes.routing.flow import Flow, Frame, Situation
from loka.probes.routing.requests import Forward
from loka.probes.routing.sites import RoutingSite, received


class Here:
    """The situation of each thread: of the one that traces at hand, of others behind a longer look-up."""

    __slots__ = ("_others", "mine", "thread")

    def __init__(self) -> None:
        self.thread = get_ident()
        self.mine = Situation()
        self._others = _Others()

    @property
    def now(self) -> Situation:
        """The situation of this thread."""
        return self.mine if self.thread == get_ident() else self._others.now


class _Others(local):
    def __init__(self) -> None:
        self.now = Situation()


class Watch:
    """What stands on a model from the time it is made until `end`."""

    def __init__(self, root: nn.Module, sites: Sequence[RoutingSite], flow: Flow, here: Here, *, copied: bool) -> None:
        self._calls: list[Call] = []
        self.eager = Eager(root)
        self._exit = ExitStack()
        self._flow = flow
        self._here = here
        self._copied = copied
        flow.displaced = self.displaced
        self._exit.callback(self.eager.end)
        try:
            for detach in self._attach(root, sites):
                self._exit.callback(detach)
        except BaseException:  # whatever it is goes on
            self._exit.close()
            raise

    def displaced(self) -> int:
        """Return how many modules are watched no more, for something else took the place of their calls."""
        return sum(not call.is_in_place for call in self._calls)

    def end(self) -> int:
        """Leave the model as it was; return how many of its modules were watched no more by then."""
        displaced = self.displaced()
        self._flow.displaced = lambda: displaced
        self._exit.close()
        return displaced

    def _attach(self, root: nn.Module, sites: Sequence[RoutingSite]) -> Iterator[Callable[[], None]]:
        """Attach to every module, of several on one the innermost first; yield what undoes each."""
        flow, here = self._flow, self._here
        parts = [module for module in root.modules() if module is root or takes_batches(module)]
        modules = {*parts, *(site.module for site in sites)}
        hooked = {module for module in modules if self._copied or _needs_hooks(module)}
        for when in ("before", "after"):
            for position, site in enumerate(sites):
                if site.when == when:
                    found = Site(position, site, flow)
                    yield _hook_site(found, here) if site.module in hooked else self._keep(SiteCall(found, here))
            for module in parts if when == "before" else ():
                part = BatchPart(module, flow, self.eager, whole=module is root)
                yield from _hook_part(part, here) if module in hooked else (self._keep(PartCall(part, here)),)

    def _keep(self, call: Call) -> Callable[[], None]:
        self._calls.append(call)
        return call.detach


def _needs_hooks(module: nn.Module) -> bool:
    """Whether a call would see what hooks that are there already change, or go along in copies of the module."""
    return bool(module._forward_pre_hooks or nn_module._global_forward_pre_hooks) or not copies_leave_it(module)


class _Stance:
    """The stance of compiled code, which belongs to the process: whoever ends last gives back what the first one found.

    Each by itself would give back what it has found, and traces may end in any order.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._users = 0
        self._before = ExitStack()

    def take(self) -> None:
        with self._lock:
            if not self._users:
                self._before.enter_context(torch.compiler.set_stance("force_eager"))
            self._users += 1

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._before.close()


_stance: Final = _Stance()


class Eager:
    """Has compiled code run eagerly, from the time on that there can be any. What it would do could not be seen."""

    def __init__(self, root: nn.Module) -> None:
        self.waits = True  # for Dynamo, which takes a second to import
        # On CUDA `generate` may compile by itself.
        if "torch._dynamo" in sys.modules or any(parameter.is_cuda for parameter in root.parameters()):
            self._begin()

    def look(self) -> None:
        """See whether there can be compiled code by now."""
        if "torch._dynamo" in sys.modules:
            from torch._dynamo.utils import counters

            if counters["frames"]["total"]:
                warnings.warn(
                    "Code was compiled for the first time while its routing was traced. What it routed before the "
                    "next eager call of the model is not in the trace: compile before the block.",
                    LokaWarning,
                    stacklevel=2,
                )
            self._begin()

    def _begin(self) -> None:
        self.waits = False
        _stance.take()

    def end(self) -> None:
        """Let compiled code run again."""
        if self.waits:
            self.look()
        if not self.waits:
            _stance.release()


# --- modules that take tokens


class BatchPart:
    """A model, or a part of it, that is given batches."""

    __slots__ = ("eager", "flow", "module", "signature", "whole")

    def __init__(self, module: nn.Module, flow: Flow, eager: Eager, *, whole: bool) -> None:
        self.module = module
        self.flow = flow
        self.eager = eager
        self.whole = whole
        self.signature = inspect.signature(module.forward)

    def begin(self, now: Situation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Forward | None:
        """Begin a forward; None where nothing is given that could be a batch.

        Where that is the very tokens and mask of the forward around, or its tokens and no mask, this one is part of it.
        """
        outer = now.forward
        if outer is not None:
            tokens, mask = outer.given
            if tokens is not None and kwargs.get("input_ids") is tokens and kwargs.get("attention_mask", mask) is mask:
                return outer
        if self.eager.waits:
            self.eager.look()
        batch = batch_of(self.signature, args, kwargs)
        return None if batch is None else self.flow.enter(batch, now, whole=self.whole)


class PartCall(Call):
    """Tells the flow of each forward of a part."""

    __slots__ = ("_here", "_part")

    hidden: ClassVar[bool] = True

    def __init__(self, part: BatchPart, here: Here) -> None:
        self._part = part
        self._here = here
        super().__init__(part.module)

    def entry(self) -> Callable[..., Any]:
        """Return what is called instead of the module."""
        here, inner, flow = self._here, self._inner, self._part.flow
        begin, whole, eager = self._part.begin, self._part.whole, self._part.eager

        def call(*args: Any, **kwargs: Any) -> Any:
            now = here.mine if here.thread == get_ident() else here.now
            outer = now.forward
            forward = None
            if whole and outer is None and not args and not eager.waits and self._attached:
                forward = flow.again(now, kwargs)
            plain = forward is not None
            if forward is None:
                forward = begin(now, args, kwargs) if self._attached else None
                if forward is None:
                    return inner(*args, **kwargs)
            try:
                output = inner(*args, **kwargs)
            except BaseException:  # the user's own goes on; whatever it is, the forward has no end
                self._failed(now, forward, outer)
                raise
            now.forward = outer
            if not plain and forward is not outer and self._attached:  # the block may end inside, or in another thread
                flow.leave(forward, now, output)
            return output

        return mark(call, self)

    def _failed(self, now: Situation, forward: Forward, outer: Forward | None) -> None:
        now.forward = outer
        if outer is None:
            now.frames.clear()
        if self._attached:
            self._part.flow.drop(forward)


def _hook_part(part: BatchPart, here: Here) -> tuple[Callable[[], None], Callable[[], None]]:
    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now = here.now
        for frame in now.frames:
            if frame.module is module:  # left by an exception that no hook sees
                part.flow.cut_off(now)
                break
        outer = now.forward
        forward = part.begin(now, args, kwargs)
        if forward is not None:
            now.frames.append(Frame(module, forward, outer, sys.exception()))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        now = here.now
        if not now.frames or now.frames[-1].module is not module:
            return
        _, forward, outer, error = now.frames.pop()
        now.forward = outer
        if output is None and sys.exception() is not error:
            part.flow.drop(forward)
        elif forward is not outer:
            part.flow.leave(forward, now, output)

    return (
        part.module.register_forward_pre_hook(enter, with_kwargs=True).remove,
        part.module.register_forward_hook(leave, always_call=True).remove,
    )


# --- modules that choose or receive experts


class Site:
    """A routing site, and the flow that its choices go to."""

    __slots__ = ("first", "flow", "module", "position", "read")

    def __init__(self, position: int, site: RoutingSite, flow: Flow) -> None:
        self.position = position
        self.module = site.module
        self.read = site.read
        self.first = site.when == "before"
        self.flow = flow

    def saw(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
        """Remember what was chosen, and return it."""
        index = self.read(self.module, args, kwargs, output)
        if forward.width is None:
            forward.width = _width(args, kwargs)
        if forward.saw(self.position, index):
            self.flow.take(forward)
        return index


class SiteCall(Call):
    """Shows a site what its module is given and gives, inside of a forward.

    Outside of one are recomputations in backward, and layers that are tried alone.
    """

    __slots__ = ("_here", "_site")

    hidden: ClassVar[bool] = True

    def __init__(self, site: Site, here: Here) -> None:
        self._site = site
        self._here = here
        super().__init__(site.module)

    def entry(self) -> Callable[..., Any]:
        """Return what is called instead of the module."""
        return mark(self._early() if self._site.first else self._late(), self)

    def _late(self) -> Callable[..., Any]:
        here, inner, site = self._here, self._inner, self._site

        def call(*args: Any, **kwargs: Any) -> Any:
            output = inner(*args, **kwargs)
            forward = here.now.forward
            if forward is not None:
                site.saw(forward, args, kwargs, output)
            return output

        return call

    def _early(self) -> Callable[..., Any]:
        """Return what is called in every layer of every step.

        So what `Site.saw` would do with a second argument is written out here. Whether that still is a choice of
        experts shows in `OpenRequests.take`.
        """
        here, inner, site, position = self._here, self._inner, self._site, self._site.position
        reads_second = False  # whether the second argument was what the site has read

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal reads_second
            forward = (here.mine if here.thread == get_ident() else here.now).forward
            if forward is not None:
                chosen = forward.chosen
                if reads_second and len(chosen) + 1 < forward.room:
                    try:
                        index = args[1]
                        chosen.append((position, index, index._version))
                    except (IndexError, AttributeError, RuntimeError):  # the last of an inference tensor
                        site.saw(forward, args, kwargs, None)
                else:
                    index = site.saw(forward, args, kwargs, None)
                    reads_second = site.read is received and len(args) > 1 and index is args[1]
            return inner(*args, **kwargs)

        return call


def _hook_site(site: Site, here: Here) -> Callable[[], None]:
    def saw(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
        forward = here.now.forward
        if forward is not None:
            site.saw(forward, args, kwargs, output)

    if site.first:
        return site.module.register_forward_pre_hook(saw, with_kwargs=True).remove
    return site.module.register_forward_hook(saw, with_kwargs=True).remove


def _width(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Return the width of the tokens that a module is handed."""
    hidden = args[0] if args else next(iter(kwargs.values()), None)
    return hidden.shape[-1] if isinstance(hidden, Tensor) and hidden.is_floating_point() else None
