"""Eager conversion: the same model object, with every planned product on its planned kernels.

Nothing is replaced. A linear layer's class is swapped for one whose forward calls `dispatch.linear`; a module that
multiplies by a bare Parameter gets a class whose forward runs inside a scope that reroutes exactly those products.
Parameters, buffers, hooks and `state_dict` stay as they are, and a checkpoint knows nothing of LoKA.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal, cast

from torch import Tensor, nn

from loka.dispatch.linear import linear
from loka.dispatch.plan import Plan
from loka.dispatch.reroute import Reroute, Route
from loka.dispatch.routing import SiteKernels, device_of, site_kernels
from loka.errors import PlanError
from loka.naming import clean_fqn, unwrap

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
_FUSING: Final = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
_MARK: Final = "_loka_routes"  # name of a parameter in the module -> Route


def convert(model: nn.Module, plan: Plan, *, emulate: bool = False) -> nn.Module:
    """Run a model's products as planned: in place, eager; returns the model.

    `emulate=True` lets emulated kernels stand in for those that cannot run on this device. Raises PlanError, with the
    model untouched, when the plan belongs to another model, a kernel cannot run here, or the model is compiled or
    converted already. A weight that is used where its own module's forward does not run is not reached: after a step,
    `unreached` names such sites. The same holds for a checkpoint that begins inside of the forward that uses a bare
    Parameter: what it recomputes stays in high precision.
    """
    _check_convertible(model)
    plan.check_model(model)
    routes = site_kernels(plan, device_of(model), emulate=emulate)
    for module, parameters in _assign(unwrap(model), routes):
        alone = parameters.keys() == {"weight"} and type(module).forward is nn.Linear.forward
        module.__class__ = _converted_class("Planned" if alone else "Routed", cast(Any, type(module)))
        setattr(module, _MARK, parameters)
    return model


def planned_sites(model: nn.Module) -> dict[str, SiteKernels]:
    """Return the kernels of every site of a converted model; empty for one that is not converted."""
    return {route.site: route.kernels for route in _routes(model)}


def unreached(model: nn.Module) -> tuple[str, ...]:
    """Return the converted sites that no product has reached since the conversion, in the order of the model.

    After a training step this should be empty. A site that stays here has its weight used elsewhere than in its own
    module's forward, or in a form that cannot be rerouted, and runs in high precision; `backend="loka"` of
    `torch.compile` may reach it, since it finds a product by its weight wherever it runs.
    """
    return tuple(route.site for route in _routes(model) if not route.reached)


def _routes(model: nn.Module) -> Iterator[Route]:
    for module in model.modules():
        yield from getattr(module, _MARK, {}).values()


def _check_convertible(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if hasattr(module, _MARK):
            raise PlanError(
                f"{type(unwrap(model)).__name__} is converted already (see {name or 'its root'!r}). Build or copy the "
                "model again and convert that; two plans cannot hold at once."
            )
        compiled = getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
        if compiled:
            raise PlanError(
                f"{name or 'The model'!r} is compiled, and its compiled code would not see the conversion. Convert "
                'first and compile afterwards, or use torch.compile(model, backend="loka", options={"plan": ...}).'
            )


# --- which module's class reaches which site ---

Assignment = tuple[nn.Module, dict[str, Route]]


def _assign(model: nn.Module, routes: Mapping[str, SiteKernels]) -> list[Assignment]:
    """Decide, before anything is changed, which modules reach the planned sites, and by which of their parameters."""
    modules = {clean_fqn(name): module for name, module in model.named_modules()}
    assigned: dict[str, Assignment] = {}
    for site, kernels in routes.items():
        module = modules.get(site)
        parameter = site if module is None else f"{site}.weight"
        owner, _, name = parameter.rpartition(".")
        holder = modules.get(owner)
        if holder is None or not isinstance(getattr(holder, name, None), Tensor):
            raise PlanError(
                f"The plan has the site {site!r}, and this model has no module or parameter of that name that a "
                "product could be rerouted from. Probe and plan this model again."
            )
        runner = _runner(modules, owner)
        _, parameters = assigned.setdefault(runner, (modules[runner], {}))
        parameters[parameter[len(runner) + 1 :] if runner else parameter] = Route(site, kernels)
    return list(assigned.values())


def _runner(modules: Mapping[str, nn.Module], owner: str) -> str:
    """Return the name of the module whose forward a scope has to surround to see the products of `owner`'s weights."""
    runner = "" if isinstance(modules[owner], _TABLES) else owner
    while runner and (isinstance(modules[runner], _HOLDERS) or _is_overridden(modules[runner])):
        runner = _parent(runner)
    if _is_overridden(modules[runner]):
        raise PlanError(
            f"The products of {owner!r} cannot be rerouted: `forward` is replaced on the instance of "
            f"{type(modules[runner]).__name__}, and on what is between. Convert the model first, wrap it afterwards."
        )
    above = runner
    while above:
        above = _parent(above)
        runner = above if isinstance(modules[above], _FUSING) else runner
    return runner


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _is_overridden(module: nn.Module) -> bool:
    """Whether a function on the instance hides the forward of the module's class."""
    return "forward" in vars(module)


# --- the classes ---

# Planned: a linear layer that calls `dispatch.linear` itself. Routed: any module, within a scope that reroutes.
Kind = Literal["Planned", "Routed"]


@functools.cache
def _converted_class(kind: Kind, base: Any) -> Any:
    """Make the class that a module of class `base` becomes."""

    def planned(self: Any, input: Tensor) -> Tensor:
        route: Route = self._loka_routes["weight"]
        route.reached = True
        kernels = route.kernels
        return linear(input, self.weight, self.bias, kernels.fprop, kernels.dgrad, kernels.wgrad)

    @functools.wraps(base.forward)
    def routed(self: Any, *args: Any, **kwargs: Any) -> Any:
        with Reroute.of(self, self._loka_routes):
            return base.forward(self, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        make, arguments, *state = base.__reduce_ex__(self, protocol)
        if arguments[:1] == (made,):  # the class is made here, so no name leads to it: name what it is made from
            make, arguments = _restore, (kind, base)
        return make, arguments, *state

    forward = planned if kind == "Planned" else routed
    members = {"forward": forward, "__reduce_ex__": reduce, "__module__": __name__}
    made = type(f"{kind}{base.__name__}", (base,), members)
    return made


def _restore(kind: Kind, base: Any) -> Any:
    """Make an empty converted module, for `copy` and for those who save whole models."""
    made = _converted_class(kind, base)
    return made.__new__(made)
