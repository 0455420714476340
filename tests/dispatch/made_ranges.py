"""Products whose calls have few rows or many, times that ask for two kernels, and plans that name both."""

from dataclasses import replace

from torch import nn

from loka.dispatch.deciding.by_rows import by_rows
from loka.dispatch.deciding.decide import Decision
from loka.dispatch.deciding.plan import Plan
from loka.dispatch.deciding.planner import PlanOptions, decide_all
from loka.dispatch.measuring.profile import DeviceProfile
from loka.kernel_registry.spec import KernelSpec
from tests.dispatch.made_conversion import decision, plan_for
from tests.dispatch.made_evidence import BOUND, HOPPER, built_in, run
from tests.dispatch.test_times_over_rows import AT, DECODES, times_of, varied

BASE, ROW, TENSOR = "torch.mm.bf16", "torch.scaled_mm.rowwise", "torch.scaled_mm.tensorwise"
# A second kernel under a recipe that is there: it reads the weight in the same form as the first.
OTHER_ROW = KernelSpec(name="a.linear.rowwise", op="linear", recipe="rowwise", implementation="x:y")

__all__ = [
    "AT",
    "BASE",
    "DECODES",
    "OTHER_ROW",
    "ROW",
    "TENSOR",
    "few_and_many",
    "made_by",
    "plan_of",
    "planned",
    "varied",
]


def made_by(evidences, times, *, registry=None, bound=BOUND, experts=None, **options):
    """Decide products, each with its times, as a plan does, for the device that the times are said to be of."""
    known = [each for evidence, own in zip(evidences, times, strict=True) for each in times_of(evidence, own)]
    profile = DeviceProfile(label="x", source="example", device=HOPPER, environment={}, times=tuple(known))
    evidence = replace(run(*evidences), experts=experts or {})
    chosen = PlanOptions.of(device="cpu", device_profile=profile, **options)
    return decide_all(evidence, bound, registry or built_in(), known, chosen)


def planned(calls, times, **changes) -> Decision:
    """Decide one forward product whose calls are distributed so."""
    return made_by([varied(calls)], [times], **changes).decisions[0]


def few_and_many(
    site: str, few: str | None, many: str | None, most: int = 16, *, op: str = "linear", dtype: str = "float32"
) -> Decision:
    """A decision on fprop: recipes for up to `most` rows and for more; None is high precision."""
    kernels = [f"emulated.{op}.{recipe}" if recipe else "" for recipe in (few, many)]
    base = "torch.grouped_mm.fp32" if op == "grouped_linear" else "torch.mm.fp32"
    parts = []
    for recipe, kernel, (low, high) in zip((few, many), kernels, ((1, most), (most + 1, 4096)), strict=True):
        one = decision(site, "fprop", recipe, kernel=kernel or base, dtype=dtype)
        request = replace(one.request, op=op, batch=2 if op == "grouped_linear" else 1, m=low)
        parts.append(replace(one, request=request, baseline=base, m_min=low, m_max=high, share=0.5))
    recipes = dict.fromkeys(recipe for recipe in (few, many) if recipe)
    return replace(
        parts[0],
        m_max=4096,
        kernel=by_rows(parts[0].kernel, most, parts[1].kernel),
        recipe=", ".join(recipes),
        share=None,
        ranges=tuple(parts),
    )


def plan_of(model: nn.Module, *decisions: Decision) -> Plan:
    return replace(plan_for(model, {}), decisions=decisions)
