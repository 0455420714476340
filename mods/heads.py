"""Prediction heads: the layers whose output reaches the output of the model without another product.

Found by following what the model computes, backwards from its output to the first product on each way: in the autograd
graph of one run where an example input is given, else in a symbolic trace, which needs no data. Both work on a copy
that shares the parameters, so whatever a forward stores stays out of the model. Where the model cannot be traced, heads
are guessed from sizes: linears with fewer than 8 outputs or, where there is none, the last.
"""

import copy
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from loka.calls import forward_of
from loka.errors import ArgumentError
from loka.last_products import last_products
from loka.mods.claims import listing, walk
from loka.mods.fused_linear import FusedLinearNormAct
from loka.numerics import MIN_COLUMNS

CONVOLUTIONS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED: Final = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS: Final = (nn.Linear, nn.Bilinear, FusedLinearNormAct, *CONVOLUTIONS, *TRANSPOSED)
_FUNCTIONS: Final[frozenset[object]] = frozenset(
    {
        *(F.linear, F.bilinear, torch.matmul, torch.mm, torch.bmm, torch.mv, torch.addmm, torch.baddbmm, torch.addmv),
        *(torch.einsum, torch.tensordot, torch.inner, operator.matmul, F.scaled_dot_product_attention),
        *(F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    }
)
_METHODS: Final = frozenset({"matmul", "mm", "bmm", "mv", "addmm", "baddbmm", "addmv", "__matmul__", "inner"})
# What reads the form of a tensor and not its values.
_FORM_METHODS: Final = frozenset({"size", "dim", "numel", "stride", "new_zeros", "new_ones", "new_empty", "get_device"})
_FORM_ATTRIBUTES: Final = frozenset({"shape", "device", "dtype", "ndim", "requires_grad"})
_FORM_FUNCTIONS: Final = frozenset({len, torch.zeros_like, torch.ones_like, torch.empty_like})


@dataclass(frozen=True, kw_only=True, slots=True)
class Heads:
    """What was found: layers by id -> FQN, bare parameters that are added behind them, and how they were found.

    `elsewhere`: parameters of torch's own modules that a trace has seen other code read.
    """

    layers: Mapping[int, str] = field(default_factory=dict)
    parameters: frozenset[int] = frozenset()
    elsewhere: frozenset[int] = frozenset()
    how: str = ""


def find_heads(model: nn.Module, example: object = None) -> Heads:
    """Return the prediction heads of a model, following the run on `example` or, if that is None, a symbolic trace.

    example: the positional arguments of the forward as a tuple, a dict of keyword arguments, or one tensor. Raises
    ArgumentError where the model cannot be run on it.
    """
    if isinstance(model, _LAYERS):
        return Heads(layers={id(model): ""}, how="found as the prediction head, for it is the whole model")
    if example is not None:
        return _from_run(model, example)
    try:
        return _from_trace(model)
    except Exception as error:  # noqa: BLE001 - tracing runs the user's code on proxies, and that may raise anything
        return guessed_heads(model, _first_line(error))


def guessed_heads(model: nn.Module, why: str = "") -> Heads:
    """Return the linears with few outputs or, where there is none, the last."""
    linears = [(fqn, module) for fqn, module in walk(model) if isinstance(module, nn.Linear)]
    heads = [(fqn, module) for fqn, module in linears if module.out_features < MIN_COLUMNS] or linears[-1:]
    how = "found as prediction heads by their size alone"
    how += f", as the model could not be traced ({why}); name them in `keep` or give an `example` input" if why else ""
    return Heads(layers={id(module): fqn for fqn, module in heads}, how=how)


def _first_line(error: Exception) -> str:
    """Return what a trace says by itself, and any other error with its type."""
    text = (str(error).strip().splitlines() or [""])[0].rstrip(".")[:120]
    return text if isinstance(error, fx.proxy.TraceError) else f"{type(error).__name__}: {text}"


def _twin(model: nn.Module) -> nn.Module:
    """Return a copy of the model that shares its parameters; buffers are its own, for forwards write to them.

    So is what a forward has computed and kept, which autograd lets nobody deepcopy.
    """
    parameters = {id(tensor): tensor for tensor in model.parameters()}
    held = (value for module in model.modules() for value in tree_leaves(vars(module)))
    computed = (value for value in held if isinstance(value, Tensor) and not value.is_leaf)
    own = {id(tensor): tensor.detach().clone() for tensor in (*model.buffers(), *computed)}
    return copy.deepcopy(model, {**parameters, **own})


def _named(model: nn.Module, modules: Iterable[str], parameters: Iterable[Tensor], how: str) -> Heads:
    """Return heads by what they are called in the copy."""
    by_name = dict(model.named_modules(remove_duplicate=False))
    clean = {id(module): fqn for fqn, module in reversed(list(walk(model)))}
    found = set(modules)
    layers = {id(module): clean[id(module)] for name, module in by_name.items() if name in found}
    return Heads(layers=layers, parameters=frozenset(map(id, parameters)), how=how)


# --- by a symbolic trace ---


class _Tracer(fx.Tracer):
    """Records a submodule that cannot be traced as one node, as it does the modules of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.opaque: dict[str, str] = {}  # name -> why

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Also what multiplies, whoever wrote it, and what runs a forward of torch's under a name of its own."""
        home = getattr(forward_of(m), "__module__", "")
        own = home.startswith("torch.nn.modules.") and not isinstance(m, nn.Sequential)
        return own or isinstance(m, _LAYERS) or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace into a module, or past it."""
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:  # noqa: BLE001 - tracing runs the user's code on proxies, and that may raise anything
            name = self.path_of_module(m)
            self.opaque[name] = _first_line(error)
            return self.create_proxy("call_module", name, args, kwargs)


def _from_trace(model: nn.Module) -> Heads:
    twin = _twin(model)
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(twin.forward).parameters.items()
        if parameter.default is not parameter.empty
    }
    tracer = _Tracer()
    with torch.random.fork_rng():  # what is drawn without a proxy among its arguments is really drawn
        graph = tracer.trace(twin, concrete_args=defaults)
    modules = dict(twin.named_modules(remove_duplicate=False))
    found: dict[str, None] = {}
    parameters: list[Tensor] = []
    opaque = []
    for node in _reached(graph, modules):
        target = str(node.target)
        if node.op == "get_attr":
            value = operator.attrgetter(target)(twin)
            parameters += [value] if isinstance(value, nn.Parameter) else []
        elif isinstance(modules[target], _LAYERS):
            found[target] = None
        else:  # what multiplies inside, such as an encoder of torch's: its last linear
            inner = [name for name, module in modules[target].named_modules() if isinstance(module, nn.Linear)]
            found.update(dict.fromkeys(f"{target}.{name}" for name in inner[-1:]))
            opaque += [target] if target in tracer.opaque else []
    if not found and not parameters and any(isinstance(module, _LAYERS) for module in modules.values()):
        return guessed_heads(model, "no layer was found to lead to the output")
    how = "found as prediction heads: no product lies between them and the output"
    if opaque:
        how += f", the last linear in {listing(opaque)}, which could not be traced ({tracer.opaque[opaque[0]]})"
    return replace(_named(model, found, parameters, how), elsewhere=frozenset(_elsewhere(graph, twin)))


def _elsewhere(graph: fx.Graph, model: nn.Module) -> Iterator[int]:
    """Yield the ids of parameters that code beside their own module reads: torch's modules are not traced into."""
    for node in graph.nodes:
        if node.op == "get_attr" and node.users:
            value = operator.attrgetter(str(node.target))(model)
            if isinstance(value, nn.Parameter):
                yield id(value)


def _reached(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> Iterator[fx.Node]:
    """Yield the layers and parameters that lead to the output without a product in between."""
    waiting = [node for node in graph.nodes if node.op == "output"]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node.op == "get_attr":
            yield node
            continue
        if node.op == "call_module" and _multiplies(modules[str(node.target)]):
            yield node
            continue
        if _is_product(node):  # of a bare weight, with a bare bias
            yield from (argument for argument in node.all_input_nodes if argument.op == "get_attr")
            continue
        if _reads_form(node):
            continue
        fresh = [argument for argument in node.all_input_nodes if argument not in seen]
        seen.update(fresh)
        waiting += fresh


def _multiplies(module: nn.Module) -> bool:
    kinds = (*_LAYERS, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
    return any(isinstance(inner, kinds) for inner in module.modules())


def _is_product(node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target in _FUNCTIONS
    return node.op == "call_method" and node.target in _METHODS


def _reads_form(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _FORM_METHODS
    if node.op != "call_function":
        return False
    return node.target in _FORM_FUNCTIONS or (node.target is getattr and node.args[1] in _FORM_ATTRIBUTES)


# --- by a run on an example ---


def _from_run(model: nn.Module, example: object) -> Heads:
    twin = _twin(model)
    names = dict(twin.named_parameters(remove_duplicate=False))
    shared = {id(tensor): tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in names.values()}
    fresh = {name: shared[id(tensor)] for name, tensor in names.items()}
    args, kwargs = _arguments(example)
    try:
        with torch.enable_grad(), torch.random.fork_rng():
            output = torch.func.functional_call(twin, fresh, args, kwargs)
    except Exception as error:  # whatever the user's model raises on what was given is told as that
        raise ArgumentError(
            f"NoBias looks for the prediction heads by running {type(model).__name__} on `example`, and that raised "
            f"{_first_line(error)}. Give the arguments of its forward as a tuple or a dict, or "
            "name the heads in `keep`."
        ) from error
    last = last_products(output)
    if last.opaque:
        return guessed_heads(model, f"what ran inside a {last.opaque} cannot be followed")
    original = dict(model.named_parameters(remove_duplicate=False))
    owners: dict[int, list[str]] = {}
    for name, tensor in fresh.items():
        owners.setdefault(id(tensor), []).append(name)
    layers: dict[str, None] = {}
    parameters = []
    for leaf in last.parameters:
        for name in owners.get(id(leaf), ()):
            parameters.append(original[name])
            owner = name.rpartition(".")[0].partition(".parametrizations")[0]
            if isinstance(twin.get_submodule(owner), _LAYERS):
                layers[owner] = None
    return _named(model, layers, parameters, "found as prediction heads in a run on the example")


def _arguments(example: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, dict):
        return (), example
    return (example if isinstance(example, tuple) else (example,)), {}
