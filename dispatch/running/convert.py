"""Eager conversion: the same model object, with every planned product on its planned kernels.

Nothing is replaced. A linear layer's class is swapped for one whose forward calls `dispatch.running.linear`, that of
one with its norm and activation (`loka.mods.FuseEpilogue`) for one that calls `dispatch.running.norm_act`; a module
that multiplies by a bare Parameter gets a class whose forward runs inside a scope that reroutes exactly those products.
Parameters, buffers, hooks and `state_dict` stay as they are, and a checkpoint knows nothing of LoKA.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from os import PathLike
from typing import Any, Final, Literal, cast, get_args

import torch.distributed as dist
import torch.fx
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from loka.calls import forward_of, is_compiled, is_scripted, is_watched
from loka.dispatch.deciding.by_rows import kernels_of
from loka.dispatch.deciding.job import all_or_none, check_plans
from loka.dispatch.deciding.plan import Plan
from loka.dispatch.running.linear import HIGH_PRECISION, linear, load
from loka.dispatch.running.norm_act import linear_norm_act
from loka.dispatch.running.reroute import Reroute, Route, unseen
from loka.dispatch.running.routing import SiteKernels, device_of, site_kernels
from loka.dispatch.running.weights import forget, grouped_halves_of, halves_of, keep
from loka.dtensors import Part
from loka.errors import ArgumentError, KernelError, PlanError
from loka.kernel_registry.norm_act import is_norm_act, runs_fused
from loka.made_classes import make_class
from loka.naming import BASE_CLASS, clean_fqn, unwrap
from loka.probes.capturing.sites import fingerprint, flat_parameter

# Modules whose own forward does not run the product of the weight they hold: it happens in a module above.
_HOLDERS: Final = (
    nn.ParameterList,
    nn.ParameterDict,
    nn.ModuleList,
    nn.ModuleDict,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.modules.linear.NonDynamicallyQuantizableLinear,
)
# A table whose rows are looked up may serve as a weight anywhere, most often in the root.
_TABLES: Final = (nn.Embedding, nn.EmbeddingBag)
# Modules that may compute everything below them in one fused call, in which no product can be rerouted. They refrain
# from it while a torch-function mode is active, so the scope has to be around the outermost of them.
FUSING: Final = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
# `torch.fx` leaves layers of torch.nn whole (`make_class`); of other classes it writes the products as single calls.
torch.fx.wrap("linear")
torch.fx.wrap("linear_norm_act")

_MARK: Final = "_loka_routes"  # name of a parameter in the module -> Route
FROZEN: Final = "_loka_frozen"  # of a layer that `freeze` has stored: its kernel, recipe and whether it is traceable


def convert(
    model: nn.Module,
    plan: Plan | str | PathLike[str],
    *,
    emulate: bool = False,
    process_group: dist.ProcessGroup | None = None,
    cache_weights: bool | None = None,
) -> nn.Module:
    """Run a model's products as planned: in place, eager; returns the model. `revert` is the way back.

    `plan`: a plan, or the path of one.
    `emulate=True` lets emulated kernels stand in for those that cannot run on this device. With a `process_group`, all
    its ranks, each of which has to call this, first make sure that they hold the same plan. Raises PlanError, with the
    model untouched, when the plan belongs to another model, a kernel cannot run here, or the model is compiled,
    converted already or watched by a probe. A weight that is used where its own module's forward does not run is
    reached where the plan's run has seen it used; else it is not, and after a step `unreached` names such sites. The
    same holds for a checkpoint that begins inside of the forward that uses a bare Parameter: what it recomputes stays
    in high precision.

    A weight is quantised once per optimiser step and pass, and not in every micro-batch, where gradient accumulation
    repeats; no number changes. By default that begins after a first whole window, needs the weights to be held by an
    optimiser of `torch.optim`, and ends with any doubt that a weight is what it was (`dispatch.running.windows`); a
    training without accumulation keeps nothing. `cache_weights=True` keeps weights always and trusts that none is
    edited through `.data` between two steps; `False` keeps none. What is kept is a copy of the weight per pass, in FP8
    (in fp32 where kernels are emulated). `dispatch.running.weights` says what is left alone.
    """
    check_module(model, "loka.convert")
    load = partial(plan_of, plan)
    loaded = load() if process_group is None else all_or_none(load, process_group)
    prepare = partial(_prepare, model, loaded, emulate=emulate)
    if process_group is not None:
        check_plans(loaded, process_group)
        assigned = all_or_none(prepare, process_group)
    else:
        assigned = prepare()
    for _, routes in assigned if cache_weights else ():
        for name in {name for route in routes.values() for name in route.kernels.as_tuple()}:
            for kernel in kernels_of(name):
                halves_of(kernel), grouped_halves_of(kernel)  # now, where it can be refused
    for module, parameters in assigned:
        module.__class__ = _converted_class(_kind_of(module, parameters), cast(Any, type(module)))
        setattr(module, _MARK, parameters)
        for parameter in _parameters_of(module) if cache_weights is not False else ():
            keep(parameter, None if cache_weights else module)
    return model


def check_module(model: object, taker: str) -> None:
    """Raise ArgumentError for anything but a module, e.g. the class of one; `taker` is what was called with it."""
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise ArgumentError(f"{taker} takes the torch.nn.Module that the loop calls, not {given}.")


def plan_of(given: Plan | str | PathLike[str]) -> Plan:
    """Return a plan that is given as itself or by its path; raise ArgumentError for anything else, PlanError."""
    if isinstance(given, Plan):
        return given
    if not isinstance(given, str | PathLike):
        raise ArgumentError(
            f"A plan is a loka.Plan or the path of one, not {type(given).__name__}: loka.plan(...) makes it, "
            "loka.Plan.load(path) reads it."
        )
    return Plan.load(given)


def revert(model: nn.Module) -> nn.Module:
    """Undo `convert`, in place: every module of the model gets back its class; returns the model.

    Parameters, buffers, hooks and optimiser state stay as they are, and the model may be converted again. A model or
    submodule of which nothing is converted is left as it is. Works on copies, and on what was wrapped or parametrised
    before or after the conversion; parametrisations from before can be removed only once it is undone. Raises
    PlanError, with nothing changed, for a compiled model.
    """
    check_module(model, "loka.revert")
    converted = [module for module in model.modules() if _MARK in vars(module)]
    if converted:
        check_eager(model, "go on as planned. Revert the model first and compile it again afterwards.")
    for module in converted:
        for parameter in _parameters_of(module):
            forget(parameter)
        module.__class__ = _reverted_class(type(module))
        delattr(module, _MARK)
    return model


def _parameters_of(module: nn.Module) -> list[Tensor]:
    """Return the Parameters that a converted module has routes of, without computing any."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return [parameters[name] for name in getattr(module, _MARK) if name in parameters]


def _prepare(model: nn.Module, plan: Plan, *, emulate: bool) -> "list[Assignment]":
    """Check all that can be wrong, and decide what becomes of which module, while nothing is changed."""
    _check_convertible(model)
    check_fits(plan, model)
    assigned = _assign(unwrap(model), site_kernels(plan, device_of(model), emulate=emulate), plan.outsides)
    for module, parameters in assigned:
        for route in parameters.values():
            if route.kernels.op == "linear_norm_act" and _kind_of(module, parameters) != "Joint":
                raise without_epilogue(route.site, module)
    return assigned


def check_fits(plan: Plan, model: nn.Module) -> None:
    """Raise PlanError when a plan is not for a model; parameters that FSDP1 has made flat count as they were before."""
    flat = any(flat_parameter(module) is not None for module in model.modules())
    if not flat or fingerprint(unwrap(model)) != {name: tuple(shape) for name, shape in plan.fingerprint.items()}:
        plan.check_model(model)


def without_epilogue(site: str, module: nn.Module | None) -> PlanError:
    """Return the error for a plan that runs a module with norm and activation, which it is not."""
    return PlanError(
        f"The plan runs {site!r} with its norm and activation in one kernel, and in this model it is "
        f"{type(module).__name__}, without both. Apply the mods of the model that was probed, FuseEpilogue "
        "among them, or probe and plan this one."
    )


def planned_sites(model: nn.Module) -> dict[str, SiteKernels]:
    """Return the kernels of every site of a converted model; empty for one that is not converted."""
    return {route.site: route.kernels for route in routes_of(model)}


def unreached(model: nn.Module) -> tuple[str, ...]:
    """Return the converted sites that no product has reached since the conversion, in the order of the model.

    After a training step this should be empty. A site that stays here has its weight used elsewhere than in its own
    module's forward, or in a form that cannot be rerouted, and runs in high precision; `backend="loka"` of
    `torch.compile` may reach it, since it finds a product by its weight wherever it runs.
    """
    return tuple(route.site for route in routes_of(model) if not route.reached)


def routes_of(model: nn.Module) -> Iterator[Route]:
    """Yield the routes of a converted model's sites; what they say holds from the next step on."""
    for module in model.modules():
        yield from getattr(module, _MARK, {}).values()


def check_not_frozen(model: nn.Module) -> None:
    """Raise PlanError when a layer of the model is stored in FP8."""
    for name, module in model.named_modules():
        if hasattr(module, FROZEN):
            raise PlanError(
                f"{type(unwrap(model)).__name__} is frozen (see {name or 'its root'!r}): its weights are there in FP8 "
                "alone. Load the model again and start from that."
            )


def _check_convertible(model: nn.Module) -> None:
    check_not_frozen(model)
    for name, module in model.named_modules():
        if hasattr(module, _MARK):
            raise PlanError(
                f"{type(unwrap(model)).__name__} is converted already (see {name or 'its root'!r}). Two plans cannot "
                "hold at once: undo the first with loka.revert(model)."
            )
    check_eager(
        model,
        "not see the conversion. Convert first and compile afterwards, or use "
        'torch.compile(model, backend="loka", options={"plan": ...}).',
    )


def check_eager(model: nn.Module, what: str) -> None:
    """Raise PlanError when the model or a part of it is compiled or watched; `what` its compiled code would do."""
    for name, module in model.named_modules():
        if is_watched(module):
            raise PlanError(
                f"{name or 'The model'!r} is watched by a probe or a monitor, which know it as it was when their block "
                "began. Leave the block first."
            )
        if is_compiled(module) or hasattr(module, "_orig_mod"):
            raise PlanError(f"{name or 'The model'!r} is compiled, and its compiled code would {what}")


# --- which module's class reaches which site ---

Assignment = tuple[nn.Module, dict[str, Route]]


def _assign(model: nn.Module, routes: Mapping[str, SiteKernels], outsides: Mapping[str, str]) -> list[Assignment]:
    """Decide, before anything is changed, which modules reach the planned sites, and by which of their parameters.

    `outsides`: sites whose weight another module multiplies with, and that module.
    """
    modules = {clean_fqn(name): module for name, module in model.named_modules()}
    assigned: dict[str, Assignment] = {}
    for site, kernels in routes.items():
        module = modules.get(site)
        parameter = site if module is None else f"{site}.weight"
        owner, _, name = parameter.rpartition(".")
        holder = modules.get(owner)
        if holder is None or not _has_tensor(holder, name):
            raise PlanError(
                f"The plan has the site {site!r}, and this model has no module or parameter of that name that a "
                "product could be rerouted from. Probe and plan this model again; of a pipeline each stage by itself, "
                "with process_group= its ranks and a database of its own."
            )
        runner = _runner(modules, owner, outsides.get(site, owner))
        _, parameters = assigned.setdefault(runner, (modules[runner], {}))
        own = dict(holder._parameters.items()).get(name)  # TorchScript's is no dict
        route = Route(site, kernels, part=Part.of(own))
        parameters[parameter[len(runner) + 1 :] if runner else parameter] = route
    return list(assigned.values())


def _has_tensor(module: nn.Module, name: str) -> bool:
    """Whether a module has a tensor of this name; one that is parametrised is not computed, which might change it."""
    return is_parametrized(module, name) or isinstance(getattr(module, name, None), Tensor)


def _runner(modules: Mapping[str, nn.Module], owner: str, outside: str) -> str:
    """Return the name of the module whose forward a scope has to surround to see the products of `owner`'s weights.

    `outside`: where these are, as far as a run has seen; the root has no name.
    """
    runner = "" if isinstance(modules[owner], _TABLES) or outside not in modules else _around(owner, outside)
    while runner and (isinstance(modules[runner], _HOLDERS) or _is_out_of_reach(modules[runner])):
        runner = _parent(runner)
    if is_scripted(modules[runner]):
        raise PlanError(f"The products of {owner!r} run in TorchScript, whose code is fixed. Convert the plain model.")
    if _is_out_of_reach(modules[runner]):
        raise PlanError(
            f"The products of {owner!r} cannot be rerouted: `forward` is replaced on the instance of "
            f"{type(modules[runner]).__name__}, and on what is between. Convert the model first, wrap it afterwards, "
            "or leave this site out by the filter= of loka.plan."
        )
    above = runner
    while above:
        above = _parent(above)
        runner = above if isinstance(modules[above], FUSING) else runner
    return runner


def _around(first: str, second: str) -> str:
    """Return the innermost module that holds both, or is one of them and holds the other."""
    shared = itertools.takewhile(
        lambda pair: pair[0] == pair[1], zip(first.split("."), second.split("."), strict=False)
    )
    return ".".join(part for part, _ in shared)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _is_out_of_reach(module: nn.Module) -> bool:
    """Whether another class would change nothing: TorchScript runs, or what hides its forward on the instance."""
    return "forward" in vars(module) or is_scripted(module)


# --- the classes ---

# Planned: a linear layer that calls `dispatch.running.linear` itself. Joint: one with norm and activation, that calls
# `dispatch.running.norm_act`. Routed: any module, within a scope that reroutes.
Kind = Literal["Planned", "Joint", "Routed"]


def _kind_of(module: nn.Module, parameters: Mapping[str, Route]) -> Kind:
    if parameters.keys() != {"weight"}:
        return "Routed"
    if forward_of(module) is nn.Linear.forward:
        return "Planned"
    return "Joint" if runs_fused(module) else "Routed"


@functools.cache
def _converted_class(kind: Kind, base: Any) -> Any:
    """Make the class that a module of class `base` becomes."""

    # Code that has wrapped a converted forward still calls it once the conversion is undone: then it is that of `base`.
    def planned(self: Any, input: Tensor) -> Any:
        if not hasattr(self, _MARK):
            return base.forward(self, input)
        route: Route = self._loka_routes["weight"]
        route.note_reached()
        kernels = route.kernels
        return unseen(linear, input, self.weight, self.bias, kernels.fprop, kernels.dgrad, kernels.wgrad)

    @is_norm_act
    def joint(self: Any, input: Tensor) -> Any:
        if not hasattr(self, _MARK):
            return base.forward(self, input)
        route: Route = self._loka_routes["weight"]
        route.note_reached()
        return unseen(linear_norm_act, input, self.weight, self.bias, self.eps, route.kernels.as_tuple())

    @functools.wraps(base.forward)
    def routed(self: Any, *args: Any, **kwargs: Any) -> Any:
        return Reroute.of(self, getattr(self, _MARK, {})).run(base.forward, self, *args, **kwargs)

    def restore(self: Any, state: Any) -> None:
        base.__setstate__(self, state)
        _load_kernels(self._loka_routes.values())

    forwards = {"Planned": planned, "Joint": joint, "Routed": routed}
    members = {
        "forward": forwards[kind],
        "__setstate__": restore,
        "__module__": __name__,
        "__doc__": None,
        BASE_CLASS: base,
    }
    return make_class(f"{kind}{base.__name__}", base, members, _converted_class, kind, base)


def _load_kernels(routes: Iterable[Route]) -> None:
    """Import the kernels of a copy, or of what another process has saved: Dynamo cannot trace how that is done."""
    names = {name for route in routes for name in route.kernels.as_tuple()}
    for kernel in {kernel for name in names for kernel in kernels_of(name)} - {HIGH_PRECISION}:
        with contextlib.suppress(KernelError):  # it may be there to be reverted; running it says why not
            load(kernel)


def _reverted_class(made: Any) -> Any:
    """Return a class without the one of `_converted_class` in it, which others may have derived theirs from since.

    Parametrisations and FSDP make such classes, and parametrisations add properties to the class that they find.
    """
    if not any(BASE_CLASS in vars(each) for each in made.__mro__):
        return made
    own = {key: value for key, value in vars(made).items() if key not in ("__dict__", "__weakref__")}
    if BASE_CLASS not in own:
        name = functools.reduce(lambda name, kind: name.replace(kind, "", 1), get_args(Kind), made.__name__)
        return type(made)(name, tuple(map(_reverted_class, made.__bases__)), own)
    base = own[BASE_CLASS]
    added = {key: value for key, value in own.items() if isinstance(value, property)}
    # Beside the properties that were there before: they are removed one by one from the class that a module has.
    return type(made)(base.__name__, base.__bases__, {**vars(base), **added}) if added else base
