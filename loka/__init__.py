"""LoKA: FP8 where it usually fails. Probe a training loop, read what is safe, plan, convert.

Four stages, one database between them:

    with loka.probe(model, "run.db"): ...                         # probes/    what FP8 would do to every GEMM
    loka report run.db                                            # reports/   what is safe, and how sure that is
    plan = loka.plan("run.db", bound=loka.Bound(row_error=0.05))  # dispatch/  the fastest admissible kernel, and why
    loka.convert(model, plan)                                     #            or torch.compile(backend="loka", ...)
    loka.mods.apply(model, [...])                                 # mods/      rewrites that widen what is safe

Names are imported when they are first used, so that `import loka` costs next to nothing and touches no device.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any, Final

from loka.version import VERSION as __version__

if TYPE_CHECKING:
    from loka import mods
    from loka.bounds import Bound
    from loka.dispatch.deciding.plan import Plan
    from loka.dispatch.deciding.planner import plan
    from loka.dispatch.freezing.freeze import freeze
    from loka.dispatch.monitoring.monitor import monitor
    from loka.dispatch.running.convert import convert, revert
    from loka.dispatch.running.executions import kernel_executions
    from loka.dispatch.running.transformers_experts import register_experts
    from loka.errors import LokaError, LokaWarning
    from loka.probes.routing.recorder import trace_routing
    from loka.probes.sampling.session import probe
    from loka.reports.advise.report import advise

__all__ = [
    "Bound",
    "LokaError",
    "LokaWarning",
    "Plan",
    "__version__",
    "advise",
    "convert",
    "freeze",
    "kernel_executions",
    "mods",
    "monitor",
    "plan",
    "probe",
    "register_experts",
    "revert",
    "trace_routing",
]

_HOMES: Final[dict[str, str]] = {
    "Bound": "loka.bounds",
    "LokaError": "loka.errors",
    "LokaWarning": "loka.errors",
    "Plan": "loka.dispatch.deciding.plan",
    "advise": "loka.reports.advise.report",
    "convert": "loka.dispatch.running.convert",
    "freeze": "loka.dispatch.freezing.freeze",
    "kernel_executions": "loka.dispatch.running.executions",
    "monitor": "loka.dispatch.monitoring.monitor",
    "plan": "loka.dispatch.deciding.planner",
    "probe": "loka.probes.sampling.session",
    "register_experts": "loka.dispatch.running.transformers_experts",
    "revert": "loka.dispatch.running.convert",
    "trace_routing": "loka.probes.routing.recorder",
}

logging.getLogger("loka").addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name == "mods":
        return importlib.import_module("loka.mods")
    if name not in _HOMES:
        raise AttributeError(f"module 'loka' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
