"""Steps of the optimizer that a kernel would spoil are held back, until it is known which kernel it is.

A monitor tries the kernels on one step in `every`. A kernel that begins to give NaN in between reaches the weights with
the next step of the optimizer, and nothing brings those back. So where a plan runs kernels that can fail, gradients are
looked at before each step of a `torch.optim` optimizer. Where they are not finite it sees none, as in a step that loss
scaling leaves out, and the next step of the run is monitored whatever that costs: in high precision, with every kernel
tried. Gradients that are not finite there either are the training's own: they pass. Ranks that monitor together take
samples together alone, so they go on leaving steps out until the next one is due.

Loss scaling leaves such a step out by itself, and halves its scale each time: it asks no optimizer, or tells a fused
one. So the next step of the run is monitored, too, where no optimizer has stepped for more backward passes than it ever
took before, and where a fused one is told.

The answer is wanted before the optimizer goes on: on a device each of its steps waits for the backward pass, as it does
under loss scaling. What a look takes is told with the rest, and comes on top of the budget for samples.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import LBFGS, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from loka.dispatch.monitoring.finite import are_finite, has_nan, is_finite
from loka.dispatch.monitoring.plan_watch import PlanWatch
from loka.probes.records import Event
from loka.probes.sampling.steps import Steps

# Names that an event tells; the others are counted.
_NAMED: Final[int] = 3


@dataclass(slots=True)
class _Known:
    """What is known of one optimizer."""

    groups: int = -1  # groups of parameters that it had when it was looked at
    is_ours: bool = False  # it changes the model
    after: int = 0  # steps of the run before its last step
    passes: bool = False  # gradients that are not finite are the training's own
    held: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)
    inner: int = 0  # steps inside of the one that runs: `super().step()` is one of its own to torch
    closure: "weakref.ref[Any] | None" = None  # what computes the gradients of the step that runs, looked at
    hooks: list[RemovableHandle] = field(default_factory=list)  # of this step, between those of the user's

    def begin(self) -> None:
        """Forget what a step that did not come to its end has left."""
        self.inner, self.held, self.closure = 0, [], None
        while self.hooks:
            self.hooks.pop().remove()

    def give_back(self) -> None:
        """Give back what was held: the loop, and hooks of its own, may look at it, and clear it as ever."""
        if self.inner:
            return
        held, self.held = self.held, []
        for parameter, gradient in held:
            if parameter.grad is None:
                parameter.grad = gradient

    def is_inside(self, closure: object) -> bool:
        """Whether a step that begins is inside of another one of its optimizer's, which was looked at."""
        if callable(closure):
            return self.closure is not None and closure is self.closure()
        return bool(self.held) and all(parameter.grad is None for parameter, _ in self.held)


@dataclass(slots=True)
class HeldSteps:
    """Looks at the gradients of a monitored training, before its optimizers do."""

    model: nn.Module
    watch: PlanWatch
    steps: Steps
    tell: Callable[[Event], None]
    count: int = 0
    _handles: list[RemovableHandle] = field(default_factory=list)
    _known: "weakref.WeakKeyDictionary[Optimizer, _Known]" = field(default_factory=weakref.WeakKeyDictionary)
    _before_step: int = 0  # backward passes of the run before the last step of an optimizer
    _usual: int = 0  # the most of them that came before a step; 0: none has been seen
    _last: int = -1  # the step of the run whose gradients were last held
    _after: int = 0  # steps of the run before the last step of any that is ours: where one that is new has begun

    def attach(self) -> None:
        """Begin to look. Code that is compiled around a step calls what looks as it is."""
        before, after = _disable_dynamo(partial(self._before)), _disable_dynamo(partial(self._behind))
        self._handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]

    def detach(self) -> None:
        """Look no more."""
        for each in (self._handles, *(known.hooks for known in self._known.values())):
            while each:
                each.pop().remove()

    def went_backward(self) -> None:
        """Have the next step looked at where the optimizers have come to a halt."""
        since = self._since_step
        if not self._usual or since <= self._usual or not self._handles or not self.watch.can_fail:
            return
        self._usual = 2 * since
        self.watch.urgent = True
        self._say("no_step", f"no optimizer has stepped for {since} backward passes: the next step is monitored")

    @property
    def _since_step(self) -> int:
        """Backward passes since an optimizer has stepped."""
        return self.steps.rhythm.backwards - self._before_step

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Look at the gradients that the optimizer gets, behind hooks of the user or the closure that computes them."""
        known = self._of(optimizer)
        if not self.watch.can_fail or self.steps.ended or not known.is_ours:
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if known.is_inside(closure):
            known.inner += 1
            return None
        known.begin()
        if not callable(closure):
            if optimizer._optimizer_step_pre_hooks:
                known.hooks.append(optimizer.register_step_pre_hook(lambda *_: self._look_harmlessly(optimizer)))
            else:
                self._look_harmlessly(optimizer)
            return None
        if any(isinstance(each, Optimizer) for each in vars(optimizer).values()):
            return None  # the one that it has take the step is looked at then
        looked_at = self._looked_at(optimizer, closure)
        known.closure = weakref.ref(looked_at)
        if len(args) > 1:
            return (args[0], looked_at, *args[2:]), kwargs
        return args, {**kwargs, "closure": looked_at}

    def _looked_at(self, optimizer: Optimizer, closure: Callable[..., Any]) -> Callable[..., Any]:
        """Return a closure behind which gradients are looked at, but for those of a step on its way.

        Whoever has moved weights before it asks for gradients may have to move them back, and not do so without any
        (sharpness-aware minimisation). torch's own takes them for zeros, and ends there.
        """
        begun = _versions(optimizer)

        @wraps(closure)
        def looked_at(*args: Any, **kwargs: Any) -> Any:
            loss = closure(*args, **kwargs)
            if isinstance(optimizer, LBFGS) or _versions(optimizer) == begun:
                self._look_harmlessly(optimizer)
            return loss

        return looked_at

    def _behind(self, optimizer: Optimizer, *_: object) -> None:
        """Take note of a step that is over."""
        known = self._of(optimizer)
        if known.inner:
            known.inner -= 1
            return
        known.give_back()
        known.begin()
        if known.is_ours:
            self._usual, self._before_step = max(self._usual, self._since_step), self.steps.rhythm.backwards
            known.after = self._after = self.steps.rhythm.steps

    def _of(self, optimizer: Optimizer) -> _Known:
        """Return what is known of an optimizer; looked at again where it has got groups of parameters."""
        known = self._known.get(optimizer)
        if known is None:
            known = self._known[optimizer] = _Known(after=self._after)
        if known.groups != len(optimizer.param_groups):
            of_model = {id(parameter) for parameter in self.model.parameters()}
            known.is_ours = any(id(parameter) in of_model for parameter in _parameters(optimizer))
            known.groups = len(optimizer.param_groups)
        return known

    def _look_harmlessly(self, optimizer: Optimizer) -> None:
        if _is_capturing():
            return
        with self.steps.harmless(self._step), torch.no_grad():
            if self.watch.device.type == "cuda":  # the backward pass itself is not what a look takes
                torch.cuda.current_stream(self.watch.device).synchronize()
            with self.steps.aside():
                self._look(optimizer)

    @property
    def _step(self) -> int:
        """The step of the run that the gradients are of."""
        return max(self.steps.rhythm.steps - 1, 0)

    def _look(self, optimizer: Optimizer) -> None:
        scaled = getattr(optimizer, "found_inf", None)
        if scaled is not None:
            self._heed(leaves_out=bool(scaled))
            return
        known = self._of(optimizer)
        found = [each for each in _parameters(optimizer) if each.grad is not None]
        if not found:
            return
        if are_finite([each.grad for each in found if each.grad is not None]):
            known.passes = False
            return
        wrong = [each for each in found if not is_finite(each.grad)]
        if not wrong or known.passes:
            return
        sampler = self.steps.sampler
        if sampler is not None and sampler.step <= known.after:  # all that the gradients are of ran in high precision
            known.passes = True
            self._say("nonfinite_gradients", f"{self._words(wrong)} in high precision, too: that is no kernel's doing")
            return
        known.held = [(each, each.grad) for each in found if each.grad is not None]
        for parameter in found:
            parameter.grad = None
        if optimizer._optimizer_step_post_hooks:  # they are to find gradients, and may clear them
            first = optimizer.register_step_post_hook(lambda *_: known.give_back())
            optimizer._optimizer_step_post_hooks.move_to_end(first.id, last=False)  # type: ignore[attr-defined]  # an OrderedDict, which torch annotates as a dict
            known.hooks.append(first)
        self.watch.urgent = True
        if self._last == self._step:  # of many optimizers, one for each parameter perhaps, the first has told
            return
        self._last, self.count = self._step, self.count + 1
        spoiled = self._spoiled_buffers()
        reached = f"; they have reached {spoiled}, which need a new start" if spoiled else ""
        self._say("step_held", f"{self._words(wrong)}: the optimizer's step is left out{reached}")

    def _heed(self, *, leaves_out: bool) -> None:
        """Take note of a fused optimizer under loss scaling, which leaves a step out by itself."""
        if leaves_out and self._last != self._step:
            self._last, self.watch.urgent = self._step, True
            self._say("no_step", "a fused optimizer leaves its step out under loss scaling: the next step is monitored")

    def _words(self, wrong: list[nn.Parameter]) -> str:
        """Say whose gradients are not finite."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        known = [names[id(parameter)] for parameter in wrong if id(parameter) in names]
        return f"the gradients of {_listed(known or ['other parameters'])} are not finite"

    def _spoiled_buffers(self) -> str:
        """Return the buffers that a forward pass has left with NaN, in words; infinity may be a mask's."""
        return _listed([name for name, buffer in self.model.named_buffers() if has_nan(buffer)])

    def _say(self, kind: str, words: str) -> None:
        self.tell(Event(step=self._step, kind=kind, message=words))


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _versions(optimizer: Optimizer) -> int:
    """Return a number that is another one once weights have been written to."""
    return sum(each._version for each in _parameters(optimizer) if not each.is_inference())


def _is_capturing() -> bool:
    """Whether a CUDA graph is being recorded, in which nothing can be asked for its value."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
