"""Freezing for inference: the weights of planned linear layers are stored in FP8 once, and their numbers dropped.

A frozen layer is the module that it was, hooks, bias and name, with two buffers in place of its Parameter: `weight`,
the codes, and `weight_scale`. It runs the forward kernel of its plan on them, with the numbers that the converted
layer has. Its memory is about half of bf16's, and there is nothing left to train.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from loka.dispatch.convert import FROZEN, FUSING, check_eager, check_not_frozen, revert
from loka.dispatch.linear import cast_for_autocast
from loka.dispatch.plan import Plan
from loka.dispatch.routing import device_of, site_kernels
from loka.dispatch.stored import is_traceable, stored_product, weight_spec
from loka.dispatch.weights import halves_of
from loka.errors import KernelError
from loka.kernel_registry.operands import DTYPES, quantize_operand
from loka.kernel_registry.registry import default_registry
from loka.naming import clean_fqn, unwrap

_SCALE: Final = "weight_scale"


@dataclass(frozen=True, kw_only=True, slots=True)
class Frozen:
    """What `freeze` did to a model.

    `kernels` maps every frozen site to its forward kernel, `left` every other site of the plan to the reason why it
    stays in high precision. Bytes are those of all parameters and buffers, shared ones counted once.
    """

    model: nn.Module
    kernels: Mapping[str, str]
    left: Mapping[str, str]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        """Return a summary, with a line for every site that was left."""
        counts = f"{len(self.kernels)} of {len(self.kernels) + len(self.left)} sites frozen"
        lines = [f"{counts}, {self.bytes_before:,} bytes before, {self.bytes_after:,} after"]
        return "\n".join([*lines, *(f"{site} is left in high precision: {why}" for site, why in self.left.items())])


def freeze(model: nn.Module, plan: Plan, *, emulate: bool = False) -> Frozen:
    """Store the weights of a model's planned linear layers in FP8, in place, for inference alone.

    A layer is frozen where it is an `nn.Linear` that the plan runs in FP8 in its forward pass, and its weight belongs
    to such layers only; the record that is returned says what was left and why. A converted model is reverted first.
    No parameter of the model wants a gradient afterwards; a frozen layer refuses an input that does. A state dict of
    the frozen model has codes and scales, which any model frozen with this plan takes; one in high precision is
    quantised as it is loaded. Results are those of the converted model, bit for bit, where the model runs in the dtype
    of its weights (autocast would round a weight before it is quantised).

    `emulate=True` is as in `convert`. Raises PlanError, with the model untouched, when the plan belongs to another
    model, a kernel cannot run here, or the model is compiled or frozen already.
    """
    check_not_frozen(model)
    check_eager(model, "look for weights that are gone. Freeze first and compile afterwards.")
    plan.check_model(model)
    forward = replace(plan, decisions=tuple(each for each in plan.decisions if each.request.product == "fprop"))
    planned = site_kernels(forward, device_of(model), emulate=emulate)
    before = _bytes_of(model)
    revert(model)
    root = unwrap(model)
    modules = {clean_fqn(name): module for name, module in root.named_modules()}
    left, layers = {}, {}
    for decision in forward.decisions:
        site = decision.request.site
        module = modules.get(site) or modules.get("" if site == "weight" else site.removesuffix(".weight"))
        reason = _why_left(modules, site, module, planned[site].fprop if site in planned else "")
        if reason is None:
            assert isinstance(module, nn.Linear)
            layers[site] = module
        else:
            left[site] = reason
    left |= _drop_shared(root, layers, {site: planned[site].fprop for site in layers})
    _store(layers, {site: planned[site].fprop for site in layers})
    model.requires_grad_(False)
    return Frozen(
        model=model,
        kernels={site: planned[site].fprop for site in layers},
        left=left,
        bytes_before=before,
        bytes_after=_bytes_of(model),
    )


# --- what can be frozen ---


def _why_left(modules: Mapping[str, nn.Module], site: str, module: nn.Module | None, kernel: str) -> str | None:
    """Return why a site is left in high precision, or None."""
    if not kernel:
        return "the plan keeps its forward product in high precision"
    if module is None:
        return "it is a bare Parameter, which its module's own code multiplies by"
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward or "forward" in vars(module):
        return f"{type(module).__name__} has a forward of its own"
    fusing = next((modules[above] for above in _above(site) if isinstance(modules.get(above), FUSING)), None)
    if fusing is not None:
        return f"{type(fusing).__name__} reads its weight itself"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed" if is_parametrized(module, "weight") else "its weight is no Parameter"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight.data).__name__}: gather what is sharded first"
    if weight.dtype not in DTYPES or not weight.numel():
        return f"its weight is {weight.dtype} {list(weight.shape)}"
    if halves_of(kernel) is None:
        return f"{kernel} cannot multiply by stored codes"
    return None


def _above(site: str) -> Iterable[str]:
    while site:
        site = site.rpartition(".")[0]
        yield site


def _drop_shared(root: nn.Module, layers: dict[str, nn.Linear], kernels: Mapping[str, str]) -> dict[str, str]:
    """Take out the layers whose weight has another use than in layers that store it alike; return why, by site."""
    owners: dict[int, list[tuple[str, nn.Module]]] = defaultdict(list)
    for name, module in root.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)].append((clean_fqn(name), module))
    stored = {id(module): weight_spec(_recipe(kernels[site])) for site, module in layers.items()}
    left = {}
    for site, module in list(layers.items()):
        for name, other in owners[id(module.weight)]:
            if stored.get(id(other)) != stored[id(module)]:
                how = "stores it otherwise" if id(other) in stored else "needs it in high precision"
                left[site] = f"it shares its weight with {name or 'the model itself'}, which {how}"
    for site in left:
        del layers[site]
    return left


def _recipe(kernel: str) -> str:
    recipe = default_registry().get(kernel).recipe
    assert recipe is not None
    return recipe


def _bytes_of(model: nn.Module) -> int:
    tensors = {each.data_ptr(): each.nbytes for each in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


# --- what becomes of a layer ---


def _store(layers: Mapping[str, nn.Linear], kernels: Mapping[str, str]) -> None:
    """Quantise every weight once, and give up its Parameter."""
    weights: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for site, module in layers.items():
        recipe, weight = _recipe(kernels[site]), module.weight
        if id(weight) not in weights:
            with torch.no_grad():
                codes, scale, _ = quantize_operand(weight.detach(), weight_spec(recipe))
            weights[id(weight)] = weight, codes, scale  # with the Parameter: its id is taken while it is here
        _, codes, scale = weights[id(weight)]
        module.__class__ = _frozen_class(cast(Any, type(module)))
        del module._parameters["weight"]
        module.register_buffer("weight", codes)
        module.register_buffer(_SCALE, scale)
        setattr(module, FROZEN, (kernels[site], recipe, is_traceable(kernels[site])))


def _forward(self: Any, input: Tensor) -> Tensor:
    """Run the stored weight's product."""
    if torch.is_grad_enabled() and input.requires_grad:
        raise KernelError(
            f"A frozen layer ({self.in_features} to {self.out_features} features) got an input that wants a gradient, "
            "and there is no backward pass through a stored weight. Run it under torch.no_grad(); to train, load the "
            "model again, use loka.convert, and freeze what comes out."
        )
    kernel, _, traceable = getattr(self, FROZEN)
    x, bias = cast_for_autocast(input), self.bias
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    out = stored_product(kernel, rows, self.weight, self.weight_scale, traceable=traceable)
    if bias is not None:
        out = out + cast_for_autocast(bias)
    return out if x.dim() == 2 else out.reshape(*x.shape[:-1], self.out_features)


def _apply(self: Any, base: Any, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """Move codes and scales with the module; a cast of the model is not one of theirs."""
    codes, scale = self.weight, self.weight_scale
    base._apply(self, function, recurse)
    if self.weight.dtype != codes.dtype:
        self.weight, self.weight_scale = (each.to(self.weight.device) for each in (codes, scale))
    return self


def _load(self: Any, base: Any, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """Load codes and scales; a weight in high precision is quantised."""
    given, codes = state.get(f"{prefix}weight"), self.weight
    if isinstance(given, Tensor) and given.dtype in DTYPES and given.shape == codes.shape:
        made = quantize_operand(given.to(codes.device), weight_spec(getattr(self, FROZEN)[1]))
        state = {**state, f"{prefix}weight": made.data, f"{prefix}{_SCALE}": made.scale}
    elif isinstance(given, Tensor) and given.dtype != codes.dtype:
        args[-1].append(f"{prefix}weight is {given.dtype}; this frozen layer takes {codes.dtype} or high precision.")
        return
    base._load_from_state_dict(self, state, prefix, *args)


@functools.cache
def _frozen_class(base: Any) -> Any:
    """Make the class that a linear layer of class `base` becomes."""

    def apply(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return _apply(self, base, fn, recurse)

    def load(self: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _load(self, base, state_dict, prefix, *args)

    def restore(self: Any, state: Any) -> None:
        base.__setstate__(self, state)
        halves_of(getattr(self, FROZEN)[0])  # now: Dynamo cannot trace how they are loaded

    def reduce(self: Any, protocol: Any) -> Any:
        make, arguments, *state = base.__reduce_ex__(self, protocol)
        if arguments[:1] == (made,):  # no name leads to the class: name what it is made from
            make, arguments = _restore, (base,)
        return make, arguments, *state

    members = {
        "forward": _forward,
        "_apply": apply,
        "_load_from_state_dict": load,
        "__reduce_ex__": reduce,
        "__setstate__": restore,
        "__module__": __name__,
    }
    made = type(f"Frozen{base.__name__}", (base,), members)
    return made


def _restore(base: Any) -> Any:
    """Make an empty frozen layer, for `copy` and for those who save whole models."""
    made = _frozen_class(base)
    return made.__new__(made)
