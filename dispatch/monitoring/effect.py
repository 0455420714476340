"""How a change of kernels takes effect while a training goes on: at the next step, in eager and in compiled code.

A converted model reads its kernels from its routes; compiled code of it is guarded on them. What the `loka` backend
compiled holds its kernels for good: the change is kept here, by the plan, for the backend to read when it compiles, and
exactly the graphs that it made of this plan are dropped, each of which is compiled once more when it is next called.
"""

import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import nn

from loka.dispatch.deciding.by_rows import kernels_of
from loka.dispatch.deciding.plan import Plan
from loka.dispatch.monitoring.guard import Key
from loka.dispatch.running.convert import routes_of
from loka.dispatch.running.linear import HIGH_PRECISION, load

log: Final = logging.getLogger("loka.dispatch")

# By the plan's hash: kernels that are not the planned ones any more, and the graphs that were compiled of the plan.
_changed: Final[dict[str, dict[Key, str]]] = {}
_graphs: Final[dict[str, set[Any]]] = {}

# Graphs that were dropped still count towards Dynamo's limit of 8 for one piece of code, at which it gives up: at so
# many all graphs of that code go, those of other models of the same class included.
_MOST_DROPPED: Final[int] = 4


def put_into_effect(model: nn.Module, plan: Plan, changes: Mapping[Key, str]) -> None:
    """Have products, given by site and pass, run on other kernels from here on. Raises KernelError for a bad one."""
    for kernel in (each for name in changes.values() for each in kernels_of(name)):
        if kernel != HIGH_PRECISION:
            load(kernel)  # now: code that is traced cannot import it
    routes = [route for route in routes_of(model) if any(site == route.site for site, _ in changes)]
    for route in routes:
        for (site, product), kernel in changes.items():
            if site == route.site:
                route.kernels = route.kernels.with_kernel(product, kernel)
    if routes:
        _drop(lambda entry: "_loka_routes" in str(entry.guard_manager))
        return
    _changed.setdefault(plan.hash, {}).update(changes)
    graphs = _graphs.pop(plan.hash, set())
    _drop(lambda entry: entry.compile_id in graphs)


def changed_kernels(plan: Plan) -> Mapping[Key, str]:
    """Return the products of a plan that compiled code is to run on other kernels than planned, with these."""
    return _changed.get(plan.hash, {})


def note_graph(plan: Plan) -> None:
    """Remember that the graph that is being compiled holds the kernels of this plan."""
    compiled = sys.modules["torch._guards"].CompileContext.current_compile_id()
    if compiled is not None:
        _graphs.setdefault(plan.hash, set()).add(compiled)


def _drop(which: Callable[[Any], bool]) -> None:
    """Drop compiled graphs: each is compiled once more when it is next called. The others stay."""
    if "torch._dynamo.convert_frame" not in sys.modules:
        return  # nothing has been compiled
    try:
        dropped = _drop_entries(which)
    except (ImportError, AttributeError, TypeError) as error:
        log.warning("this torch lets go of compiled graphs only as a whole (%s): all of them are compiled again", error)
        sys.modules["torch._dynamo"].reset()
        return
    log.info("%d compiled graphs are dropped, since kernels of their plan have changed", dropped)


def _drop_entries(which: Callable[[Any], bool]) -> int:
    """Drop entries of Dynamo's caches, as Dynamo does when an object that one is guarded on goes away."""
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code
    from torch._dynamo.convert_frame import input_codes
    from torch._dynamo.guards import DeletedGuardManagerWrapper

    dropped = 0
    for reference in tuple(input_codes.seen):
        code = reference()
        if code is None:
            continue
        entries = _debug_get_cache_entry_list(code)
        live = [entry for entry in entries if not isinstance(entry.guard_manager, DeletedGuardManagerWrapper)]
        gone = [entry for entry in live if which(entry)]
        for entry in gone:
            state = entry.guard_manager.extra_state
            if state is not None:
                state.invalidate(entry, DeletedGuardManagerWrapper("loka: a kernel of its plan has changed"))
        dropped += len(gone)
        if gone and len(entries) - len(live) + len(gone) >= _MOST_DROPPED:
            reset_code(code)
    return dropped
