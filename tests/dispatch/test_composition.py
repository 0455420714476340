"""Passes of a layer decided together: when a kernel of all three takes over, and what is told when it does not."""

import math
from dataclasses import replace

import pytest

from loka.bounds import Bound
from loka.dispatch.deciding.options import PlanOptions
from loka.dispatch.deciding.planner import decide_all
from loka.dispatch.measuring.draws import Source
from loka.dispatch.measuring.layers import LayerShape, layer_shapes, layers_of, measure_layers, passes_of
from loka.dispatch.measuring.profile import DeviceProfile
from loka.formats import PASSES
from loka.hardware import DeviceInfo
from loka.kernel_registry.registry import default_registry
from loka.kernel_registry.spec import GemmRequest
from tests.dispatch.made_evidence import BOUND, HOPPER, built_in, product, recipe, run, timing

BASE, APART, TOGETHER = "torch.mm.bf16", "torch.scaled_mm.tensorwise", "torch.linear_layer.tensorwise"
M, N, K = 2048, 768, 256
SIZES = {"fprop": (M, N, K), "dgrad": (M, K, N), "wgrad": (N, K, M)}


def layer(site="up", **changes):
    """The three products of one layer."""
    products = []
    for each, (m, n, k) in SIZES.items():
        fields = {"product": each, "m": m, "m_min": m, "m_max": m, "n": n, "k": k, **changes.get(each, {})}
        products.append(product(site, **fields))
    return products


def planned(products, *, base=20.0, apart=12.0, together=30.0, spread=0.1, bound=BOUND, **options):
    """Plan with the same times for every pass, and one for all of them together; None: not timed."""
    times = []
    for each in {(p.product, p.m, p.n, p.k): p for p in products}.values():
        times += [
            timing(BASE, base, spread, of=each, device=HOPPER),
            timing(APART, apart, spread, of=each, device=HOPPER),
        ]
        if each.product == "fprop" and together is not None:
            times.append(timing(TOGETHER, together, spread, of=each, device=HOPPER))
    profile = DeviceProfile(label="made", source="measured", device=HOPPER, environment={}, times=tuple(times))
    chosen = PlanOptions(device="cpu", profile=profile, **options)
    return decide_all(run(*products), bound, built_in(), profile.times, chosen)


def kernels(plan):
    return [plan.decision("up", each).kernel for each in PASSES]


def told(plan, kernel=TOGETHER, which="fprop"):
    (found,) = [each for each in plan.decision("up", which).rejected if each.kernel == kernel]
    return found


def test_a_kernel_of_all_passes_takes_over_where_it_is_faster_than_the_passes_apart():
    plan = planned(layer())  # 30 us together, 36 us apart, 60 us in high precision
    assert kernels(plan) == [TOGETHER] * 3
    decisions = [plan.decision("up", each) for each in PASSES]
    assert math.fsum(each.time_us for each in decisions) == pytest.approx(30.0)
    assert all("casts shared: 30 us against 36 us" in each.why for each in decisions)
    assert all(each.recipe == "tensorwise" and each.error_upper == 0.04 for each in decisions)
    for each in PASSES:
        beaten = told(plan, APART, each)
        assert (beaten.code, beaten.time_us) == ("slower", 12.0)
        assert "the best kernel of this pass by itself, 12 us" in beaten.reason


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"together": 40.0}, "slower", "40 us for all passes against 36 us of the best kernels apart"),
        ({"together": 35.8}, "tie", "35.8 us for all passes against 36 us"),
        ({"together": 58.0, "apart": 19.9}, "no_gain", "1.03x the speed of the baselines"),
        ({"together": None}, "untimed", "all passes together were never timed"),
        ({"together": None, "apart": 45.0}, "no_gain", "sharing casts saves half at most"),
    ],
)
def test_what_is_not_faster_is_told_why(changes, code, words):
    plan = planned(layer(), **changes)
    assert TOGETHER not in kernels(plan)
    assert told(plan).code == code
    assert words in told(plan).reason


def test_every_pass_has_to_be_within_its_own_limit():
    bad = {"recipes": (recipe("rowwise", 0.03), recipe("tensorwise", 0.2, low=0.18))}
    plan = planned(layer(dgrad=bad))
    assert kernels(plan)[1] == BASE
    assert TOGETHER not in kernels(plan)
    assert told(plan).code == "over_bound"
    assert told(plan).reason.startswith("dgrad: ")
    per_site = planned(layer(dgrad=bad), bound=Bound(row_error=0.3))
    assert kernels(per_site) == [TOGETHER] * 3


def test_a_pass_that_gains_nothing_by_itself_may_gain_with_the_others():
    products = layer()
    plan = planned(products, apart=19.5, together=40.0)  # apart 1.03 times the baseline: no gain
    assert kernels(plan) == [TOGETHER] * 3
    assert all(each.recipe == "tensorwise" for each in (plan.decision("up", p) for p in PASSES))


@pytest.mark.parametrize(
    "products",
    [
        layer()[:2],  # no weight gradient
        layer(wgrad={"calls": 2.0}),  # run more often than the others
        layer(dgrad={"k": 512}),  # of another layer under the same name
    ],
)
def test_what_is_no_layer_is_decided_pass_by_pass(products):
    plan = planned(products)
    assert {each.kernel for each in plan.decisions} == {APART}


def test_the_filter_and_an_assumption_leave_layers_alone():
    assert kernels(planned(layer(), filter=["up"])) == [TOGETHER] * 3
    assert kernels(planned(layer(), filter=lambda site: False)) == [BASE] * 3
    assumed = decide_all(
        run(*layer()), Bound(row_error=0.05), built_in(), (), PlanOptions(device="cpu", assume_speedup=1.3)
    )
    assert {each.kernel for each in assumed.decisions} <= {"emulated.linear.rowwise", "emulated.linear.tensorwise"}


def test_the_order_of_products_and_times_makes_no_difference():
    products = [*layer("up"), *layer("down")]
    first, second = planned(products), planned(products[::-1])
    assert first.hash == second.hash
    assert {each.kernel for each in first.decisions} == {TOGETHER}


# --- timing ---


def test_layers_are_the_sites_with_three_products_that_fit():
    evidence = run(*layer("up"), *layer("down"), *layer("half")[:2], *layer("odd", wgrad={"calls": 3.0}))
    assert [next(iter(each.values())).site for each in layers_of(evidence)] == ["down", "up"]
    (shape,) = layer_shapes(evidence)  # one shape, two sites
    assert (shape.request.m, shape.request.n, shape.request.k) == (M, N, K)
    assert [(each.product, each.m, each.n, each.k) for each in passes_of(shape.request)] == [
        (name, *sizes) for name, sizes in SIZES.items()
    ]


def small_shape():
    request = GemmRequest(site="up", product="fprop", op="linear", m=32, n=16, k=24, dtype="float32")
    return LayerShape(request=request, forward=Source(), backward=Source())


def known(shape, apart_us):
    """Times of the passes apart, and of the baselines, 10 us each."""
    from loka.dispatch.measuring.measure import timing_of
    from loka.hardware import device_info
    from loka.timing import Measurement

    names = {"torch.mm.fp32": 10.0, "emulated.linear.tensorwise": apart_us, "emulated.linear.blockwise": 100.0}
    return [
        timing_of(name, each, device_info(), Measurement(median_us=us, spread_us=0.1, repetitions=9), "normal")
        for name, us in names.items()
        for each in passes_of(shape.request)
    ]


def test_a_layer_kernel_is_timed_where_its_passes_apart_leave_a_chance():
    shape, registry = small_shape(), default_registry()
    found = measure_layers([shape], registry, "cpu", budget_s=0.2, known=known(shape, 15.0))
    assert [each.kernel for each in found] == ["emulated.linear_layer.tensorwise"]
    assert found[0].median_us > 0
    assert (found[0].product, found[0].m, found[0].n, found[0].k) == ("fprop", 32, 16, 24)
    assert measure_layers([shape], registry, "cpu", budget_s=0.2, known=known(shape, 21.0)) == []
    assert measure_layers([shape], registry, "cpu", budget_s=0.2) == []
    assert measure_layers([shape], registry, "cpu", budget_s=0.2, known=[*known(shape, 15.0), *found]) == []


def test_a_layer_kernel_that_fails_is_remembered(monkeypatch):
    from loka.kernel_registry import emulated

    def fails(*_):
        raise RuntimeError("no such library")

    monkeypatch.setattr(emulated, "quantise", fails)
    shape, registry = small_shape(), built_in()
    assert measure_layers([shape], registry, "cpu", budget_s=0.2, known=known(shape, 15.0)) == []
    here = DeviceInfo(type="cpu", name=known(shape, 1.0)[0].device.removeprefix("cpu (").removesuffix(")"))
    spec = registry.get("emulated.linear_layer.tensorwise")
    assert "no such library" in registry.cannot(spec, replace(shape.request, site="elsewhere"), here)
