"""Layers that hand FP8 to each other: what a plan decides over neighbours together, what it charges, what it says."""

import itertools
import random
from dataclasses import replace

import pytest

from loka.bounds import Bound
from loka.dispatch.deciding.options import PlanOptions
from loka.dispatch.deciding.plan import Plan
from loka.dispatch.deciding.planner import decide_all
from loka.dispatch.measuring.forms import Form, kernel_of
from loka.dispatch.measuring.profile import DeviceProfile
from loka.errors import PlanError
from loka.formats import PASSES
from loka.kernel_registry.builtin import KERNELS
from loka.probes.capturing.row_counts import RowCount, RowCounts
from tests.dispatch.made_evidence import BOUND, HOPPER, built_in, product, recipe, run, timing
from tests.dispatch.test_loss_budget import costing

BASE, UNFUSED = "torch.mm.bf16", "torch.native.linear_norm_act"
ROW, BLOCK = "torch.scaled_mm.rowwise", "triton.gemm.blockwise"
FUSED_ROW, FUSED_BLOCK = "triton.linear_norm_act.rowwise", "triton.linear_norm_act.blockwise"
SAFE = (recipe("rowwise", 0.03), recipe("blockwise", 0.02))

# Of a layer with norm and activation: 20 us in high precision and 15 behind it, 18 or 19 in one kernel. Stored, that
# kernel takes 14; 15 where it writes codes, and 3 less where it reads them.
FUSED_TIMES = {
    BASE: 20.0,
    ROW: 12.0,
    UNFUSED: 35.0,
    FUSED_ROW: 18.0,
    FUSED_BLOCK: 19.0,
    **{
        Form(reads, writes).of(kernel): (14.0 - 3.0 * reads + bool(writes))
        for kernel in (FUSED_ROW, FUSED_BLOCK)
        for reads in (False, True)
        for writes in ("", "rowwise", "blockwise")
    },
}
# Of the last layer, a product alone: 12 us, of which 4 are the cast of its input, or 13, of which 7 are.
PLAIN_TIMES = {
    BASE: 20.0,
    ROW: 12.0,
    BLOCK: 13.0,
    Form().of(ROW): 10.0,
    Form(True).of(ROW): 6.0,
    Form().of(BLOCK): 11.0,
    Form(True).of(BLOCK): 4.0,
}
# a -> b -> c, by the sizes of each: no two are one shape.
WIDTHS = {"a": (768, 256), "b": (512, 768), "c": (64, 512)}


def layer(site, passes=("fprop",), **changes):
    n, k = WIDTHS[site]
    sizes = {"fprop": (2048, n, k), "dgrad": (2048, k, n), "wgrad": (n, k, 2048)}
    found = []
    for each in passes:
        m, n_, k_ = sizes[each]
        fields = {"product": each, "m": m, "m_min": m, "m_max": m, "n": n_, "k": k_, "recipes": SAFE}
        found.append(product(site, **{**fields, **(changes if each == "fprop" else {})}))
    return found


def profile_of(products, times, spread=0.1):
    made = []
    for each in products:
        own = times[each.site] if each.product == "fprop" else {BASE: 20.0}
        made += [timing(name, us, spread, of=each, device=HOPPER) for name, us in own.items() if us is not None]
    return DeviceProfile(label="made", source="measured", device=HOPPER, environment={}, times=tuple(made))


def planned(a=None, b=None, c=None, *, products=None, flows=None, spread=0.1, bound=BOUND, order=None):
    """Plan a -> b -> c, the first two with norm and activation; a, b, c change their times."""
    products = [*layer("a"), *layer("b"), *layer("c")] if products is None else products
    times = {"a": FUSED_TIMES | (a or {}), "b": FUSED_TIMES | (b or {}), "c": PLAIN_TIMES | (c or {})}
    profile = profile_of(products, times, spread)
    flows = {"a": "b", "b": "c"} if flows is None else flows
    evidence = replace(run(*products), epilogues=("a", "b"), flows=flows)
    timings = list(profile.times)
    if order is not None:
        order.shuffle(timings)
        shuffled = list(evidence.products)
        order.shuffle(shuffled)
        evidence = replace(evidence, products=tuple(shuffled), flows=dict(reversed(flows.items())))
    specs = list(KERNELS)
    if order is not None:
        baselines, others = [e for e in specs if e.recipe is None], [e for e in specs if e.recipe is not None]
        order.shuffle(others)
        specs = baselines + others
    return decide_all(evidence, bound, built_in(specs), timings, PlanOptions(device="cpu", profile=profile))


def kernels(plan):
    return [plan.decision(site, "fprop").kernel for site in "abc"]


def times(plan):
    return [plan.decision(site, "fprop").time_us for site in "abc"]


def told(plan, site, kernel):
    (found,) = [each for each in plan.decision(site, "fprop").rejected if each.kernel == kernel]
    return found


# --- one path, decided together ---


def test_the_cast_of_a_readers_input_is_charged_once_where_it_is_made():
    apart, plan = planned(flows={}), planned()
    assert kernels(apart) == [FUSED_ROW, FUSED_ROW, ROW]
    assert times(apart) == [18.0, 18.0, 12.0]
    assert apart.chains == {}
    # a writes codes, +1; b reads and writes them, -3 and +1; c reads them: of rowwise 12 - 4, of blockwise 13 - 7.
    assert kernels(plan) == [FUSED_ROW, FUSED_ROW, BLOCK]
    assert times(plan) == [19.0, 16.0, 6.0]
    assert plan.chains == {"a": "b", "b": "c"}
    assert plan.notes[-1] == "Frozen, 2 layers hand FP8 to the next one; the times count that of 2."


def test_the_decisions_say_what_is_charged_where():
    plan = planned()
    together = "frozen, {}; a -> b -> c, each cast charged once: 41 us together against 48 us apart"
    writes, reads = (
        "it writes the FP8 that b reads (rowwise)",
        "its input is the FP8 that b writes, bit for bit that of",
    )
    assert plan.decision("a", "fprop").why.endswith(together.format(writes))
    assert reads in plan.decision("c", "fprop").why
    assert plan.decision("b", "fprop").why.count("the FP8 that") == 2
    beaten = told(plan, "c", ROW)
    assert (beaten.code, beaten.time_us) == ("slower", 12.0)
    assert "the best of this layer by itself, 12 us; frozen, its input is the FP8" in beaten.reason
    assert told(plan, "a", FUSED_BLOCK).time_us == 19.0
    assert told(plan, "a", UNFUSED).code == "slower"
    assert plan.decision("c", "fprop").error_upper == 0.02
    assert plan.decision("c", "fprop").baseline_time_us == 20.0
    assert FUSED_ROW not in {each.kernel for each in plan.decision("a", "fprop").rejected}


def test_a_long_path_is_told_by_its_ends(monkeypatch):
    sites = [f"l{at}" for at in range(6)]
    monkeypatch.setattr("tests.dispatch.test_chains.WIDTHS", dict.fromkeys(sites, (256, 256)))
    products = [each for site in sites for each in layer(site)]
    made = [timing(name, us, 0.1, of=products[0], device=HOPPER) for name, us in FUSED_TIMES.items()]
    profile = DeviceProfile(label="made", source="measured", device=HOPPER, environment={}, times=tuple(made))
    flows = dict(itertools.pairwise(sites))
    evidence = replace(run(*products), epilogues=tuple(sites), flows=flows)
    plan = decide_all(evidence, BOUND, built_in(), made, PlanOptions(device="cpu", profile=profile))
    assert plan.chains == flows
    # Written and read: 18 + 1, four times 18 - 3 + 1, and 18 - 3.
    words = "l0 -> 4 more -> l5, each cast charged once: 98 us together against 108 us apart"
    assert all(plan.decision(site, "fprop").why.endswith(words) for site in sites)


def random_times(choose):
    """Times of all forms of all kernels, each drawn anew, some missing."""

    def some(low, high):
        return round(choose.uniform(low, high), 2)

    a, b = ({name: some(10, 19) for name in FUSED_TIMES if kernel_of(name) != name} for _ in "ab")
    c = {name: some(3, 12) for name in PLAIN_TIMES if kernel_of(name) != name}
    for own in (a, b, c):
        own.pop(choose.choice(sorted(own)))
    return a, b, c


def cheapest(a, b, c):
    """Try every combination of kernels and hand-overs by brute force; return the least time."""
    own = ({FUSED_ROW: 18.0, FUSED_BLOCK: 19.0}, {FUSED_ROW: 18.0, FUSED_BLOCK: 19.0}, {ROW: 12.0, BLOCK: 13.0})
    decided = (FUSED_ROW, FUSED_ROW, ROW)
    best = 48.0
    for chosen in itertools.product(*own):
        for links in itertools.product((False, True), repeat=2):
            total = 0.0
            for at, (kernel, forms) in enumerate(zip(chosen, (a, b, c), strict=True)):
                reads, writes = at > 0 and links[at - 1], links[at] if at < 2 else False
                form = Form(reads, chosen[at + 1].rpartition(".")[2] if writes else "")
                plain, found = forms.get(Form().of(kernel)), forms.get(form.of(kernel))
                if form == Form():
                    total += own[at][kernel] if kernel == decided[at] else float("inf")
                elif plain is None or found is None:
                    total = float("inf")
                else:
                    total += max(found, own[at][kernel] + found - plain)
            best = min(best, total)
    return best


@pytest.mark.parametrize("seed", range(60))
def test_of_all_kernels_of_a_path_those_with_the_least_time_together_are_found(seed):
    choose = random.Random(seed)
    a, b, c = random_times(choose)
    forms = {"a": a, "b": b, "c": c}
    absent = {
        site: {name: None for name in (PLAIN_TIMES if site == "c" else FUSED_TIMES) if kernel_of(name) != name}
        for site in "abc"
    }
    plan = planned(**{site: absent[site] | forms[site] for site in "abc"}, spread=0.0)
    assert sum(times(plan)) == pytest.approx(cheapest(a, b, c))


def test_the_order_of_products_times_flows_and_kernels_makes_no_difference():
    wanted = planned().text()
    for seed in range(5):
        assert planned(order=random.Random(seed)).text() == wanted
    # Equal times are settled by name, whatever comes first.
    even = {Form(True).of(BLOCK): 5.0, Form(True).of(ROW): 6.0, Form().of(BLOCK): 11.0, BLOCK: 12.0, ROW: 12.0}
    even |= {Form(True).of(ROW): 4.0}
    tied = planned(c=even)
    assert tied.text() == planned(c=even, order=random.Random(9)).text()
    assert tied.decision("c", "fprop").kernel == ROW


def test_a_kernel_that_gains_nothing_by_itself_may_gain_in_a_chain():
    plan = planned(c={ROW: 19.8, BLOCK: None})
    assert planned(c={ROW: 19.8, BLOCK: None}, flows={}).decision("c", "fprop").recipe is None
    chosen = plan.decision("c", "fprop")
    assert (chosen.kernel, chosen.time_us) == (ROW, pytest.approx(15.8))
    assert told(plan, "c", BASE).time_us == 20.0


# --- where nothing is charged ---


def test_what_is_not_faster_by_more_than_the_spread_stays_as_it_was():
    dear = {
        Form(False, each).of(kernel): 18.5 for each in ("rowwise", "blockwise") for kernel in (FUSED_ROW, FUSED_BLOCK)
    }
    plan = planned(a=dear, flows={"a": "b"}, products=[*layer("a"), *layer("b"), *layer("c")])
    apart = planned(a=dear, flows={})
    assert plan.decisions == apart.decisions  # +4.5 to write, -3 to read
    assert plan.chains == {}  # it was judged, and does not pay
    noisy = planned(flows={"a": "b"}, spread=1.0)
    assert noisy.decisions == planned(flows={}, spread=1.0).decisions


# Seeds whose times all three layers together gain by, within the spread, and two of them beyond it.
PARTS = (110, 119, 170, 207, 230, 266, 272)


def least_of_chain(sites, own, forms):
    """Try all kernels of layers that all hand on FP8: the least time, and the time of each of them."""
    best = None
    for chosen in itertools.product(*(sorted(own[site]) for site in sites)):
        taken = []
        for at, (site, kernel) in enumerate(zip(sites, chosen, strict=True)):
            last = at + 1 == len(sites)
            form = Form(at > 0, "" if last else chosen[at + 1].rpartition(".")[2])
            plain, found = forms[site].get(Form().of(kernel)), forms[site].get(form.of(kernel))
            if plain is None or found is None:
                break
            taken.append((kernel, found, plain, max(found, own[site][kernel] + found - plain)))
        else:
            total = sum(each[-1] for each in taken)
            best = min(best or (total, taken), (total, taken), key=lambda each: each[0])
    return best


def pays(sites, taken, own, decided, spread):
    """Whether a chain beats what was decided by more than all spreads: of a kernel that stays, its two forms'."""
    gain = spreads = 0.0
    for site, (kernel, found, plain, time) in zip(sites, taken, strict=True):
        stays = kernel == decided[site]
        gain += plain - found if stays else own[site][decided[site]] - time
        spreads += 2 * spread if stays else 4 * spread
    return gain > spreads


@pytest.mark.parametrize("seed", [*range(40), *PARTS])
def test_of_a_chain_that_does_not_pay_as_a_whole_the_part_is_taken_that_brute_force_finds(seed):
    choose = random.Random(seed)
    a, b, c = random_times(choose)
    forms = {"a": a, "b": b, "c": c}
    spread = choose.choice((0.2, 0.5, 0.9, 1.4))
    absent = {
        site: {name: None for name in (PLAIN_TIMES if site == "c" else FUSED_TIMES) if kernel_of(name) != name}
        for site in "abc"
    }
    changed = {site: absent[site] | forms[site] for site in "abc"}
    plan, apart = planned(**changed, spread=spread), planned(**changed, spread=spread, flows={})
    own = {"a": {FUSED_ROW: 18.0, FUSED_BLOCK: 19.0}, "c": {ROW: 12.0, BLOCK: 13.0}}
    own["b"] = own["a"]
    decided = dict(zip("abc", kernels(apart), strict=True))
    rows = {sites: least_of_chain(sites, own, forms) for sites in ("abc", "ab", "bc")}
    saved = {
        sites: sum(own[site][decided[site]] for site in sites) - least[0]
        for sites, least in rows.items()
        if least is not None
    }
    first = max(saved, key=saved.__getitem__)
    good = {sites for sites in saved if saved[sites] > 0 and pays(sites, rows[sites][1], own, decided, spread)}
    tried = ("ab", "bc") if first == "abc" and first not in good else (first,)
    best = max((saved[sites] for sites in tried if sites in good), default=0.0)
    assert sum(times(plan)) == pytest.approx(sum(times(apart)) - best)
    assert planned(**changed, spread=spread, order=random.Random(seed)).text() == plan.text()
    if seed in PARTS:
        assert (first, len(plan.chains)) == ("abc", 1)


def test_the_error_of_a_product_keeps_its_kernels_out_of_a_chain():
    bad = (recipe("rowwise", 0.03), recipe("blockwise", 0.2, low=0.18))
    products = [*layer("a"), *layer("b"), *layer("c", recipes=bad)]
    plan = planned(products=products)
    assert plan.decision("c", "fprop").kernel == ROW
    assert told(plan, "c", BLOCK).code == "over_bound"
    unsafe = [*layer("a"), *layer("b"), *layer("c", recipes=(recipe("rowwise", 0.2, low=0.18),))]
    plan = planned(products=unsafe)
    assert plan.decision("c", "fprop").recipe is None
    assert plan.chains == {"a": "b"}


def test_under_a_budget_of_loss_a_chain_keeps_to_the_recipes_that_were_granted():
    costs = costing(rowwise=1e-5, blockwise=1e-5)
    products = [*layer("a", recipes=costs), *layer("b", recipes=costs), *layer("c", recipes=costs)]
    plan = planned(products=products, bound=Bound(loss=1e-3))
    assert kernels(plan) == [FUSED_ROW, FUSED_ROW, ROW]  # not BLOCK, which would gain more in the chain
    assert times(plan) == [19.0, 16.0, 8.0]
    assert plan.decision("c", "fprop").loss is not None


def test_layers_that_train_are_named_and_no_time_counts_it():
    products = [*layer("a", PASSES), *layer("b", PASSES), *layer("c", PASSES)]
    plan, without = planned(products=products), planned(products=products, flows={})
    assert plan.decisions == without.decisions
    assert plan.chains == {"a": "b", "b": "c"}
    assert plan.notes[-1] == "Frozen, 2 layers hand FP8 to the next one; the times count that of 0."


def test_forms_that_were_never_timed_are_not_counted():
    nothing = {name: None for name in (*FUSED_TIMES, *PLAIN_TIMES) if kernel_of(name) != name}
    plan = planned(nothing, nothing, nothing)
    assert plan.decisions == planned(flows={}).decisions
    assert plan.chains == {"a": "b", "b": "c"}


def test_emulated_kernels_hand_on_only_what_was_measured_to_gain():
    fused = "emulated.linear_norm_act.rowwise"
    others = dict.fromkeys((name for name in FUSED_TIMES if name.startswith("triton")), None)
    plan = planned(others | {fused: 18.0}, others | {fused: 18.0})
    assert kernels(plan)[:2] == [fused, fused]
    assert plan.chains == {}


def test_a_reader_of_several_results_and_a_flow_to_unknown_layers_are_none_of_a_path():
    plan = planned(flows={"a": "c", "b": "c"})
    assert plan.decisions == planned(flows={}).decisions
    assert planned(flows={"a": "nobody", "ghost": "b"}).chains == {}


def test_rows_that_vary_are_weighed_as_everywhere():
    points = RowCounts(points=(RowCount(rows=64, weight=0.5), RowCount(rows=2048, weight=0.5)))
    products = [each for site in "ab" for each in layer(site, rows=points, m_min=64)]
    made = []
    for each in products:
        for rows, factor in ((64, 0.5), (2048, 1.0)):
            at = replace(each, m=rows, rows=RowCounts())
            made += [timing(name, us * factor, 0.01, of=at, device=HOPPER) for name, us in FUSED_TIMES.items()]
    profile = DeviceProfile(label="made", source="measured", device=HOPPER, environment={}, times=tuple(made))
    evidence = replace(run(*products), epilogues=("a", "b"), flows={"a": "b"})
    options = PlanOptions(device="cpu", profile=profile)
    plan = decide_all(evidence, BOUND, built_in(), profile.times, options)
    first, then = (plan.decision(site, "fprop") for site in "ab")
    assert (first.time_us, then.time_us) == (pytest.approx(0.75 * 19), pytest.approx(0.75 * 15))
    assert [each.time_us for each in then.times] == [pytest.approx(7.5), pytest.approx(15.0)]


# --- in a file ---


def test_a_plan_with_chains_comes_back_and_one_without_is_as_before():
    plan = planned()
    assert Plan.parse(plan.text().encode(), "a plan") == plan
    assert '"chains":{"a":"b","b":"c"}' in plan.text()
    assert "chains" not in planned(flows={}).text()
    assert plan.hash != replace(plan, chains={"a": "b"}).hash


@pytest.mark.parametrize("chains", ['{"a":"a"}', '{"a":"x"}', '{"x":"a"}', '{"a":1}', '["a"]', '{"a":"b\\n"}'])
def test_chains_of_no_two_layers_are_refused(chains):
    text = planned().text().replace('{"a":"b","b":"c"}', chains)
    with pytest.raises(PlanError):
        Plan.parse(text.encode(), "a plan")
