"""Which parameter of the planned model is this input of a Dynamo graph?

Dynamo keeps the source of each input, such as `L['self']._modules['up']._parameters['weight']`. Where a graph has the
planned model, or what it is wrapped in, its names are those of the plan. A graph break, hooks as those of FSDP, and
code that compiles block by block leave parts of it by themselves, whose names begin at the part. Such a part stands for
each place of the model at which its weights would fit, and Dynamo runs one graph for all that are alike: what is
planned alike at all of them is known, whichever it is.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from loka.dispatch.deciding.plan import Plan
from loka.dispatch.running.graph import origin, shape_of
from loka.dispatch.running.registered import first_names
from loka.dispatch.running.routing import SiteKernels
from loka.errors import PlanError, nearest
from loka.naming import clean_fqn

log: Final = logging.getLogger("loka.compiler")

# Dynamo's sources read e.g. L['self']._modules['0']._parameters['weight'], or G['model'].up in a module stack.
_SOURCE_PART: Final = re.compile(r"\['([^']+)'\]|\.(\w+)|\[(\d+)\]")
_INTERNAL: Final = ("_modules", "_parameters", "_buffers")
# Where the modules of one that has set an attribute of its own are read from.
_SET_ANEW: Final = "__dict__"
_FIRST_INTERNAL: Final = re.compile(rf"\.(?:{'|'.join(_INTERNAL)})\[")
# Modules that a resumed function was about to call when its graph broke.
_RESUMED: Final = "L['___stack"

# What a step that is compiled as a whole reads of a parameter, to clip it or to update by it.
_GRADIENT: Final = ".grad"
_LOOKUPS: Final = frozenset({F.embedding, F.embedding_bag})

Routes = Mapping[str, SiteKernels]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module of a graph stands: the source of a root, what to leave out of its names, what to put before."""

    root: str
    prefix: str = ""
    above: str = ""

    def fqn(self, name: str) -> str:
        """Return the name in the planned model of what the root has under this name; as it is where it is outside."""
        inner = name.removeprefix(f"{self.prefix}.") if self.prefix else name
        return ".".join(part for part in (self.above, inner) if part)


@dataclass(frozen=True, slots=True)
class Parameters:
    """The planned model's parameters and buffers among the inputs of a graph, by their FQN.

    `places` are where its modules stand, `sites` all that the plan decides on. Of a part that may stand at several
    places the names are those of the first, and `alike` has the sites of all, by that of the first.
    """

    names: Mapping[fx.Node, str]
    sites: frozenset[str]
    places: tuple[Place, ...] = ()
    alike: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def inside(self, handed_in: Mapping[fx.Node, fx.Node]) -> "Parameters":
        """Return the same for a region, given which node of this graph stands behind which of its inputs."""
        origins = {inner: origin(outer) for inner, outer in handed_in.items()}
        names = {inner: self.names[outer] for inner, outer in origins.items() if outer in self.names}
        return replace(self, names=names)

    def running_module(self, node: fx.Node) -> str:
        """Return the FQN of the innermost module that ran a node; "" for the model itself and where it is unknown."""
        stack = node.meta.get("nn_module_stack")
        path = str(list(stack.values())[-1][0]) if stack else ""
        for place in self.places:
            if path.startswith(place.root):
                return place.fqn(_fqn(path.removeprefix(place.root)))
        return ""

    def is_weight_of(self, module: str, parameter: str) -> bool:
        """Whether the weight of a module, given by FQN, is a parameter that has the name of another one's here."""
        if site_of(parameter) == module:
            return False
        for place in self.places:
            inner = module.removeprefix(f"{place.above}.") if place.above else module
            name = ".".join(part for part in (place.prefix, inner, "weight") if part)
            first = first_names(place.root, place.prefix).get(name)
            if first is not None and ".".join(part for part in (place.above, first) if part) == parameter:
                return True
        return False


def device_of_graph(graph: fx.Graph) -> torch.device:
    """Return the device of a graph's first parameter or buffer, the CPU where it has none."""
    values = (each.node.meta.get("example_value") for each in _inputs(graph))
    return next((value.device for value in values if isinstance(value, Tensor)), torch.device("cpu"))


def site_of(parameter: str) -> str:
    """Return the site of a parameter's products."""
    owner, _, last = parameter.rpartition(".")
    return owner if last == "weight" and owner else parameter


@dataclass(frozen=True, slots=True)
class _Input:
    """An input of a graph, the source of the root it belongs to, and its name there."""

    node: fx.Node
    root: str
    name: str
    is_buffer: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self.node)

    @property
    def is_weight(self) -> bool:
        """Whether a plan may name it: no buffer, such as a codebook, unless it is a weight that was stored."""
        return len(self.shape) > 1 and (not self.is_buffer or _is_stored(self.node))


def planned_parameters(graph: fx.Graph, plan: Plan, routes: Routes, *, is_known: bool = False) -> Parameters:
    """Find what a graph has of the planned model; `routes` are the sites that leave high precision.

    Raises PlanError where the graph has the planned model more than once, and where it is that of another one, unless
    the planned one `is_known` from a graph before: what is compiled with it may have weights of its own.
    """
    inputs = list(_inputs(graph))
    sites = frozenset(decision.request.site for decision in plan.decisions)
    place = _model(inputs, plan, sites)
    if place is None:
        parts = _parts(inputs, plan)
        _check_foreign(inputs, parts, plan, is_known=is_known)
        return _of_parts(inputs, parts, routes, Parameters({}, sites), plan)
    start = f"{place.prefix}." if place.prefix else ""
    own = [each for each in inputs if each.root == place.root and each.name.startswith(start)]
    names = {each.node: place.fqn(each.name) for each in own if not _is_stored(each.node)}
    names.update(_by_first_names(inputs, place, plan, sites))
    _check_shapes(names, plan)
    resumed = [each for each in inputs if each.root != place.root and each.root.startswith(_RESUMED)]
    return _of_parts(resumed, _parts(resumed, plan), routes, Parameters(names, sites, (place,)), plan)


def _model(inputs: Sequence[_Input], plan: Plan, sites: frozenset[str]) -> Place | None:
    """Return where the planned model stands: the root and prefix under which most names are those of the plan.

    None where there is none, or only modules that fit better as parts of it.
    """
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for each in inputs:
        parts = each.name.split(".")
        for length in range(len(parts)):
            inner = ".".join(parts[length:])
            counts[each.root, ".".join(parts[:length])] += inner in plan.fingerprint or site_of(inner) in sites
    fit = max(counts.values(), default=0)
    if not fit:
        return None
    depth = min(_depth(prefix) for (_, prefix), count in counts.items() if count == fit)
    places = [place for place, count in counts.items() if count == fit and _depth(place[1]) == depth]
    if all(_is_better_as_part(root, inputs, plan, sites) for root, _ in places):
        return None
    _check_unique(places, plan)
    return Place(*places[0])


def _by_first_names(inputs: Sequence[_Input], place: Place, plan: Plan, sites: frozenset[str]) -> dict[fx.Node, str]:
    """Return the weights that have a name that the plan does not know, by the name under which it does."""
    here = [each for each in inputs if each.root == place.root and each.is_weight and not _is_stored(each.node)]
    names = {each.node: (each.name, place.fqn(each.name)) for each in here}
    strange = {
        node: own for node, (own, name) in names.items() if name not in plan.fingerprint and site_of(name) not in sites
    }
    first = first_names(place.root, place.prefix) if strange else {}
    return {node: first[own] for node, own in strange.items() if own in first}


def _is_better_as_part(root: str, inputs: Sequence[_Input], plan: Plan, sites: frozenset[str]) -> bool:
    """Whether some weight of a root is none of the planned model's, and all of them are at home in a part of it."""
    own = [each for each in inputs if each.root == root]
    weights = [each for each in own if each.is_weight and site_of(each.name) not in sites]
    foreign = any(not _fits(plan, each.name, each.shape) for each in weights)
    return foreign and bool(_parts(own, plan).get(root))


def _fqn(path: str) -> str:
    """Return `0.up.weight` for `._modules['0']._modules['up']._parameters['weight']`."""
    parts = ("".join(groups) for groups in _SOURCE_PART.findall(path))
    return clean_fqn(".".join(part for part in parts if part not in (*_INTERNAL, _SET_ANEW)))


def _is_stored(node: fx.Node) -> bool:
    """Whether a graph input is a weight that `loka.freeze` has stored, and whose product is what it is to be."""
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) and value.dtype.is_floating_point and value.dtype.itemsize == 1


def _depth(prefix: str) -> int:
    return prefix.count(".") + 1 if prefix else 0


def _inputs(graph: fx.Graph) -> Iterator[_Input]:
    """Yield the inputs of a graph that stand for parameters and buffers of modules."""
    for node in graph.find_nodes(op="placeholder"):
        source = getattr(node.meta.get("grapharg"), "source", None)
        name = getattr(source, "name", None)
        text = str(name() if callable(name) else name)  # a method before torch 2.13
        first = _FIRST_INTERNAL.search(text)
        if first and not text.endswith(_GRADIENT):
            is_buffer = text.rfind("._buffers[") > text.rfind("._parameters[")
            yield _Input(node, text[: first.start()], _fqn(text[first.start() :]), is_buffer)


# --- parts of the planned model ---


def _parts(inputs: Sequence[_Input], plan: Plan) -> dict[str, list[str]]:
    """Return, for each root with weights, the modules of the planned model that have all of them, by name and shape."""
    weights: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for each in inputs:
        if each.is_weight:
            weights[each.root][each.name] = each.shape
    found = {}
    for root, shapes in weights.items():
        end = f".{next(iter(shapes))}"
        homes = [fqn.removesuffix(end) for fqn in plan.fingerprint if fqn.endswith(end)]
        found[root] = [home for home in homes if all(_fits(plan, f"{home}.{n}", s) for n, s in shapes.items())]
    return found


def _fits(plan: Plan, name: str, shape: tuple[int, ...]) -> bool:
    return name in plan.fingerprint and tuple(plan.fingerprint[name]) == shape


def _of_parts(
    inputs: Sequence[_Input], parts: Mapping[str, list[str]], routes: Routes, found: Parameters, plan: Plan
) -> Parameters:
    """Add the weights of parts whose products are planned alike wherever the part may stand; name the others."""
    names, alike, apart = dict(found.names), dict(found.alike), []
    for each in inputs:
        sites = tuple(site_of(f"{home}.{each.name}") for home in parts.get(each.root, ()))
        if any(routes.get(site) != routes.get(sites[0]) for site in sites):
            apart += [] if is_looked_up(each.node) else [each.name]
        elif sites and not _is_stored(each.node):
            names[each.node] = f"{parts[each.root][0]}.{each.name}"
            alike[sites[0]] = sites
    places = [Place(root, above=homes[0]) for root, homes in parts.items() if homes]
    if apart:
        log.warning(
            "a graph with %s is a part of %s that a graph break left by itself, or that is compiled by itself: it "
            "stays in high precision, since nothing tells which of several parts, planned apart, it is. "
            "loka.convert(model, plan) and torch.compile(model), without this backend, run each as planned.",
            ", ".join(apart),
            plan.model,
        )
    return replace(found, names=names, alike=alike, places=(*found.places, *places))


def is_looked_up(node: fx.Node) -> bool:
    """Whether a weight is a table of which a graph takes rows, and no operand of a product."""
    return all(user.target in _LOOKUPS for user in node.users)


# --- refusals ---


def _check_foreign(inputs: Sequence[_Input], parts: Mapping[str, list[str]], plan: Plan, *, is_known: bool) -> None:
    """Refuse a graph that has weights and no part of the planned model; name one beside a graph that has."""
    if not parts or any(parts.values()):
        return
    weights = [each.name for each in inputs if each.is_weight]
    if is_known:
        log.warning("a graph with %s has nothing of %s: the plan is not for it", ", ".join(weights), plan.model)
        return
    raise PlanError(
        f"The plan for {plan.model} names none of the {len(weights)} weights of this graph, such as {weights[0]!r}."
        f"{nearest(weights[0], plan.fingerprint)} Compile the module that was probed, or probe and plan this one."
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
