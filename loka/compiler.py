"""The `torch.compile` backend: find the planned products in the graph, put them on their kernels, leave the rest.

    torch.compile(model, backend="loka", options={"plan": "plan.json"})

Each product's weight is traced back through views to its graph input, whose source names the parameter; that name is
the site. A planned product becomes a call of `dispatch.running.linear`, which AOT autograd traces into, so that
Inductor sees plain aten ops and fuses the quantise with its neighbours. Any other option, and `mode`, go to Inductor.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Final, cast

import torch
from torch import Tensor, fx

from loka.dispatch.deciding.plan import Plan
from loka.dispatch.monitoring.effect import changed_kernels, note_graph
from loka.dispatch.running.convert import plan_of
from loka.dispatch.running.executions import counted, graph_kernels
from loka.dispatch.running.graph import operands, origin, shape_of
from loka.dispatch.running.routing import SiteKernels, site_kernels
from loka.errors import ArgumentError, PlanError, nearest
from loka.naming import clean_fqn

log: Final = logging.getLogger("loka.compiler")


def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile a graph with the products that `options["plan"]` (a path or a Plan) names on their planned kernels.

    `options["emulate"]` lets emulated kernels stand in for those that cannot run here; `options["mode"]` is one of
    torch.compile's modes, whose own `mode` argument cannot stand beside `options`. Raises, inside Dynamo's
    BackendCompilerFailed, PlanError when the plan belongs to another model, ArgumentError for unknown options.
    """
    from torch._functorch import config as functorch_config
    from torch._inductor.compile_fx import compile_fx  # only where something is compiled: importing it takes seconds

    rest = dict(options or {})
    plan = _plan(rest.pop("plan", None))
    emulate = bool(rest.pop("emulate", False))
    patches = _inductor_options(rest.pop("mode", mode), rest)
    if rewrite(gm, plan, emulate=emulate):
        note_graph(plan)
    # A graph from AOT autograd's cache would not be traced, and what is in it could not be counted.
    with graph_kernels() as kernels, functorch_config.patch(enable_autograd_cache=False):
        compiled = cast(Callable[..., Any], compile_fx(gm, list(example_inputs), config_patches=patches or None))
    return counted(compiled, kernels)


def _inductor_options(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `mode` and the options that are not ours change in Inductor's configuration."""
    from torch._inductor import config, list_mode_options

    modes = cast(dict[str, dict[str, Any]], list_mode_options())
    if mode is not None and mode not in modes:
        raise ArgumentError(f"torch.compile got mode={mode!r}. Modes: {', '.join(modes)}.{nearest(mode, modes)}")
    patches = {**modes[mode or "default"], **{key.replace("-", "_"): value for key, value in options.items()}}
    known = config.get_config_copy()
    for key in patches:
        if key not in known:
            raise ArgumentError(
                f'backend="loka" got the option {key!r}. Its own options are plan, emulate and mode, and every option '
                f"of Inductor's is passed on; this is neither.{nearest(key, ('plan', 'emulate', 'mode', *known))}"
            )
    return patches


def _plan(given: Plan | str | PathLike[str] | None) -> Plan:
    if given is None:
        raise ArgumentError(
            'backend="loka" runs a plan and got none. Write torch.compile(model, backend="loka", '
            'options={"plan": "plan.json"}) with a file from `loka plan`; a mode goes into the options, too: '
            '{"plan": "plan.json", "mode": "max-autotune"}.'
        )
    return plan_of(given)


def rewrite(gm: fx.GraphModule, plan: Plan, *, emulate: bool = False) -> tuple[str, ...]:
    """Put a graph's planned products on their kernels, in place; return their sites, in graph order.

    Raises PlanError when a parameter of the graph has another shape than the plan says, when none of them is in the
    plan, or when several modules in the graph fit it.
    """
    parameters = _planned_parameters(gm.graph, plan)
    planned = site_kernels(plan, _device(parameters), emulate=emulate, changed=changed_kernels(plan))
    # Where each expert's product is one of its own, it is not known while a graph is made whose it is: a pass in which
    # one is to stay in high precision does.
    routes = {
        site: kernels if kernels.op == "grouped_linear" else kernels.of_expert(None)
        for site, kernels in planned.items()
    }
    found = []
    for node in list(gm.graph.nodes):
        current: fx.Node | None = node
        while current is not None:  # an attention holds several products, one is placed at a time
            site, current = _place(gm.graph, current, parameters, routes)
            found += [site] if site is not None else []
    _tell_unreached(parameters, routes, found)
    gm.graph.lint()
    gm.recompile()
    return tuple(found)


def _place(
    graph: fx.Graph, node: fx.Node, parameters: "_Parameters", routes: Mapping[str, SiteKernels]
) -> tuple[str | None, fx.Node | None]:
    """Replace a product whose weight is planned; return its site and the new node."""
    for operand in operands(node):
        site = _site(node, parameters, parameters.names.get(origin(operand.weight)), routes)
        if site is None or routes[site].op not in operand.ops:
            continue
        with graph.inserting_before(node):
            new = operand.place(graph, routes[site])
        # The value stays, for whoever asks for the shape of this node after it was replaced.
        kept = ("nn_module_stack", "stack_trace", "example_value")
        new.meta.update({key: value for key, value in node.meta.items() if key in kept})
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        return site, new
    return None, None


def _site(
    node: fx.Node, parameters: "_Parameters", parameter: str | None, routes: Mapping[str, SiteKernels]
) -> str | None:
    """Return the planned site of a product with this parameter, None where there is none."""
    if parameter is None:
        return None
    site = _site_of(parameter)
    if site not in parameters.sites:
        # A tied weight has the name under which Dynamo met it first; the running module tells which use this is.
        site = parameters.running_module(node)
    return site if site in routes else None


def _site_of(parameter: str) -> str:
    owner, _, last = parameter.rpartition(".")
    return owner if last == "weight" and owner else parameter


def _tell_unreached(parameters: "_Parameters", routes: Mapping[str, SiteKernels], found: Sequence[str]) -> None:
    """Name the sites whose weight is in this graph and whose product is not one that can be rerouted."""
    here = {_site_of(name) for name in parameters.names.values()}
    for site in sorted((here & routes.keys()) - set(found)):
        log.warning("%s is planned in FP8, but its product in this graph is of a form that stays as written", site)


def _device(parameters: "_Parameters") -> torch.device:
    for node in parameters.names:
        value = node.meta.get("example_value")
        if isinstance(value, Tensor):
            return value.device
    return torch.device("cpu")


# --- which parameter is this? ---

# Dynamo's sources read e.g. L['self']._modules['0']._parameters['weight'], or G['model'].up in a module stack.
_SOURCE_PART: Final = re.compile(r"\['([^']+)'\]|\.(\w+)|\[(\d+)\]")
_INTERNAL: Final = ("_modules", "_parameters", "_buffers")
_FIRST_INTERNAL: Final = re.compile(rf"\.(?:{'|'.join(_INTERNAL)})\[")


@dataclass(frozen=True, slots=True)
class _Parameters:
    """The planned model's parameters and buffers among the inputs of a graph, by their FQN.

    `root` is the source of the outermost module that the graph knows, `prefix` the path from there to the planned
    model, which may be wrapped in other modules; `sites` are all that the plan decides on.
    """

    names: Mapping[fx.Node, str]
    sites: frozenset[str]
    root: str = ""
    prefix: str = ""

    def running_module(self, node: fx.Node) -> str:
        """Return the FQN of the innermost module that ran a node; "" for the model itself and where it is unknown."""
        stack = node.meta.get("nn_module_stack")
        path = str(list(stack.values())[-1][0]) if stack else ""
        name = _fqn(path.removeprefix(self.root)) if path.startswith(self.root) else ""
        return name.removeprefix(f"{self.prefix}.") if self.prefix else name


def _fqn(path: str) -> str:
    """Return `0.up.weight` for `._modules['0']._modules['up']._parameters['weight']`."""
    parts = ("".join(groups) for groups in _SOURCE_PART.findall(path))
    return clean_fqn(".".join(part for part in parts if part not in _INTERNAL))


def _planned_parameters(graph: fx.Graph, plan: Plan) -> _Parameters:
    """Find the planned model in a graph: the root and prefix under which most names are those of the plan."""
    sources = [(node, *source) for node in graph.nodes if (source := _source(node)) is not None]
    sites = frozenset(decision.request.site for decision in plan.decisions)
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for _, root, name in sources:
        parts = name.split(".")
        for length in range(len(parts)):
            inner = ".".join(parts[length:])
            counts[root, ".".join(parts[:length])] += inner in plan.fingerprint or _site_of(inner) in sites
    fit = max(counts.values(), default=0)
    if not fit:
        _check_foreign(sources, plan)
        return _Parameters({}, sites)
    depth = min(_depth(prefix) for (_, prefix), count in counts.items() if count == fit)
    places = [place for place, count in counts.items() if count == fit and _depth(place[1]) == depth]
    _check_unique(places, plan)
    root, prefix = places[0]
    start = f"{prefix}." if prefix else ""
    names = {
        node: name.removeprefix(start)
        for node, r, name in sources
        if r == root and name.startswith(start) and not _is_stored(node)
    }
    _check_shapes(names, plan)
    return _Parameters(names, sites, root, prefix)


def _is_stored(node: fx.Node) -> bool:
    """Whether a graph input is a weight that `loka.freeze` has stored, and whose product is what it is to be."""
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) and value.dtype.is_floating_point and value.dtype.itemsize == 1


def _depth(prefix: str) -> int:
    return prefix.count(".") + 1 if prefix else 0


def _source(node: fx.Node) -> tuple[str, str] | None:
    """Return the root and FQN of the parameter or buffer that a graph input stands for, None for other nodes."""
    if node.op != "placeholder":
        return None
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", None)
    text = str(name() if callable(name) else name)  # a method before torch 2.13
    first = _FIRST_INTERNAL.search(text)
    return (text[: first.start()], _fqn(text[first.start() :])) if first else None


def _check_foreign(sources: Sequence[tuple[fx.Node, str, str]], plan: Plan) -> None:
    """Refuse a graph with weights of another model; leave as written one that is a part of the planned model."""
    weights = {name: shape for node, _, name in sources if len(shape := shape_of(node)) > 1}
    if not weights:
        return
    name = next(iter(weights))
    planned = [(f".{fqn}", tuple(shape)) for fqn, shape in plan.fingerprint.items()]
    if all(any(fqn.endswith(f".{n}") and shape == w for fqn, shape in planned) for n, w in weights.items()):
        log.warning(
            "a graph with %s is a part of %s that a graph break left by itself: it stays in high precision, since "
            "nothing tells which part. torch.compile(fullgraph=True) shows the break; loka.convert does not mind it.",
            name,
            plan.model,
        )
        return
    raise PlanError(
        f"The plan for {plan.model} names none of the {len(weights)} weights of this graph, such as {name!r}."
        f"{nearest(name, plan.fingerprint)} Compile the module that was probed, or probe and plan this one."
    )


def _check_unique(places: Sequence[tuple[str, str]], plan: Plan) -> None:
    """Refuse a graph in which two modules, such as a teacher and a student, fit the plan equally well."""
    if len(places) > 1:
        equal = ", ".join(f"{root}.{prefix}".removesuffix(".") for root, prefix in places)
        raise PlanError(
            f"The plan for {plan.model} fits {len(places)} modules of this graph: {equal}. Compile the one that it was "
            "made for by itself."
        )


def _check_shapes(names: Mapping[fx.Node, str], plan: Plan) -> None:
    for node, name in names.items():
        shape = shape_of(node)
        if shape and name in plan.fingerprint and shape != tuple(plan.fingerprint[name]):
            raise PlanError(
                f"The plan for {plan.model} was made for {name} of shape {tuple(plan.fingerprint[name])}; in this "
                f"graph it has {shape}. Probe and plan this model."
            )
