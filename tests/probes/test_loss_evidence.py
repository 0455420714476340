"""Loss evidence: arithmetic over made-up records against plain formulas, coverage, and the ranks of one run as one."""

import math
import random
import statistics
import time
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from loka.bounds import Bound
from loka.errors import ArgumentError
from loka.probes.judging.evidence import LossEvidence, load_evidence
from loka.probes.judging.loss_evidence import TOGETHER
from loka.probes.records import LossImpact, StepRecord
from loka.probes.storing.writer import RunWriter
from tests.made_times import seconds_since
from tests.probes.made_records import NAN, made_error, made_info, made_product, made_progress, write_run

RECIPES_TAKEN = ("tensorwise", "rowwise", "blockwise", "mxfp8")
FROZEN = {"weights_changed": False, "status": "complete"}


def impact(kl, first_order=0.0, spread=1e-6):
    return LossImpact(kl=kl, first_order=first_order, spread=spread)


def step(at, impacts=None, *, loss=0.5, rank=0, labels="closed", **changes):
    """A step with one forward product and its impacts by recipe."""
    taken = {name: one if isinstance(one, LossImpact) else impact(one) for name, one in (impacts or {}).items()}
    product = made_product(impacts=taken, **changes)
    return StepRecord(step=at, products=(product,), rank=rank, loss=loss, labels=labels if taken else "")


def evidence_of(tmp_path, steps, name="run.db", confidence=0.95, **progress):
    steps = list(steps)
    path = tmp_path / name
    write_run(path, steps, made_info(), made_progress(len(steps), **{**FROZEN, **progress}))
    return load_evidence(path, confidence=confidence)


def loss_of(evidence, recipe="rowwise"):
    (product,) = evidence.products
    (found,) = (one for one in product.recipes if one.recipe == recipe)
    return found.loss


def test_a_mean_impact_is_divided_by_the_mean_loss_and_never_step_by_step(tmp_path):
    """A batch with hardly a click has a tiny loss, and its ratio would drown all others."""
    losses = [0.5, 0.4, 1e-6, 0.6, 0.5]
    kls = [2e-5, 3e-5, 1e-5, 2e-5, 4e-5]
    steps = [step(100 * at, {"rowwise": kl}, loss=loss) for at, (kl, loss) in enumerate(zip(kls, losses, strict=True))]
    # A step that took no impact still says what the loss is; one whose loss is not known says nothing of it.
    steps += [step(500, loss=0.9), step(600, loss=NAN)]
    evidence = evidence_of(tmp_path, steps)
    mean_loss = statistics.mean([*losses, 0.9])
    assert evidence.mean_loss == pytest.approx(mean_loss)
    assert evidence.has_loss
    found = loss_of(evidence)
    assert found.kl == pytest.approx(statistics.mean(kls) / mean_loss)
    assert (found.samples, found.labels) == (5, "closed")


def test_bounds_are_those_of_a_log_normal_mean_and_of_student(tmp_path):
    kls, firsts, spreads = [2e-5, 3e-5, 1e-5, 2e-5], [1e-4, -2e-4, 5e-5, 0.0], [1e-4, 2e-4, 3e-4, 1e-4]
    steps = [
        step(100 * at, {"rowwise": impact(*one)}, loss=0.4)
        for at, one in enumerate(zip(kls, firsts, spreads, strict=True))
    ]
    found = loss_of(evidence_of(tmp_path, steps, confidence=0.9))
    n, t1, t2 = 4, stats.t.ppf(0.9, 3), stats.t.ppf(0.95, 3)
    mean, deviation = statistics.mean(kls), statistics.stdev(kls)
    log, variance = np.log(kls).mean(), np.log(kls).var(ddof=1)
    part = variance / 2 * (3 / stats.chi2.ppf(0.1, 3) - 1)
    upper = math.exp(log + variance / 2 + math.sqrt(t1**2 * variance / n + part**2))
    assert upper > mean + t1 * deviation / 2
    assert found.kl_high == pytest.approx(TOGETHER * upper / 0.4)
    assert found.kl_low == pytest.approx(max(mean - t1 * deviation / 2, 0) / 0.4)
    first = statistics.mean(firsts)
    predicted = math.sqrt(statistics.mean([one**2 for one in spreads]))
    sampled = statistics.stdev([kl + one for kl, one in zip(kls, firsts, strict=True)])
    assert predicted > sampled
    assert found.first_order == pytest.approx(first / 0.4)
    assert found.spread == pytest.approx(predicted / 0.4)
    half = t2 * predicted * math.sqrt(1 + 1 / n)
    assert found.low == pytest.approx((mean + first - half) / 0.4)
    assert found.high == pytest.approx((mean + first + half) / 0.4)
    assert found.first_order_low == pytest.approx((first - t1 * predicted / 2) / 0.4)
    assert found.cost == found.kl_high  # no increase of the first order is established


def test_the_spread_of_the_samples_counts_where_it_is_the_larger(tmp_path):
    firsts = [1e-3, -1e-3, 5e-4, 0.0]
    found = loss_of(
        evidence_of(tmp_path, [step(100 * at, {"rowwise": impact(0.0, one)}) for at, one in enumerate(firsts)])
    )
    half = stats.t.ppf(0.975, 3) * statistics.stdev(firsts) * math.sqrt(1.25)
    assert found.high == pytest.approx((statistics.mean(firsts) + half) / 0.5)
    assert found.kl_high == 0.0  # a kl of nothing has no logarithm, and needs none


def test_an_established_increase_counts_and_a_decrease_never_does(tmp_path):
    up, down = ([step(100 * at, {"rowwise": impact(1e-5, sign * 1e-3)}) for at in range(6)] for sign in (1, -1))
    rise = loss_of(evidence_of(tmp_path, up, "up.db"))
    fall = loss_of(evidence_of(tmp_path, down, "down.db"))
    assert rise.first_order_low == pytest.approx((1e-3 - stats.t.ppf(0.95, 5) * 1e-6 / math.sqrt(6)) / 0.5)
    assert rise.cost == pytest.approx(TOGETHER * 2e-5 + rise.first_order_low)
    assert fall.cost == pytest.approx(TOGETHER * 2e-5)
    assert fall.high < 0 < fall.kl


@pytest.mark.parametrize("sigma", [0.1, 0.5])
def test_the_upper_bound_covers_the_mean_as_often_as_it_says(sigma, tmp_path):
    """Many sites with log-normal kl of known mean: at most one in twenty has its bound below it."""
    generator = np.random.default_rng(0)
    sites = 400
    kls = np.exp(sigma * generator.standard_normal((6, sites)) - sigma**2 / 2)
    steps = [
        StepRecord(
            step=100 * at,
            loss=1.0,
            labels="sampled",
            products=tuple(
                made_product(f"s{site}", value={}, impacts={"rowwise": impact(float(kls[at, site]))})
                for site in range(sites)
            ),
        )
        for at in range(6)
    ]
    evidence = evidence_of(tmp_path, steps)
    highs = [one.loss.kl_high / TOGETHER for product in evidence.products for one in product.recipes if one.loss]
    missed = sum(high < 1.0 for high in highs)
    assert len(highs) == sites
    assert missed / sites <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / sites)
    assert statistics.median(highs) < 1 + 2 * sigma  # and it is not so wide that it says nothing


def test_one_sample_has_a_mean_and_no_bound(tmp_path):
    found = loss_of(evidence_of(tmp_path, [step(0, {"rowwise": 1e-5})]))
    assert found.kl == pytest.approx(2e-5)
    assert all(math.isnan(one) for one in (found.kl_high, found.kl_low, found.low, found.high, found.cost))
    assert found.verdict(1.0) == "undecided"


def test_nothing_taken_is_none_and_so_is_a_loss_that_is_not_known(tmp_path):
    bare = evidence_of(tmp_path, [step(100 * at) for at in range(3)], "bare.db")
    assert loss_of(bare) is None
    assert not bare.has_loss
    lost = evidence_of(tmp_path, [step(100 * at, {"rowwise": 1e-5}, loss=NAN) for at in range(3)], "lost.db")
    assert loss_of(lost) is None
    assert math.isnan(lost.mean_loss)
    some = evidence_of(tmp_path, [step(100 * at, {"rowwise": 1e-5}) for at in range(3)], "some.db")
    assert loss_of(some, "mxfp8") is None


def test_a_share_of_a_loss_that_passes_through_zero_is_not_known(tmp_path):
    losses = [0.5, 0.25, -0.1]
    steps = [step(100 * at, {"rowwise": 1e-5}, loss=loss) for at, loss in enumerate(losses)]
    assert evidence_of(tmp_path, steps[:2], "above.db").mean_loss == 0.375
    assert loss_of(evidence_of(tmp_path, steps[:2], "again.db")) is not None
    below = evidence_of(tmp_path, steps, "below.db")
    assert loss_of(below) is None
    assert math.isnan(below.mean_loss)
    # What was before the evidence of a training does not count.
    trained = [step(at, {"rowwise": 1e-5}, loss=-1.0 if at < 100 else 0.5) for at in range(0, 1000, 50)]
    assert evidence_of(tmp_path, trained, "trained.db", weights_changed=True).mean_loss == 0.5


def test_the_least_sure_labels_are_named(tmp_path):
    steps = [step(100 * at, {"rowwise": 1e-5}, labels="sampled" if at else "empirical") for at in range(3)]
    assert loss_of(evidence_of(tmp_path, steps)).labels == "empirical"


def test_in_training_only_recent_samples_count_and_a_rise_is_drawn_to_the_horizon(tmp_path):
    def kl(at):
        return 1e-6 * 1.5 ** (at / 100) * (1 + 0.01 * (-1) ** (at // 50))

    steps = [step(at, {"rowwise": kl(at)}, loss=1.0 if at < 100 else 0.5) for at in range(0, 1000, 50)]
    trained = evidence_of(tmp_path, steps, "trained.db", weights_changed=True)
    frozen = evidence_of(tmp_path, steps, "frozen.db")
    late = [kl(at) for at in range(100, 1000, 50)]
    assert trained.mean_loss == 0.5
    assert loss_of(trained).samples == len(late)
    assert loss_of(trained).kl == pytest.approx(statistics.mean(late) / 0.5)
    assert loss_of(frozen).samples == 20
    # Half the observed 850 steps ahead of the last one it is 1.5 ** 4.25 times what it was there.
    assert loss_of(trained).kl_high > kl(950) * 1.5**4.2 / 0.5


def test_in_training_the_upper_bound_is_that_of_the_next_model_with_a_margin(tmp_path):
    generator = np.random.default_rng(2)
    kls = 1e-6 * np.exp(0.5 * generator.standard_normal(30))
    steps = [step(100 + 10 * at, {"rowwise": float(kl)}) for at, kl in enumerate(kls)]
    trained = loss_of(evidence_of(tmp_path, steps, "trained.db", weights_changed=True))
    logs = np.log(kls)
    reach = stats.t.ppf(0.95, 29) * logs.std(ddof=1) * math.sqrt(1 + 1 / 30)
    assert trained.kl_high == pytest.approx(TOGETHER * math.exp(logs.mean() + reach) / 0.5)
    assert loss_of(evidence_of(tmp_path, steps, "frozen.db")).kl_high < trained.kl_high


def test_every_call_of_a_shared_weight_counts(tmp_path):
    taken = {"rowwise": impact(1e-5, 1e-6, 1e-4)}
    once, thrice = (
        loss_of(evidence_of(tmp_path, [step(at, taken, calls=calls) for at in range(4)], f"{calls}.db"))
        for calls in (1, 3)
    )
    assert thrice.kl == pytest.approx(3 * once.kl)
    assert thrice.kl_high == pytest.approx(3 * once.kl_high)
    assert thrice.first_order == pytest.approx(3 * once.first_order)
    assert thrice.spread == pytest.approx(math.sqrt(3) * once.spread)


def test_loss_evidence_of_two_thousand_products_is_read_in_two_seconds(tmp_path):
    generator = random.Random(5)

    def felt():
        return {name: impact(1e-6 * math.exp(generator.gauss(0, 0.2))) for name in RECIPES_TAKEN}

    names = [f"layers.{index}.linear" for index in range(2000)]
    writer = RunWriter(tmp_path / "run.db", made_info(), capacity=10**6)
    for at in range(5):
        products = tuple(made_product(name, impacts=felt()) for name in names)
        writer.write(StepRecord(step=100 * at, loss=0.5, labels="closed", products=products), made_progress(at + 1))
    writer.finish(made_progress(5, status="complete"), timeout=60)
    load_evidence(tmp_path / "run.db", confidence=0.9)  # imports and caches are not what is timed
    began = time.process_time()
    evidence = load_evidence(tmp_path / "run.db")
    assert seconds_since(began) < 2.0
    losses = [recipe.loss for product in evidence.products for recipe in product.recipes]
    assert len(losses) == 8000
    assert all(loss is not None and loss.samples == 5 for loss in losses)


# --- ranks ---


def test_the_ranks_of_a_run_make_one_sample_per_step_weighted_by_their_rows(tmp_path):
    def steps(of_rank):
        return [
            step(100 * at, {"rowwise": impact(kl, first, 3e-6)}, rank=rank, loss=loss, value={"rowwise": error})
            for at in range(10)
            for rank, (error, kl, first, loss) in enumerate(of_rank)
        ]

    two = [
        (made_error(0.02, rows=96, bias=0.004), 2e-5, 1e-6, 0.4),
        (made_error(0.06, rows=32, bias=0.0), 4e-5, 3e-6, 0.6),
    ]
    merged = evidence_of(tmp_path, steps(two), "two.db")
    # A rank that had no row of this product has nothing to say of it.
    silent = made_error(NAN, rows=0, row_error_p99=NAN, relative_error=NAN, mere=NAN, bias=NAN)
    three = evidence_of(
        tmp_path,
        [*steps(two), *(step(100 * at, rank=2, value={"rowwise": silent}, loss=0.5) for at in range(10))],
        "3.db",
    )
    for evidence in (merged, three):
        (recipe,) = (one for one in evidence.products[0].recipes if one.recipe == "rowwise")
        assert recipe.samples == 10
        assert recipe.error.mean == pytest.approx((96 * 0.02 + 32 * 0.06) / 128)
        assert recipe.bias == pytest.approx(0.003)
        assert recipe.note == ""
        assert recipe.loss.samples == 10
        assert recipe.loss.kl == pytest.approx(3e-5 / 0.5)
        assert recipe.loss.first_order == pytest.approx(2e-6 / 0.5)
        assert recipe.loss.spread == pytest.approx(3e-6 / math.sqrt(2) / 0.5)
        assert evidence.mean_loss == pytest.approx(0.5)
    assert merged.products[0].calls == 1.0


def test_of_two_entries_of_one_rank_the_larger_counts_and_steps_without_any_are_told(tmp_path):
    twice = [
        StepRecord(
            step=100 * at,
            products=tuple(made_product(value={"rowwise": value}, m=m) for value, m in ((0.02, 64), (0.05, 32))),
        )
        for at in range(8)
    ]
    nothing = made_error(NAN, row_error_p99=NAN, relative_error=NAN, mere=NAN)
    lost = [step(900 + rank // 2, value={"rowwise": nothing}, rank=rank % 2) for rank in range(4)]
    evidence = evidence_of(tmp_path, [*twice, *lost])
    (recipe,) = (one for one in evidence.products[0].recipes if one.recipe == "rowwise")
    assert recipe.samples == 8
    assert recipe.error.mean == pytest.approx(0.05)
    assert recipe.note == "2 sampled steps do not count: results of zeros, or not finite"


# --- verdicts ---

EVIDENCE = LossEvidence(
    **{"kl": 1e-5, "kl_low": 0.8e-5, "kl_high": 1.2e-5, "first_order": 0.0, "first_order_low": -1e-4, "spread": 1e-4},
    **{"low": -2e-4, "high": 2e-4, "samples": 6, "labels": "closed"},
)


@pytest.mark.parametrize(
    ("changes", "budget", "verdict"),
    [
        ({}, 1.2e-5, "safe"),
        ({}, 1.1e-5, "undecided"),
        ({}, 0.7e-5, "unsafe"),
        ({"first_order_low": 1e-5}, 2e-5, "undecided"),
        ({"first_order_low": 1e-5}, 2.3e-5, "safe"),
        ({"kl_high": NAN, "kl_low": NAN}, 1.0, "undecided"),
    ],
)
def test_a_product_is_judged_alone_against_the_budget(changes, budget, verdict):
    assert replace(EVIDENCE, **changes).verdict(budget) == verdict


@pytest.mark.parametrize(
    ("error", "bias", "verdict"),
    [(0.03, 0.002, "safe"), (0.03, -0.02, "unsafe"), (0.03, NAN, "undecided"), (0.2, 0.002, "unsafe")],
)
def test_a_gradient_is_judged_by_its_error_and_its_bias_under_a_bound_on_the_loss(error, bias, verdict, tmp_path):
    steps = [
        StepRecord(
            step=100 * at,
            products=(
                made_product(product="dgrad", value={"rowwise": made_error(error * (1 + 0.01 * at), bias=bias)}),
            ),
        )
        for at in range(10)
    ]
    (product,) = evidence_of(tmp_path, steps).products
    (recipe,) = (one for one in product.recipes if one.recipe == "rowwise")
    assert recipe.judge(Bound(loss=1e-9).limit("dgrad", "up")) == verdict
    assert recipe.judge(Bound(row_error=0.05).limit("dgrad", "up")) == ("safe" if error < 0.05 else "unsafe")
    assert recipe.upper(Bound(loss=1e-9).limit("dgrad", "up")) == recipe.error.upper_tolerance
    assert recipe.loss is None


def test_a_forward_product_without_loss_evidence_is_undecided_however_small_its_error(tmp_path):
    (product,) = evidence_of(tmp_path, [step(100 * at, value=1e-6) for at in range(10)]).products
    assert product.recipes[0].judge(Bound(loss=1.0).limit("fprop", "up")) == "undecided"
    assert math.isnan(product.recipes[0].upper(Bound(loss=1.0).limit("fprop", "up")))


def test_a_confidence_that_is_none_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="confidence"):
        evidence_of(tmp_path, [step(0, {"rowwise": 1e-5})], confidence=1.0)
