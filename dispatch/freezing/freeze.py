"""Freezing for inference: the weights of planned products are stored in FP8 once, and their numbers dropped.

A frozen module is the module that it was, hooks, biases and name, with buffers in place of a Parameter: codes, and
scales. It runs the forward kernel of its plan on them, with the numbers that the converted model has. Their memory is
about half of bf16's, and there is nothing left to train. `dispatch.freezing.stored_weight` says what the module's code
finds in place of its weight: linear layers, Parameters that any code multiplies by, and the experts of a layer are
stored alike. Where the plan knows that one layer alone reads the result of another, it is handed on in FP8 if the
kernels can (`dispatch.freezing.handed`), and the numbers stay the same.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Final, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from loka.calls import is_scripted
from loka.dispatch.deciding.by_rows import kernels_of
from loka.dispatch.deciding.epilogue_decisions import FUSED_OP
from loka.dispatch.deciding.plan import Plan
from loka.dispatch.freezing.chained import chain
from loka.dispatch.freezing.frozen_modules import made_of, names_taken, store
from loka.dispatch.freezing.handing import reads_codes_of
from loka.dispatch.freezing.links import link
from loka.dispatch.freezing.storage import Storage, Tensors
from loka.dispatch.freezing.stored import is_traceable, weight_spec
from loka.dispatch.freezing.stored_grouped import stored_kernel
from loka.dispatch.freezing.stored_norm_act import reads_stored_codes
from loka.dispatch.running.convert import (
    check_eager,
    check_module,
    check_not_frozen,
    plan_of,
    revert,
    routes_of,
    without_epilogue,
)
from loka.dispatch.running.linear import HIGH_PRECISION
from loka.dispatch.running.routing import SiteKernels, device_of, site_kernels
from loka.dispatch.running.weights import halves_of
from loka.errors import PlanError
from loka.formats import OperandSpec
from loka.kernel_registry.norm_act import has_norm_act, runs_fused
from loka.kernel_registry.operands import DTYPES
from loka.kernel_registry.registry import default_registry
from loka.kernel_registry.spec import GemmRequest
from loka.naming import class_name, clean_fqn, unwrap
from loka.probes.capturing.storage import inner_tensors

# Modules that look up rows of their weight, and those that hold on to it and hand it to one operator of torch.
_LOOK_UP: Final = (nn.Embedding, nn.EmbeddingBag)
_HOLD: Final = (nn.RNNBase, nn.RNNCellBase)
# What torch names the Parameter that a weight is computed from, in hooks of nn.utils.spectral_norm and nn.utils.prune.
_COMPUTED_FROM: Final = "_orig"
_WITH_ONE_KERNEL: Final = "Plan it with by_rows=False, or `loka plan --no-by-rows`, to store it"


@dataclass(frozen=True, kw_only=True, slots=True)
class Frozen:
    """What `freeze` did to a model.

    `kernels` maps every frozen site to its forward kernel, `left` every other site of the plan to the reason why it
    stays in high precision. Bytes are those of all parameters and buffers, shared ones counted once. `chains` maps
    sites to the next one, where that takes the result of the first in FP8, quantised in the first one's kernel.
    """

    model: nn.Module
    kernels: Mapping[str, str]
    left: Mapping[str, str]
    bytes_before: int
    bytes_after: int
    chains: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return a summary, with a line for every site that was left."""
        counts = f"{len(self.kernels)} of {len(self.kernels) + len(self.left)} sites frozen"
        lines = [f"{counts}, {self.bytes_before:,} bytes before, {self.bytes_after:,} after"]
        lines += [f"{first} writes the FP8 codes that {then} reads" for first, then in self.chains.items()]
        return "\n".join([*lines, *(f"{site} is left in high precision: {why}" for site, why in self.left.items())])


def freeze(model: nn.Module, plan: Plan | str | PathLike[str], *, emulate: bool = False) -> Frozen:
    """Store the weights of a model's planned products in FP8, in place, for inference alone.

    `plan`: a plan, or the path of one. A weight is stored where the plan runs its forward products in FP8: that of a
    linear layer, also of one with its norm and activation, a Parameter that code multiplies by, one of all experts of a
    layer. Experts that the plan keeps in high precision stay in it. The record that is returned says what was left and
    why. A converted model is reverted first; nothing undoes a freeze: load the model again. No parameter of the model
    wants a gradient afterwards, and an input of a frozen product that does is an error, as is code that asks a stored
    weight for anything but products and views.

    How a Parameter is quantised depends on which way its products read it. Its shape tells, unless it is square; for a
    square one, convert the model and run it once before you freeze it.

    A state dict of the frozen model has codes and scales, which any model frozen with this plan takes; one in high
    precision is quantised as it is loaded. Products with stored weights are those of the converted model, bit for bit,
    where it runs in the dtype of its weights (a cast, as autocast's, would round a weight before it is quantised). Code
    that reads a weight past its layer gets the stored one, too, and with it FP8 that a conversion does not reach there.

    A program that is exported from the model holds operators of this library where a kernel cannot be traced, as those
    of experts cannot on a CPU: `from loka import freeze` makes them known to a process that loads it.

    `emulate=True` is as in `convert`. Raises PlanError, with the model untouched, when the plan belongs to another
    model, a kernel cannot run here, or the model is compiled or frozen already.
    """
    _check_ready(model)
    plan = plan_of(plan)
    plan.check_model(model)
    forward = replace(plan, decisions=tuple(each for each in plan.decisions if each.request.product == "fprop"))
    planned = site_kernels(forward, device_of(model), emulate=emulate)
    root = unwrap(model)
    modules = {clean_fqn(name): module for name, module in root.named_modules()}
    _check_epilogues(modules, planned)
    seen = {route.site: route.turned for route in routes_of(model)}
    before = _bytes_of(model)
    places: dict[str, _Place] = {}
    left: dict[str, str] = {}
    for decision in forward.decisions:
        request = decision.request
        found = _place(modules, request, planned.get(request.site), seen.get(request.site))
        if isinstance(found, str):
            left[request.site] = found
        else:
            places[request.site] = found
    left |= _drop_shared(root, places)
    revert(model)
    _store(places)
    _want_no_gradients(model)
    kernels = {site: place.storage.kernel for site, place in places.items()}
    after, chains = _bytes_of(model), link(modules, plan.chains, chain(root))
    return Frozen(model=model, kernels=kernels, left=left, bytes_before=before, bytes_after=after, chains=chains)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the weight of a site is, its module and its name there, and how it is to be stored."""

    module: nn.Module
    name: str
    storage: Storage

    @property
    def weight(self) -> nn.Parameter:
        """The Parameter."""
        return cast(nn.Parameter, self.module._parameters[self.name])

    @property
    def way(self) -> tuple[object, ...]:
        """What is the same for two sites that can share what is stored."""
        return self.storage.spec, self.storage.turned, self.storage.kept


# --- what can be stored ---


def _check_ready(model: nn.Module) -> None:
    """Raise PlanError for a model that is frozen, compiled or watched already, or TorchScript; ArgumentError."""
    check_module(model, "loka.freeze")
    check_not_frozen(model)
    check_eager(model, "look for weights that are gone. Freeze first and compile afterwards.")
    if is_scripted(root := unwrap(model)):
        raise PlanError(f"{type(root).__name__} runs TorchScript, whose code is fixed. Freeze the plain model.")


def _check_epilogues(modules: Mapping[str, nn.Module], planned: Mapping[str, SiteKernels]) -> None:
    """Raise PlanError where a layer is planned with a norm and an activation that it does not have."""
    for site, kernels in planned.items():
        module = modules.get(site if site in modules else site.rpartition(".")[0])
        if kernels.op == FUSED_OP and (module is None or not runs_fused(module)):
            raise without_epilogue(site, module)


def _place(
    modules: Mapping[str, nn.Module], request: GemmRequest, kernels: SiteKernels | None, seen: bool | None
) -> _Place | str:
    """Return where the weight of a site is, and how it can be stored; or why it is left in high precision.

    `seen`: whether a run of the converted model has shown it to be [.., k, n], or not to be; None where none has.
    """
    site = request.site
    if kernels is None or kernels.fprop == HIGH_PRECISION:
        return "the plan keeps its forward product in high precision"
    owner, _, name = (f"{site}.weight" if site in modules else site).rpartition(".")
    module = modules.get(owner)
    reason = _why_no_weight(module, name) or _why_not_stored(kernels)
    if reason is not None:
        return reason
    assert module is not None
    spec = _spec(kernels.fprop)
    turned = _is_turned(module, name, request, spec, seen)
    if isinstance(turned, str):
        return turned
    weight = cast(nn.Parameter, module._parameters[name])
    if weight.dim() != 3 and (kernels.op == "grouped_linear" or kernels.kept[0]):
        return f"the plan has it as the weights of experts, and it is {list(weight.shape)}"
    storage = Storage(
        site=site,
        kernel=kernels.fprop,
        op=kernels.op,
        spec=spec,
        traceable=is_traceable(kernels.fprop),
        turned=turned,
        as_it_lay=any(default_registry().get(kernel).library == "emulated" for kernel in kernels_of(kernels.fprop)),
        dtype=weight.dtype,
        shape=tuple(weight.shape),
        kept=kernels.kept[0],
        reads=reads_codes_of(kernels),
    )
    return _Place(module, name, storage)


def _why_no_weight(module: nn.Module | None, name: str) -> str | None:
    """Return why a Parameter of a module cannot be stored, whatever the plan says of it, or None."""
    if module is not None and is_scripted(module):
        return "it runs in TorchScript, whose code is fixed"
    weight = None if module is None else module._parameters.get(name)
    if module is None or weight is None:
        is_computed = module is not None and is_parametrized(module, name)
        return "its weight is computed" if is_computed else "its weight is no Parameter"
    if isinstance(module, ParametrizationList) or name.endswith(_COMPUTED_FROM):
        return "a weight is computed from it, which takes its numbers"
    if isinstance(module, _LOOK_UP):
        return f"{class_name(module)} looks up rows of its weight, which takes their numbers"
    if isinstance(module, _HOLD):
        return f"{class_name(module)} reads its weight itself"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight.data).__name__}: gather what is sharded first"
    if weight.dtype not in DTYPES or not weight.numel() or weight.dim() < 2:
        return f"its weight is {weight.dtype} {list(weight.shape)}"
    taken = names_taken(module, name)
    return f"{class_name(module)} has a {taken[0]!r} of its own" if taken else None


def _why_not_stored(kernels: SiteKernels) -> str | None:
    """Return why a kernel, or those of few rows and of many, cannot multiply by one stored weight, or None."""
    names = kernels_of(kernels.fprop)
    if HIGH_PRECISION in names:
        which = "few" if names[0] == HIGH_PRECISION else "many"
        return f"the plan keeps its calls with {which} rows in high precision. {_WITH_ONE_KERNEL}"
    for name in names:
        if not _multiplies_stored(name, kernels):
            return f"{name} cannot multiply by stored codes"
    if len({weight_spec(_recipe(name)) for name in names}) > 1:
        few, many = names
        return (
            f"{few}, for few rows, and {many}, for more, read its weight in two forms, and one is stored. "
            f"{_WITH_ONE_KERNEL}"
        )
    return None


def _multiplies_stored(name: str, kernels: SiteKernels) -> bool:
    if kernels.op == "grouped_linear":
        return stored_kernel(name) is not None
    return halves_of(name) is not None or (kernels.op == FUSED_OP and reads_stored_codes(name))


def _is_turned(module: nn.Module, name: str, request: GemmRequest, spec: OperandSpec, seen: bool | None) -> bool | str:
    """Return whether the model has a weight as [.., k, n]; or what keeps it from being stored, in words.

    A linear layer is known, what has run was seen; else the shape tells, or the experts of transformers do. Where
    groups of elements that share a scale are square, one way is as good as the other.
    """
    if name == "weight" and (isinstance(module, nn.Linear) or has_norm_act(module)):
        return False
    shape = tuple(cast(nn.Parameter, module._parameters[name]).shape)
    ways = [turned for turned in (False, True) if _fits(shape[:-3:-1] if turned else shape[-2:], request, spec)]
    if not ways or seen not in (None, *ways):
        return (
            f"it is {list(shape)}, and its products, of {request.n} x {request.k}, are with parts of it that are not "
            "quantised by themselves when it is stored as a whole"
        )
    if seen is not None or len(ways) == 1:
        return ways[0] if seen is None else seen
    says = getattr(module, "is_transposed", None)
    if isinstance(says, bool) and len(shape) == 3:
        return says
    if spec.group_rows == spec.group_k:
        return False
    return (
        f"it is square, {list(shape)}, and which way its products read it shows when they run: convert the model, run "
        "it once, and freeze it then"
    )


def _fits(sizes: tuple[int, ...], request: GemmRequest, spec: OperandSpec) -> bool:
    """Whether products with n x k are with a matrix of these sizes, or with rows of it that share no scale."""
    rows, depth = sizes
    n, k, group = request.n, request.k, spec.group_rows
    return depth == k and (rows == n or (rows > n and group is not None and n % group == 0))


def _drop_shared(root: nn.Module, places: dict[str, _Place]) -> dict[str, str]:
    """Take out the sites whose weight has another use than in sites that store it alike; return why, by site."""
    owners: dict[int, list[tuple[str, nn.Module, str]]] = defaultdict(list)
    for fqn, module in root.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners[id(parameter)].append((clean_fqn(fqn), module, name))
    ways = {(id(place.module), place.name): place.way for place in places.values()}
    left = {}
    for site, place in places.items():
        for fqn, module, name in owners[id(place.weight)]:
            way = ways.get((id(module), name))
            if way != place.way:
                how = "needs it in high precision" if way is None else "stores it otherwise"
                left[site] = f"it shares its weight with {fqn or 'the model itself'}, which {how}"
    for site in left:
        del places[site]
    return left


def _recipe(kernel: str) -> str:
    """Return the recipe by which a weight is stored: of kernels for few rows and many, both store it alike."""
    recipe = default_registry().get(kernels_of(kernel)[0]).recipe
    assert recipe is not None
    return recipe


def _want_no_gradients(model: nn.Module) -> None:
    """Turn gradients off; for a Parameter that is a view, as torchrec's slices of a table, in what it is a view of."""
    for parameter in model.parameters():
        leaf = parameter if parameter.is_leaf else parameter._base
        if leaf is not None:
            leaf.requires_grad_(False)


def _spec(kernel: str) -> OperandSpec:
    return weight_spec(_recipe(kernel))


def _bytes_of(model: nn.Module) -> int:
    held = [inner for each in (*model.parameters(), *model.buffers()) for inner in inner_tensors(each)]
    return sum({part.data_ptr(): part.nbytes for each in held for part in _dense_parts(each)}.values())


def _dense_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return what a tensor keeps its numbers in: itself, or the indices and values of a sparse one."""
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return (tensor,)


def _store(places: Mapping[str, _Place]) -> None:
    """Quantise every weight once, and give up its Parameter before the next one is quantised."""
    uses: dict[int, list[_Place]] = defaultdict(list)
    for place in places.values():
        uses[id(place.weight)].append(place)
    modules: dict[int, tuple[nn.Module, dict[str, tuple[Storage, Tensors]]]] = {}
    for same in uses.values():
        tensors = made_of(same[0].weight.detach(), same[0].storage)
        for place in same:
            del place.module._parameters[place.name]
            modules.setdefault(id(place.module), (place.module, {}))[1][place.name] = (place.storage, tensors)
    for module, stored in modules.values():
        store(module, stored)
