"""Where a model decides which expert a token goes to, and how each kind of module tells it.

Most models hand the chosen experts to one module per layer, `*Experts.forward(hidden, index, weights)`; there the
choice is read as it arrives. Some decide in a router and pass on something else: a table says what their outputs mean.
Any other module is named by the user, and read by what it takes and gives: integers are the chosen experts, or a mask
over the experts; one float per expert is a score, of which the best `top_k` are chosen.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from loka.dtensors import is_sharded
from loka.errors import ArgumentError, EvidenceError
from loka.naming import clean_fqn
from loka.selection import select

# What modules and configurations call their number of experts and of experts per token, the more inclusive first.
_NUM_EXPERTS: Final[tuple[str, ...]] = (
    "total_experts",
    "num_experts",
    "num_local_experts",
    "num_routed_experts",
    "n_routed_experts",
    "moe_num_experts",
)
_TOP_K: Final[tuple[str, ...]] = ("top_k", "num_experts_per_tok", "num_experts_per_token", "moe_top_k", "topk", "k")
INTEGERS: Final[tuple[torch.dtype, ...]] = (torch.int64, torch.int32, torch.int16)
_INDEX: Final[tuple[str, ...]] = ("index", "indices", "selected", "expert_ids", "topk", "top_k")

Arguments = tuple[Any, ...]
Reader = Callable[[nn.Module, Arguments, Mapping[str, Any], Any], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingSite:
    """One place where tokens get their experts; `when`: whether it is read before or after the module's forward."""

    name: str
    module: nn.Module
    layer: int
    experts: int
    when: Literal["before", "after"]
    read: Reader


def routing_sites(model: nn.Module, experts: str | Sequence[str] | None = None) -> tuple[RoutingSite, ...]:
    """Return where the model chooses experts, in its order; `experts`: names of the modules to read instead.

    The layer is the first number in the name, where every site has its own; otherwise sites are numbered from 0.
    Raises ArgumentError on a name that is not there, EvidenceError where nothing is found.
    """
    modules = {clean_fqn(name): module for name, module in model.named_modules() if name}
    if experts is not None:
        modules.setdefault("", model)
        names = select(experts, modules)
        found: list[tuple[str, Reader]] = [(name, _named) for name in names]
    else:
        found = list(_discovered(modules))
    if not found:
        raise EvidenceError(
            f"No mixture of experts was found in this {type(model).__name__}: no module `*Experts` that is handed the "
            "chosen experts, and no router of a kind known here. Name the modules that choose or receive them with "
            'experts="*.router".'
        )
    layers = _layer_numbers([name for name, _ in found])
    return tuple(
        RoutingSite(
            name=name,
            module=modules[name],
            layer=layer,
            experts=_num_experts(name, modules, model),
            when="before" if read is received else "after",
            read=read,
        )
        for (name, read), layer in zip(found, layers, strict=True)
    )


def _discovered(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Reader]]:
    told = {name.rpartition(".")[0] for name, module in modules.items() if type(module).__name__ in _ROUTERS}
    for name, module in modules.items():
        kind = type(module).__name__
        if kind in _ROUTERS:
            yield name, _ROUTERS[kind]
        elif kind.endswith("Experts") and name.rpartition(".")[0] not in told and _takes_index(module):
            yield name, received


def _takes_index(module: nn.Module) -> bool:
    """Whether the second argument of a module's forward is the chosen experts, as far as its name tells."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    if parameters and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        return True  # a wrapper: the call will show
    return len(parameters) >= 2 and any(word in parameters[1].name for word in _INDEX)


def _layer_numbers(names: Sequence[str]) -> list[int]:
    numbers = [next((int(part) for part in name.split(".") if part.isdecimal()), None) for name in names]
    known = [number for number in numbers if number is not None]
    return known if len(set(known)) == len(names) else list(range(len(names)))


def _num_experts(name: str, modules: Mapping[str, nn.Module], model: nn.Module) -> int:
    """Return how many experts a site chooses from: told by itself, its containers, its siblings, or the model."""
    sharded = next((p.shape[0] for p in modules[name].parameters(recurse=False) if p.ndim == 3 and is_sharded(p)), None)
    if sharded is not None:
        return int(sharded)  # a DTensor has the extents of the whole; the module may count what its rank has
    parent = name.rpartition(".")[0]
    near = [module for other, module in modules.items() if other.rpartition(".")[0] == parent and other != name]
    places = [modules[name], modules.get(parent), *near, getattr(model, "config", None)]
    if hasattr(getattr(model, "config", None), "get_text_config"):
        places.append(model.config.get_text_config())  # type: ignore[operator, union-attr]
    for place in places:
        found = _attribute(place, _NUM_EXPERTS)
        if found is not None:
            return found
    stacked = next((p.shape[0] for p in modules[name].parameters(recurse=False) if p.ndim == 3), None)
    out_features = getattr(modules[name], "out_features", None)
    if stacked is None and not isinstance(out_features, int):
        raise ArgumentError(
            f"How many experts {name or 'the model'} chooses from is not known. Set its attribute num_experts."
        )
    return int(stacked if stacked is not None else out_features)  # type: ignore[arg-type]


def _attribute(place: Any, names: Sequence[str]) -> int | None:
    for name in names:
        value = getattr(place, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


# ---- readers: each returns the chosen experts as [tokens, k] (or [rows, tokens, k]); -1 is a token that got none


def received(module: nn.Module, args: Arguments, kwargs: Mapping[str, Any], output: Any) -> Tensor:
    """What an experts module is handed."""
    if len(args) > 1 and _is_index(args[1]):  # as a rule; this runs in every layer of every step
        second: Tensor = args[1]
        return second
    values = (*args, *kwargs.values())
    for value in values:
        if _is_index(value):
            index: Tensor = value
            return index
    raise ArgumentError(
        f"{type(module).__name__} was called without a tensor of chosen experts, [tokens, k] of integers; it got "
        f"{_kinds(values)}. Name the router instead, with experts=..."
    )


def _named(module: nn.Module, args: Arguments, kwargs: Mapping[str, Any], output: Any) -> Tensor:
    """What a module that the user named takes or gives."""
    outputs = list(output) if isinstance(output, tuple | list) else [output]
    known = _attribute(module, _NUM_EXPERTS) or getattr(module, "out_features", None)
    top_k = _attribute(module, _TOP_K)
    for value in [*args, *kwargs.values(), *outputs]:
        if _is_index(value):
            return _chosen(value) if value.shape[-1] == known and top_k != known else value
    if top_k is not None and known is not None:
        scores = [value for value in outputs if isinstance(value, Tensor) and value.shape[-1:] == (known,)]
        if scores:
            return scores[-1].topk(top_k, dim=-1).indices
    raise ArgumentError(
        f"{type(module).__name__} neither takes nor gives integers [tokens, k], the chosen experts, and a score per "
        f"expert needs the attributes num_experts and top_k. It took {_kinds([*args, *kwargs.values()])} and gave "
        f"{_kinds(outputs)}. Name another module, or set those attributes."
    )


def _chosen(mask: Tensor) -> Tensor:
    """Turn a mask over the experts, [.., experts], into the experts it marks, as many as one token can have."""
    return torch.where(mask != 0, torch.arange(mask.shape[-1], device=mask.device), -1)


def _best(position: int) -> Reader:
    """Read the `top_k` best of the scores at a position of a router's output."""

    def read(module: nn.Module, args: Arguments, kwargs: Mapping[str, Any], output: Any) -> Tensor:
        scores: Tensor = output[position]
        return scores.topk(_attribute(module, _TOP_K) or 1, dim=-1).indices

    return read


def _marked(position: int) -> Reader:
    """Read which experts are marked, by anything but zero, at a position of a router's output."""

    def read(module: nn.Module, args: Arguments, kwargs: Mapping[str, Any], output: Any) -> Tensor:
        return _chosen(output[position])

    return read


# Routers whose experts are not handed an index: class -> how its output tells the choice.
_ROUTERS: Final[dict[str, Reader]] = {
    "Llama4Router": _best(1),  # (scores, logits); a score may underflow to the zero of experts not chosen
    "JetMoeTopKGating": _best(4),  # (order, batch, gates, sizes, logits)
    "SwitchTransformersTop1Router": _marked(0),  # one-hot, zero where the expert's capacity is exceeded
    "NllbMoeTop2Router": _marked(1),  # combining weights, zero where not chosen or over capacity
}


def _is_index(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in INTEGERS and value.ndim >= 2


def _kinds(values: Sequence[Any]) -> str:
    shown = [
        f"{value.dtype} {list(value.shape)}".removeprefix("torch.")
        if isinstance(value, Tensor)
        else type(value).__name__
        for value in values
    ]
    return ", ".join(shown) or "nothing"
