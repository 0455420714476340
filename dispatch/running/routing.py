"""What a plan means for the code that runs it: per site, the kernel of each pass; and whether they can run here.

A plan may come from another device. A kernel that is not available here is an error, unless the caller asks for
emulation: then the emulated kernel of the same recipe stands in, with the same numerics and none of the speed.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

import torch
from torch import nn

from loka.dispatch.deciding.by_rows import by_rows
from loka.dispatch.deciding.decide import Decision
from loka.dispatch.deciding.plan import Plan
from loka.dispatch.running.grouped import NONE_KEPT, Kept, KeptByPass
from loka.dispatch.running.linear import HIGH_PRECISION, load
from loka.errors import PlanError, nearest
from loka.formats import PASSES, Pass
from loka.hardware import DeviceInfo, device_info
from loka.kernel_registry.registry import default_registry
from loka.kernel_registry.spec import GemmRequest, Op

log: Final = logging.getLogger("loka.dispatch")


@dataclass(frozen=True, slots=True)
class SiteKernels:
    """Names of the kernels of one site, in the order of `dispatch.running.linear`; "" is high precision.

    That of fprop may be one for few rows and one for many (`dispatch.deciding.by_rows`).

    All are of one op: a product of the site that is written as another one does not go to them. `kept` are, pass by
    pass, the experts of a layer whose products stay in high precision.
    """

    fprop: str = HIGH_PRECISION
    dgrad: str = HIGH_PRECISION
    wgrad: str = HIGH_PRECISION
    op: Op = "linear"
    kept: KeptByPass = NONE_KEPT

    @property
    def planned(self) -> bool:
        """Whether any pass leaves high precision."""
        return (self.fprop, self.dgrad, self.wgrad) != (HIGH_PRECISION,) * 3

    def with_kernel(self, product: Pass, kernel: str) -> "SiteKernels":
        """Return the same with another kernel for one pass."""
        changed = {"fprop": self.fprop, "dgrad": self.dgrad, "wgrad": self.wgrad, product: kernel}
        return replace(self, fprop=changed["fprop"], dgrad=changed["dgrad"], wgrad=changed["wgrad"])

    def of_expert(self, expert: int | None) -> "SiteKernels":
        """Return the kernels of one expert's product, where each is a product of its own; None: it is not known whose.

        What may be a kept expert's is treated as one.
        """
        if not any(self.kept):
            return self
        kept = (bool(each) if expert is None else expert in each for each in self.kept)
        fprop, dgrad, wgrad = (HIGH_PRECISION if out else name for out, name in zip(kept, self.as_tuple(), strict=True))
        return replace(self, fprop=fprop, dgrad=dgrad, wgrad=wgrad, kept=NONE_KEPT)

    def kept_among(self, first: int, count: int) -> KeptByPass:
        """Return which of `count` experts stay in high precision; the first of them is the model's expert `first`."""
        if not any(self.kept):
            return NONE_KEPT
        fprop, dgrad, wgrad = (tuple(each - first for each in kept if 0 <= each - first < count) for kept in self.kept)
        return fprop, dgrad, wgrad

    def as_tuple(self) -> tuple[str, str, str]:
        """Return (fprop, dgrad, wgrad)."""
        return self.fprop, self.dgrad, self.wgrad


def site_kernels(
    plan: Plan,
    device: torch.device,
    *,
    emulate: bool = False,
    changed: Mapping[tuple[str, Pass], str] = MappingProxyType({}),
) -> dict[str, SiteKernels]:
    """Return the kernels of every site that leaves high precision in some pass.

    `changed` names those that products, given by site and pass, run on since, in place of the planned ones.
    Raises PlanError when a kernel cannot run here or serve its product, KernelError when it cannot be loaded.
    """
    here = device_info(device)
    names: dict[str, dict[str, str]] = {}
    kept: dict[str, dict[Pass, Kept]] = {}
    ops: dict[str, Op] = {}
    high: dict[str, str] = {}
    for decision in plan.decisions:
        request = decision.request
        op = ops.setdefault(request.site, request.op)  # of the forward product, which comes first
        # Gradients of a layer with its norm and activation in one kernel are products of a linear layer.
        if decision.recipe is None and request.op == "linear_norm_act":
            high[request.site] = decision.kernel
        if decision.recipe is None or request.op not in (op, _gradients_of(op)):
            continue
        low = [part for part in decision.parts if part.recipe is not None]
        since = changed.get((request.site, request.product))
        if since is not None:
            names.setdefault(request.site, {})[request.product] = since
            continue
        kernel = _kernel_of(decision, here, emulate=emulate)
        names.setdefault(request.site, {})[request.product] = kernel
        kept.setdefault(request.site, {})[request.product] = low[0].kept_experts  # of ranges, both keep the same
        _tell(request.site, request.product, kernel, decision.why)
    for site in high.keys() & names.keys():
        names[site].setdefault("fprop", _fused_baseline(high[site], here))
    return {
        site: SiteKernels(**kernels, op=ops[site], kept=_by_pass(kept.get(site, {}))) for site, kernels in names.items()
    }


def _fused_baseline(kernel: str, here: DeviceInfo) -> str:
    """Return the kernel that a layer with norm and activation runs on in high precision here, loaded; "": op by op."""
    registry = default_registry()
    spec = registry.get(kernel) if kernel in registry else None
    if spec is None or not spec.is_baseline or not spec.fused or registry.unavailable(spec, here):
        return HIGH_PRECISION
    load(kernel)
    return kernel


def _gradients_of(op: Op) -> Op:
    return "linear" if op == "linear_norm_act" else op


def _kernel_of(decision: Decision, here: DeviceInfo, *, emulate: bool) -> str:
    """Return what a decision for FP8 runs on here, loaded; the name of two kernels where it has ranges of rows."""
    names = []
    for part in decision.parts:
        kernel = HIGH_PRECISION
        if part.recipe is not None:
            kernel = runnable(part.kernel, part.recipe, part.request, here, emulate=emulate)
            load(kernel)  # now, where it can be refused, and not in the middle of a step
        names.append(kernel)
    if decision.ranges is None or len(set(names)) == 1:  # one emulated kernel may stand in for both
        return names[0]
    return by_rows(names[0], decision.ranges[0].m_max, names[1])


def _by_pass(kept: Mapping[Pass, Kept]) -> KeptByPass:
    fprop, dgrad, wgrad = (kept.get(each, ()) for each in PASSES)
    return fprop, dgrad, wgrad


# What was logged: a plan serves many graphs, each of which asks what it means.
_told: set[tuple[str, ...]] = set()


def _tell(*decision: str) -> None:
    """Log a decision, once per process: its site, pass, kernel and reason."""
    if decision not in _told:
        _told.add(decision)
        log.info("%s %s: %s (%s)", *decision)


def runnable(kernel: str, recipe: str, request: GemmRequest, here: DeviceInfo, *, emulate: bool) -> str:
    """Return the kernel, or the emulated one of its recipe; raise PlanError where neither serves the product here.

    A layer with norm and activation is served by kernels of the op `linear`, too: both then follow the product.
    """
    if request.op == "linear_norm_act" and kernel in default_registry():
        request = replace(request, op=_product_op(default_registry().get(kernel).op))
    reason = _why_not(kernel, recipe, request, here)
    if reason is None:
        return kernel
    stand_ins = [each for each in _stand_ins(kernel, recipe, request) if _why_not(each, recipe, request, here) is None]
    if not emulate or not stand_ins:
        raise PlanError(
            f"The plan runs {kernel} on {request.site}.{request.product}, and on {here} it cannot: {reason}. Make a "
            "plan for this device with `loka plan`, or ask for emulate=True to run the same recipes in emulated "
            "numerics, without their speed."
        )
    log.info("%s cannot run on %s (%s): %s stands in", kernel, here, reason, stand_ins[0])
    return stand_ins[0]


def _stand_ins(kernel: str, recipe: str, request: GemmRequest) -> tuple[str, ...]:
    """Name the emulated kernels of a recipe, the one first that shares casts between passes where the planned does."""
    registry = default_registry()
    known = registry.get(kernel) if kernel in registry else None
    ops = ("linear_layer", request.op) if known is not None and known.op == "linear_layer" else (request.op,)
    return tuple(f"emulated.{op}.{recipe}" for op in ops)


def _product_op(op: Op) -> Op:
    return "linear" if op in ("linear", "linear_layer") else "linear_norm_act"


def _why_not(kernel: str, recipe: str, request: GemmRequest, here: DeviceInfo) -> str | None:
    """Return why a kernel cannot serve a product under a recipe here, or None. Plans come from elsewhere."""
    registry = default_registry()
    if kernel not in registry:
        return f"it is not among the known kernels.{nearest(kernel, registry.names())}".removesuffix(".")
    spec = registry.get(kernel)
    if spec.recipe != recipe:
        return f"its recipe here is {spec.recipe}, not {recipe}"
    if spec.op == "linear_norm_act" and not spec.fused:
        return "it has no form in which a layer runs it, with a bias and a backward pass"
    return registry.unavailable(spec, here) or registry.cannot(spec, request, here)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter, the CPU when it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
