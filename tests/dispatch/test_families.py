"""Layers that read one input decided together: when one kernel for all of them takes over, and how that is timed."""

import math
from dataclasses import replace

import pytest

from loka.dispatch.deciding.options import PlanOptions
from loka.dispatch.deciding.planner import decide_all
from loka.dispatch.measuring.draws import Source
from loka.dispatch.measuring.families import FamilyShape, family_request, family_shapes, measure_families
from loka.dispatch.measuring.layers import LayerShape, passes_of
from loka.dispatch.measuring.measure import timing_of
from loka.dispatch.measuring.profile import DeviceProfile
from loka.hardware import device_info
from loka.kernel_registry.registry import default_registry
from loka.kernel_registry.spec import GemmRequest
from loka.timing import Measurement
from tests.dispatch.made_evidence import BOUND, HOPPER, built_in, product, recipe, run, timing

BASE, APART, TOGETHER = "torch.mm.bf16", "torch.scaled_mm.tensorwise", "torch.linear_layer.tensorwise"
M, K = 2048, 256
OUTPUTS = {"q": 768, "k": 256, "v": 128}


def layer(site, n, **changes):
    sizes = {"fprop": (M, n, K), "dgrad": (M, K, n), "wgrad": (n, K, M)}
    return [
        product(site, **{"product": each, "m": m, "m_min": m, "m_max": m, "n": n_, "k": k, **changes.get(each, {})})
        for each, (m, n_, k) in sizes.items()
    ]


def attention(**changes):
    return [each for site, n in OUTPUTS.items() for each in layer(site, n, **changes.get(site, {}))]


def planned(products, family=None, *, together=None, families=(("q", "k", "v"),)):
    """Every pass 20 us in high precision, 12 us in FP8; a layer's passes together as given; a family as given."""
    times = []
    for each in {(p.product, p.m, p.n, p.k): p for p in products}.values():
        times += [timing(BASE, 20.0, 0.1, of=each, device=HOPPER), timing(APART, 12.0, 0.1, of=each, device=HOPPER)]
        if each.product == "fprop" and together is not None:
            times.append(timing(TOGETHER, together, 0.1, of=each, device=HOPPER))
    if family is not None:
        first = next(each for each in products if (each.site, each.product) == ("q", "fprop"))
        one = timing(TOGETHER, family, 0.1, of=first, device=HOPPER)
        times.append(replace(one, n=sum(OUTPUTS.values()), batch=len(OUTPUTS)))
    profile = DeviceProfile(label="made", source="measured", device=HOPPER, environment={}, times=tuple(times))
    evidence = replace(run(*products), families=tuple(families))
    return decide_all(evidence, BOUND, built_in(), profile.times, PlanOptions(device="cpu", profile=profile))


def kernels(plan):
    return {each.kernel for each in plan.decisions}


def test_a_family_takes_over_where_it_is_faster_than_its_layers():
    plan = planned(attention(), family=80.0)  # the passes apart: 9 x 12 us
    assert kernels(plan) == {TOGETHER}
    assert math.fsum(each.time_us for each in plan.decisions) == pytest.approx(80.0)
    assert all("q and k, v, which read one input" in each.why for each in plan.decisions)
    assert all("80 us against 108 us" in each.why for each in plan.decisions)


def test_a_family_is_compared_with_what_its_layers_gain_by_themselves():
    assert kernels(planned(attention(), together=28.0)) == {TOGETHER}  # 84 us
    assert "which read one input" not in planned(attention(), together=28.0, family=83.9).decision("q", "fprop").why
    plan = planned(attention(), together=28.0, family=70.0)
    assert math.fsum(each.time_us for each in plan.decisions) == pytest.approx(70.0)


@pytest.mark.parametrize(
    ("products", "families"),
    [
        (attention(), ()),
        (attention(), (("q", "somewhere"),)),
        (attention(k={"dgrad": {"recipes": (recipe("tensorwise", 0.2, low=0.18),)}}), (("q", "k", "v"),)),
        (layer("q", 768), (("q", "k", "v"),)),
    ],
    ids=["not known to be one", "of others", "one pass of one member above the bound", "alone"],
)
def test_what_is_no_family_is_decided_layer_by_layer(products, families):
    plan = planned(products, family=60.0, families=families)
    assert TOGETHER not in kernels(plan)
    assert APART in kernels(plan)


def test_the_order_of_products_makes_no_difference():
    products = attention()
    assert planned(products, family=80.0).hash == planned(products[::-1], family=80.0).hash


# --- timing ---


def shape(n, m=32, k=24):
    request = GemmRequest(site=f"n{n}", product="fprop", op="linear", m=m, n=n, k=k, dtype="float32")
    return LayerShape(request=request, forward=Source(), backward=Source())


def known(members, name="emulated.linear_layer.tensorwise"):
    return [
        timing_of(name, each.request, device_info(), Measurement(median_us=9.0, spread_us=0.1, repetitions=9), "normal")
        for each in members
    ]


def test_a_family_is_timed_once_its_members_are():
    family = FamilyShape(members=(shape(16), shape(8), shape(40)))
    registry = default_registry()
    times = known(family.members)
    (found,) = measure_families([family], registry, "cpu", budget_s=0.2, known=times)
    assert found.kernel == "emulated.linear_layer.tensorwise"
    assert (found.product, found.batch, found.m, found.n, found.k) == ("fprop", 3, 32, 64, 24)
    assert found.median_us > 0
    assert measure_families([family], registry, "cpu", budget_s=0.2, known=times[:2]) == []
    assert measure_families([family], registry, "cpu", budget_s=0.2, known=[*times, found]) == []


def test_families_are_those_of_the_run_whose_members_are_layers():
    evidence = run(*attention(), *layer("alone", 64), *layer("half", 32)[:2])
    evidence = replace(evidence, families=(("q", "k", "v", "half"), ("alone", "half")))
    (found,) = family_shapes(evidence)
    assert [each.request.n for each in found.members] == list(OUTPUTS.values())
    assert found.request == family_request([each.request for each in found.members])
    assert (found.request.n, found.request.batch) == (sum(OUTPUTS.values()), 3)


def test_a_request_of_a_family_is_of_its_common_input():
    requests = [shape(16).request, shape(8).request]
    joined = family_request(requests)
    assert [each.k for each in passes_of(joined)] == [24, 24, 32]
