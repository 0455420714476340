"""The `torch.compile` backend: find the planned products in the graph, put them on their kernels, leave the rest.

    torch.compile(model, backend="loka", options={"plan": "plan.json"})

Each product's weight is traced back through views to its graph input, whose source names the parameter; that name is
the site (`dispatch.running.parameters`). A planned product becomes a call of `dispatch.running.linear`, which AOT
autograd traces into, so that Inductor sees plain aten ops and fuses the quantise with its neighbours. Any other option,
and `mode`, go to Inductor.
"""

import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, Final, cast

from torch import fx

from loka.dispatch.deciding.plan import Plan
from loka.dispatch.monitoring.effect import changed_kernels, note_graph
from loka.dispatch.running.convert import plan_of
from loka.dispatch.running.executions import counted, graph_kernels
from loka.dispatch.running.graph import operands, origin
from loka.dispatch.running.parameters import Parameters, device_of_graph, is_looked_up, planned_parameters, site_of
from loka.dispatch.running.regions import regions
from loka.dispatch.running.routing import SiteKernels, site_kernels
from loka.errors import ArgumentError, nearest

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
    found, reached = _rewritten(gm, plan, emulate=emulate)
    if found:
        note_graph(plan)
    # A graph from AOT autograd's cache would not be traced, and what is in it could not be counted.
    with graph_kernels() as kernels, functorch_config.patch(enable_autograd_cache=False):
        compiled = cast(Callable[..., Any], compile_fx(gm, list(example_inputs), config_patches=patches or None))
    if found:  # only now: where torch cannot compile a graph, Dynamo runs that code as it was written
        _reached[plan.hash].update(reached)
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
    if not isinstance(given, str | PathLike):
        return plan_of(given)
    try:
        state = os.stat(given)
    except (OSError, ValueError):
        return plan_of(given)  # which says what is wrong
    return _read(os.fspath(given), state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=4)
def _read(path: str, *_: int) -> Plan:
    """Read a plan once for all graphs, as long as the file is what it was."""
    return plan_of(path)


def rewrite(gm: fx.GraphModule, plan: Plan, *, emulate: bool = False) -> tuple[str, ...]:
    """Put a graph's planned products on their kernels, in place; return their sites, in graph order.

    Those of regions that are graphs of their own, as those of a checkpoint are, come last. Raises PlanError when a
    parameter of the graph has another shape than the plan says, when none of them is in the plan, or when several
    modules in the graph fit it.
    """
    found, reached = _rewritten(gm, plan, emulate=emulate)
    if found:
        _reached[plan.hash].update(reached)
    return found


def _rewritten(gm: fx.GraphModule, plan: Plan, *, emulate: bool) -> tuple[tuple[str, ...], set[str]]:
    """Do that; return the sites, and with them those of blocks that run the same compiled code."""
    planned = site_kernels(plan, device_of_graph(gm.graph), emulate=emulate, changed=changed_kernels(plan))
    # Where each expert's product is one of its own, it is not known while a graph is made whose it is: a pass in which
    # one is to stay in high precision does.
    routes = {
        site: kernels if kernels.op == "grouped_linear" else kernels.of_expert(None)
        for site, kernels in planned.items()
    }
    parameters = planned_parameters(gm.graph, plan, routes, is_known=plan.hash in _reached)
    found = _place_all(gm, parameters, routes)
    _tell_unreached(parameters, routes, found)
    if found:
        _reached.setdefault(plan.hash, set())
    return tuple(found), set(found).union(*(parameters.alike.get(site, ()) for site in found))


# By the plan's hash, from its first graph on: the sites that compiled graphs have on their kernels.
_reached: Final[dict[str, set[str]]] = {}


def unreached(plan: Plan | str | PathLike[str]) -> tuple[str, ...]:
    """Return the sites that a plan takes out of high precision and no graph compiled of it has, in the plan's order.

    After a training step this should be empty. What stays here runs in code that Dynamo leaves as it is (behind a graph
    break, in a disabled region, beyond its limit of recompilations), or in a form that was named in a warning; that
    code runs the model as it was written, in high precision. Raises ArgumentError, PlanError for what is no plan.
    """
    loaded = plan_of(plan)
    planned = dict.fromkeys(each.request.site for each in loaded.decisions if each.recipe is not None)
    reached = _reached.get(loaded.hash, set())
    return tuple(site for site in planned if site not in reached)


def _place_all(gm: fx.GraphModule, parameters: Parameters, routes: Mapping[str, SiteKernels]) -> list[str]:
    """Replace the planned products of a graph and of the regions in it; return their sites."""
    found = []
    for node in list(gm.graph.nodes):
        current: fx.Node | None = node
        while current is not None:  # an attention holds several products, one is placed at a time
            site, current = _place(gm.graph, current, parameters, routes)
            found += [site] if site is not None else []
    for region, handed_in in regions(gm):
        found += _place_all(region, parameters.inside(handed_in), routes)
    gm.graph.lint()
    gm.recompile()
    return found


def _place(
    graph: fx.Graph, node: fx.Node, parameters: Parameters, routes: Mapping[str, SiteKernels]
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
    node: fx.Node, parameters: Parameters, parameter: str | None, routes: Mapping[str, SiteKernels]
) -> str | None:
    """Return the planned site of a product with this parameter, None where there is none."""
    if parameter is None:
        return None
    site = site_of(parameter)
    # A tied weight has the name under which Dynamo met it first; the running module tells which use this is.
    running = parameters.running_module(node)
    if site not in parameters.sites or (running in parameters.sites and parameters.is_weight_of(running, parameter)):
        site = running
    return site if site in routes else None


def _tell_unreached(parameters: Parameters, routes: Mapping[str, SiteKernels], found: Sequence[str]) -> None:
    """Name the sites whose weight is in this graph and whose product is not one that can be rerouted."""
    # Of a weight that is computed there is what it is computed from.
    # A table of which this graph takes rows has its product, the scores of all rows, in another graph.
    own = [name for node, name in parameters.names.items() if not is_looked_up(node)]
    names = {each for name in own for each in (name, name.partition(".parametrizations.")[0])}
    here = set(map(site_of, names))
    for site in sorted((here & routes.keys()) - set(found)):
        log.warning("%s is planned in FP8, but its product in this graph is of a form that stays as written", site)
