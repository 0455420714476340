"""Graphs inside of a graph: what activation checkpointing computes again is one of its own, with its weights handed in.

Dynamo makes a graph of the function that a checkpoint runs, and a call that names it beside its operands. The products
in it are like any others, once it is known which operand of the call stands behind which of its inputs.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, Final

from torch import fx
from torch._ops import HigherOrderOperator

# Operators that run the graph of their first argument on all others.
_REGIONS: Final = frozenset({"tag_activation_checkpoint", "wrap_activation_checkpoint"})


def regions(gm: fx.GraphModule) -> Iterator[tuple[fx.GraphModule, Mapping[fx.Node, fx.Node]]]:
    """Yield the graphs that this one runs as regions, and for the inputs of each the node that is handed in for it.

    An input that two calls of one region take from different nodes is left out: nothing tells the calls apart inside.
    """
    handed_in: dict[fx.GraphModule, dict[fx.Node, set[Any]]] = {}
    for node in gm.graph.nodes:
        region = _region(gm, node)
        if region is None:
            continue
        inputs = handed_in.setdefault(region, defaultdict(set))
        for inner, outer in zip(region.graph.find_nodes(op="placeholder"), node.args[1:], strict=False):
            inputs[inner].add(outer)
    for region, inputs in handed_in.items():
        alike = ((inner, next(iter(outer))) for inner, outer in inputs.items() if len(outer) == 1)
        yield region, {inner: outer for inner, outer in alike if isinstance(outer, fx.Node)}


def _region(gm: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
    """Return the graph that a node runs as a region, None for any other node."""
    if not isinstance(node.target, HigherOrderOperator) or str(node.target) not in _REGIONS:
        return None
    body = node.args[0]
    assert isinstance(body, fx.Node)
    region = gm.get_submodule(str(body.target))
    return region if isinstance(region, fx.GraphModule) else None
