"""Norm and activation in the kernel of their product: when a plan chooses it, what it says, and what it weighs."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import loka
from loka.bounds import Bound
from loka.dispatch.deciding.epilogue import epilogue_shapes
from loka.dispatch.deciding.options import PlanOptions
from loka.dispatch.deciding.plan import Plan
from loka.dispatch.deciding.planner import decide_all
from loka.dispatch.measuring.measure import measure_shapes
from loka.dispatch.measuring.profile import DeviceProfile
from loka.dispatch.monitoring.ladder import ladders
from loka.dispatch.running.routing import site_kernels
from loka.formats import PASSES
from loka.hardware import device_info
from loka.kernel_registry.builtin import KERNELS
from loka.kernel_registry.registry import default_registry
from loka.mods import BlockNorm, FuseEpilogue, HardSwish
from loka.probes.capturing.row_counts import RowCount, RowCounts
from loka.probes.judging.evidence import load_evidence
from tests.dispatch.made_evidence import AMPERE, BOUND, HOPPER, SAFE, built_in, product, recipe, run, timing
from tests.dispatch.test_loss_budget import costing

BASE, APART, TOGETHER = "torch.mm.bf16", "torch.scaled_mm.rowwise", "torch.linear_layer.tensorwise"
UNFUSED, FUSED_HIGH = "torch.native.linear_norm_act", "triton.native.linear_norm_act"
FUSED, OTHER = "triton.linear_norm_act.rowwise", "triton.linear_norm_act.tensorwise"
M, N, K = 2048, 768, 256
SIZES = {"fprop": (M, N, K), "dgrad": (M, K, N), "wgrad": (N, K, M)}


def layer(site="up", passes=PASSES, **changes):
    """The products of one layer."""
    products = []
    for each in passes:
        m, n, k = SIZES[each]
        fields = {"product": each, "m": m, "m_min": m, "m_max": m, "n": n, "k": k, **changes.get(each, {})}
        products.append(product(site, **fields))
    return products


# Of fprop: 20 us in high precision and 15 behind it; 12 in FP8, which with 15 is 27; 18 in one kernel.
TIMES = {BASE: 20.0, APART: 12.0, UNFUSED: 35.0, FUSED: 18.0}


def profile_of(products, times, spread=0.1, together=None):
    made = []
    for each in {(p.product, p.m, p.n, p.k): p for p in products}.values():
        own = times if each.product == "fprop" else {BASE: 20.0, APART: 12.0, "torch.scaled_mm.tensorwise": 12.5}
        made += [timing(name, us, spread, of=each, device=HOPPER) for name, us in own.items()]
        if each.product == "fprop" and together is not None:
            made.append(timing(TOGETHER, together, spread, of=each, device=HOPPER))
    return DeviceProfile(label="made", source="measured", device=HOPPER, environment={}, times=tuple(made))


def planned(times=TIMES, *, products=None, sites=("up",), bound=BOUND, together=None, families=(), registry=None):
    """Plan with these times of fprop, and 20 us in high precision and 12 in FP8 for each gradient."""
    products = layer() if products is None else products
    profile = profile_of(products, times, together=together)
    evidence = replace(run(*products), epilogues=tuple(sites), families=tuple(families))
    options = PlanOptions(device="cpu", profile=profile)
    return decide_all(evidence, bound, registry or built_in(), profile.times, options)


def told(plan, kernel, site="up"):
    (found,) = [each for each in plan.decision(site, "fprop").rejected if each.kernel == kernel]
    return found


def test_a_fused_kernel_takes_the_place_of_a_product_and_what_follows_it():
    plan = planned()
    chosen = plan.decision("up", "fprop")
    assert (chosen.kernel, chosen.recipe, chosen.request.op) == (FUSED, "rowwise", "linear_norm_act")
    assert (chosen.time_us, chosen.baseline, chosen.baseline_time_us) == (18.0, UNFUSED, 35.0)
    assert chosen.error_upper == plan.decision("up", "dgrad").error_upper == 0.03
    assert "norm and activation are in this kernel: 18 us against 27 us of torch.scaled_mm.rowwise" in chosen.why
    assert [plan.decision("up", each).kernel for each in PASSES[1:]] == [APART, APART]
    assert [plan.decision("up", each).request.op for each in PASSES[1:]] == ["linear", "linear"]
    beaten, baseline = told(plan, APART), told(plan, UNFUSED)
    assert (beaten.code, beaten.time_us) == ("slower", 27.0)
    assert "12 us; norm and activation behind it take 15 us more" in beaten.reason
    assert (baseline.code, baseline.time_us) == ("slower", 35.0)
    assert told(plan, OTHER).code == "untimed"
    assert told(plan, "emulated.linear_norm_act.rowwise").code == "untimed"
    assert "1 of 1 layers with norm and activation run all three in one kernel: 1 in FP8." in plan.notes
    assert Plan.parse(plan.text().encode(), "a plan") == plan


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({FUSED: 26.95}, "slower", "is not faster by more than the spread"),
        ({FUSED: 30.0}, "slower", "30 us with norm and activation, against 27 us of torch.scaled_mm.rowwise and both"),
        ({FUSED: 34.0}, "no_gain", "34 us with norm and activation, 1.03x the speed of torch.native"),
        ({FUSED: 26.5, FUSED_HIGH: 26.95}, "no_gain", "1.02x the speed of triton.native.linear_norm_act"),
        ({FUSED: None}, "untimed", "never timed at 2048x256x768 bfloat16 on this device"),
        ({UNFUSED: None}, "untimed", f"its baseline {UNFUSED} was never timed"),
    ],
)
def test_what_is_not_faster_is_told_why_and_the_rest_stays_as_it_was(changes, code, words):
    times = {name: us for name, us in {**TIMES, **changes}.items() if us is not None}
    plan, before = planned(times), planned(times, sites=())
    assert told(plan, FUSED).code == code
    assert words in told(plan, FUSED).reason
    for one, other in zip(plan.decisions, before.decisions, strict=True):
        assert replace(one, rejected=()) == replace(other, rejected=())
    kept = [each for each in plan.decision("up", "fprop").rejected if "linear_norm_act" not in each.kernel]
    assert kept == list(before.decision("up", "fprop").rejected)


def test_a_fused_kernel_may_gain_where_the_product_alone_does_not():
    plan = planned({**TIMES, APART: 19.9})
    assert plan.decision("up", "fprop").kernel == FUSED
    assert "against 35 us of torch.mm.bf16 and both" in plan.decision("up", "fprop").why


def test_of_two_fused_kernels_the_faster_one_is_taken_and_a_tie_goes_by_name():
    plan = planned({**TIMES, OTHER: 17.0})
    assert plan.decision("up", "fprop").kernel == OTHER
    plan = planned({**TIMES, OTHER: 18.1})
    assert plan.decision("up", "fprop").kernel == FUSED
    plan = planned({**TIMES, OTHER: 17.9, FUSED: 18.0})
    assert plan.decision("up", "fprop").kernel == FUSED


def test_the_error_of_the_product_decides_and_a_device_without_fp8_has_none():
    recipes = (recipe("rowwise", 0.2, low=0.18), recipe("tensorwise", 0.04))
    plan = planned(products=layer(fprop={"recipes": recipes}))
    assert plan.decision("up", "fprop").request.op == "linear"
    assert told(plan, FUSED).code == "over_bound"
    evidence = replace(run(*layer()), epilogues=("up",))
    old = decide_all(evidence, BOUND, built_in(), (), PlanOptions(device="cpu", profile=on(AMPERE)))
    assert told(old, FUSED).code == "unavailable"


def on(device):
    profile = profile_of(layer(), TIMES)
    times = tuple(replace(each, device=str(device)) for each in profile.times)
    return replace(profile, device=device, times=times)


def test_what_gradients_lose_with_their_shared_casts_is_weighed_in():
    together = layer()
    apart = planned(products=together, together=30.0)  # 18 + 12 + 12 against 30 + 15: fused
    assert apart.decision("up", "fprop").kernel == FUSED
    assert [apart.decision("up", each).kernel for each in PASSES[1:]] == [APART, APART]
    shared = planned(products=together, together=26.0)  # against 26 + 15
    assert {shared.decision("up", each).kernel for each in PASSES} == {TOGETHER}
    assert told(shared, FUSED).code == "slower"
    assert "with the gradients that share no casts with it" in told(shared, FUSED).reason


def test_a_family_is_fused_only_where_that_beats_the_casts_that_it_shares():
    products = [*layer("q"), *layer("k")]
    family = ("q", "k")

    def plan_with(joined_us):
        profile = profile_of(products, TIMES, together=33.0)
        joined = timing(TOGETHER, joined_us, 0.1, of=products[0], device=HOPPER, n=2 * N, batch=2)
        profile = replace(profile, times=(*profile.times, joined))
        evidence = replace(run(*products), epilogues=("k",), families=(family,))
        options = PlanOptions(device="cpu", profile=profile)
        return decide_all(evidence, BOUND, built_in(), profile.times, options)

    # q: 33. k fused: 18 + 24 = 42. Together: 75, against the family's time and the 15 behind k.
    shared, fused = plan_with(59.0), plan_with(62.0)
    assert {each.kernel for each in shared.decisions} == {TOGETHER}
    assert told(shared, FUSED, "k").code == "slower"
    assert fused.decision("k", "fprop").kernel == FUSED
    assert {fused.decision("q", each).kernel for each in PASSES} == {TOGETHER}
    assert math.fsum(fused.decision("q", each).time_us for each in PASSES) == pytest.approx(33.0)


def test_times_over_row_counts_are_compared_where_both_are_known():
    points = RowCounts(points=(RowCount(rows=64, weight=0.5), RowCount(rows=2048, weight=0.5)))
    (forward,) = layer(passes=("fprop",), fprop={"m_min": 64, "rows": points})
    times = []
    for rows, factor in ((64, 0.5), (2048, 1.0)):
        at = replace(forward, m=rows, rows=RowCounts())
        times += [timing(name, us * factor, 0.1, of=at, device=HOPPER) for name, us in TIMES.items()]
    evidence = replace(run(forward), epilogues=("up",))
    profile = DeviceProfile(label="made", source="measured", device=HOPPER, environment={}, times=tuple(times))
    options = PlanOptions(device="cpu", profile=profile)
    chosen = decide_all(evidence, BOUND, built_in(), profile.times, options).decision("up", "fprop")
    assert (chosen.kernel, chosen.time_us) == (FUSED, pytest.approx(13.5))
    assert [each.rows for each in chosen.times] == [64, 2048]
    fewer = [each for each in times if each.kernel != FUSED or each.m == 64]
    chosen = decide_all(evidence, BOUND, built_in(), fewer, options).decision("up", "fprop")
    assert chosen.request.op == "linear"


def test_a_filter_and_an_assumption_leave_it_out():
    profile = profile_of(layer(), TIMES)
    evidence = replace(run(*layer()), epilogues=("up",))
    left = PlanOptions(device="cpu", profile=profile, filter=lambda site: False)
    assert {each.recipe for each in decide_all(evidence, BOUND, built_in(), profile.times, left).decisions} == {None}
    assumed = decide_all(evidence, BOUND, built_in(), (), PlanOptions(device="cpu", assume_speedup=1.3))
    assert {each.request.op for each in assumed.decisions} == {"linear"}


def test_the_order_of_products_and_times_makes_no_difference():
    products = [*layer("up"), *layer("down")]
    first = planned(products=products, sites=("down", "up"))
    assert first.hash == planned(products=products[::-1], sites=("down", "up")).hash
    assert {each.kernel for each in first.decisions} == {FUSED, APART}


def test_without_backward_a_fused_kernel_is_chosen_too():
    plan = planned(products=layer(passes=("fprop",)))
    assert [each.kernel for each in plan.decisions] == [FUSED]


def test_a_third_partys_kernel_without_the_form_of_a_layer_cannot_be_planned():
    name = "acme.linear_norm_act.rowwise"
    bare = [replace(spec, name=name, fused="") for spec in KERNELS if spec.name == FUSED]
    plan = planned({**TIMES, name: 5.0}, registry=built_in((*KERNELS, *bare)))
    assert plan.decision("up", "fprop").kernel == FUSED
    assert (told(plan, name).code, told(plan, name).reason[:14]) == ("cannot", "it has no form")


def test_a_bound_on_a_site_holds_for_its_fused_kernel():
    plan = planned(bound=Bound(row_error=0.05, per_site={"up": Bound(row_error=0.01)}))
    assert {each.recipe for each in plan.decisions} == {None}
    assert told(plan, FUSED).code == "over_bound"


def test_the_ladder_goes_from_the_fused_kernel_to_the_product_alone_and_to_high_precision():
    plan = planned(times={**TIMES, "torch.scaled_mm.tensorwise": 13.0})
    (forward, *_) = ladders(plan, device_info("cpu"))
    assert [rung.kernel for rung in forward.rungs] == [
        *("emulated.linear_norm_act.rowwise", "torch.scaled_mm.rowwise", "torch.scaled_mm.tensorwise", ""),
    ]


def test_a_fused_layer_in_high_precision_is_not_given_up_for_a_product_in_fp8():
    # 12 in FP8 with 15 behind it, against 24: it stays, while its gradients gain.
    plan = planned({**TIMES, FUSED: 23.5, FUSED_HIGH: 24.0})
    chosen = plan.decision("up", "fprop")
    assert (chosen.kernel, chosen.recipe, chosen.request.op) == (FUSED_HIGH, None, "linear_norm_act")
    assert (chosen.time_us, chosen.baseline_time_us) == (24.0, 24.0)
    assert "it stays in high precision: norm and activation are in this kernel: 24 us against 27 us" in chosen.why
    assert (told(plan, FUSED).code, told(plan, APART).code) == ("no_gain", "slower")
    assert [plan.decision("up", each).kernel for each in PASSES[1:]] == [APART, APART]
    assert Plan.parse(plan.text().encode(), "a plan") == plan
    assert any("1 in high precision, which is faster there" in note for note in plan.notes)
    kernels = site_kernels(plan, torch.device("cpu"), emulate=True)["up"]
    assert kernels.fprop == ""  # it needs a GPU: op by op here
    assert (kernels.op, kernels.dgrad) == ("linear_norm_act", APART)
    slower = planned({**TIMES, FUSED: 26.5, FUSED_HIGH: 26.9})
    assert slower.decision("up", "fprop").kernel == APART


def test_under_a_bound_on_the_loss_a_fused_kernel_has_the_recipe_that_was_granted():
    products = layer(fprop={"recipes": costing(rowwise=1e-5, tensorwise=5e-3)})
    plan = planned({**TIMES, OTHER: 15.0}, products=products, bound=Bound(loss=1e-3))
    assert plan.decision("up", "fprop").kernel == FUSED
    assert plan.decision("up", "fprop").loss is not None
    assert told(plan, OTHER).code in ("budget_spent", "over_bound")


# --- from a probe, and on this device ---


def fused_stack():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.LayerNorm(40), nn.SiLU(), nn.Linear(40, 40), nn.LayerNorm(40))
    loka.mods.apply(model, [BlockNorm(256), HardSwish(), FuseEpilogue()])
    return model


def probed(tmp_path, model):
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with loka.probe(model, db=tmp_path / "run.db", every=1, overhead=10.0):
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(32, 24)).square().mean().backward()
            optimizer.step()
    return load_evidence(tmp_path / "run.db")


def test_a_probe_notes_which_layers_have_their_norm_and_activation_with_them(tmp_path):
    model = fused_stack()
    evidence = probed(tmp_path, model)
    assert evidence.epilogues == ("0",)  # that of 3 has no activation, which fused kernels do not compute
    (shape,) = epilogue_shapes(evidence)
    request = shape.request
    assert (request.op, request.site, request.m, request.n, request.k) == ("linear_norm_act", "0", 32, 40, 24)
    times = measure_shapes([shape], default_registry(), "cpu", budget_s=0.1)
    names = {each.kernel for each in times}
    assert {UNFUSED, "emulated.linear_norm_act.rowwise", "emulated.linear_norm_act.tensorwise"} <= names
    plan = loka.plan(tmp_path / "run.db", Bound(row_error=0.5), budget_s=0.2)
    assert {each.request.op for each in plan.decisions} == {"linear"}  # emulated, it is no faster
    assert any(each.kernel == "emulated.linear_norm_act.rowwise" for each in plan.decision("0", "fprop").rejected)


def test_a_plan_of_another_device_is_made_and_run_emulated(tmp_path):
    model = fused_stack()
    evidence = probed(tmp_path, model)
    names = {"torch.mm.fp32": 20.0, UNFUSED: 35.0, FUSED: 18.0}
    times = []
    for each in evidence.products:
        own = names if (each.site, each.product) == ("0", "fprop") else {"torch.mm.fp32": 20.0}
        times += [timing(name, us, 0.1, of=each, device=HOPPER) for name, us in own.items()]
    profile = DeviceProfile(label="made", source="measured", device=HOPPER, environment={}, times=tuple(times))
    # What four steps show of the errors is no evidence yet: here it is made up.
    evidence = replace(evidence, products=tuple(replace(each, recipes=SAFE) for each in evidence.products))
    plan = decide_all(evidence, BOUND, built_in(), profile.times, PlanOptions(device="cpu", profile=profile))
    assert plan.decision("0", "fprop").kernel == FUSED
    x = torch.randn(2, 24)
    plain = model(x)
    loka.convert(model, plan, emulate=True)
    error = (model(x) - plain).norm() / plain.norm()
    assert 0 < error < 0.1
