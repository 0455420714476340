"""The overhead budget on a simulated clock."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loka.probes.sampling.budget import Budget

DENSE_GRACE_S = {1: 2.0, 10: 0.45, 50: 0.05, 100: 0.0}


class Run:
    """A simulated training run: steps of a given length, products of given costs, and a fixed cost per sample."""

    def __init__(
        self, *, every=100, overhead=0.01, step_s=0.05, costs=(0.002,) * 12, fixed_s=0.003, eager_s=0.0, **options
    ):
        self.budget = Budget(every=every, overhead=overhead, **options)
        self.every, self.overhead, self.step_s = every, overhead, step_s
        self.fixed_s, self.eager_s = fixed_s, eager_s
        self.costs = dict(enumerate(costs))
        self.present = set(self.costs)
        self.clock = 0.0
        self.measured = Counter()
        self.samples = []  # what each measured

    def intervals(self, count):
        """Run so many intervals; yield after each sample that took place."""
        for _ in range(count):
            plain = self.every
            if self.budget.begin_sample(self.clock):
                self.sample()
                plain -= 1
                yield self.budget.samples
            self.clock += plain * self.step_s
            for _ in range(min(plain, 20)):
                self.budget.plain_step(self.step_s, 0.8 * self.step_s)

    def run(self, count):
        for _ in self.intervals(count):
            pass
        return self

    def sample(self):
        spent, taken = self.fixed_s, []
        for key in sorted(self.present):
            if self.budget.allows(key, 0.5 * self.step_s):
                self.budget.measured(key, self.costs[key])
                spent += self.costs[key]
                taken.append(key)
        self.budget.known(self.present)
        self.measured.update(taken)
        self.samples.append(taken)
        longer = spent + self.eager_s
        self.clock += self.step_s + longer
        self.budget.end_sample(spent, self.step_s + longer, 0.8 * self.step_s + longer)

    @property
    def own_s(self):
        return self.clock - self.budget.spent_s

    @property
    def overdraft_s(self):
        return self.budget.spent_s - self.overhead * self.own_s


costs = st.lists(st.floats(1e-4, 0.05), min_size=1, max_size=20)


@given(
    every=st.sampled_from([100, 200, 1000]),
    overhead=st.floats(0.001, 0.2),
    step_s=st.floats(1e-3, 1.0),
    costs=costs,
    fixed_s=st.floats(1e-4, 0.02),
    eager_s=st.floats(0.0, 0.5),
)
def test_never_over_budget_in_steady_state(every, overhead, step_s, costs, fixed_s, eager_s):
    run = Run(every=every, overhead=overhead, step_s=step_s, costs=costs, fixed_s=fixed_s, eager_s=eager_s)
    run.run(300)
    ahead_s = 3 * overhead * every * step_s + fixed_s + eager_s + sum(costs)
    assert run.overdraft_s <= ahead_s
    settled = min(run.measured[key] for key in run.costs) > 0 and run.budget.samples >= 10
    for _ in run.intervals(100):
        assert not settled or run.overdraft_s <= 1e-9
        settled = min(run.measured[key] for key in run.costs) > 0 and run.budget.samples >= 10


@settings(max_examples=30)
@given(overhead=st.floats(0.01, 0.1), step_s=st.floats(0.01, 0.1), costs=costs)
def test_the_budget_is_used_where_there_is_work_for_it(overhead, step_s, costs):
    run = Run(overhead=overhead, step_s=step_s, costs=costs, fixed_s=1e-4).run(400)
    most_s = (run.budget.samples - 10) * (1e-4 + sum(costs))  # the first ten are on schedule, not on credit
    spendable_s = overhead * run.own_s - 2 * (max(costs) + 1e-4 + overhead * 100 * step_s)
    assert run.budget.spent_s >= min(most_s, spendable_s) - 1e-9


def test_samples_that_the_budget_does_not_cover_are_skipped_and_counted():
    run = Run(step_s=0.001, costs=(0.004,) * 10, fixed_s=0.01).run(1000)
    assert run.budget.samples + run.budget.skipped == 1000
    assert run.budget.skipped > 800
    assert run.overdraft_s <= 0
    generous = Run(step_s=1.0, costs=(0.004,) * 10).run(200)
    assert (generous.budget.samples, generous.budget.skipped) == (200, 0)


def test_a_compiled_models_eager_step_is_charged_although_nothing_but_its_length_shows_it():
    run = Run(step_s=0.01, costs=(0.0005,), fixed_s=0.0005, eager_s=0.05).run(400)
    assert run.budget.spent_s == pytest.approx(run.budget.samples * 0.051 - 0.05, rel=0.01)  # before the first: unknown
    assert run.overdraft_s <= 0


def test_work_of_the_users_own_that_coincides_with_samples_is_not_charged():
    """A checkpoint saved, or an evaluation run, every hundred steps makes the sampled step long, and is no overhead."""
    run = Run(costs=(0.002,))
    for _ in range(20):
        run.run(1)
        before = run.budget.spent_s
        assert run.budget.begin_sample(run.clock)
        run.clock += 60.0
        run.budget.end_sample(0.004, whole_s=60.0, inside_s=0.8 * run.step_s + 0.004)
        assert run.budget.spent_s - before == pytest.approx(0.004)


@pytest.mark.parametrize("spread", [1, 5])
@pytest.mark.parametrize("num", [2, 7, 40])
def test_rotation_measures_every_product_equally_often(num, spread):
    product_costs = [0.001 * (1 + (spread - 1) * index / num) for index in range(num)]
    run = Run(step_s=0.02, costs=product_costs, fixed_s=0.001).run(2000)
    counts = [run.measured[key] for key in run.costs]
    assert min(counts) > 10
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("seed", range(12))
def test_no_product_starves_whatever_products_cost(seed):
    """Costs jump up to thirtyfold from sample to sample, and a place in the step is not a place in the queue."""
    draw = random.Random(seed)
    num = draw.randint(2, 12)
    run = Run(overhead=draw.uniform(0.002, 0.05), step_s=0.02, costs=(0.002,) * num, fixed_s=0.001)
    waited = dict.fromkeys(run.costs, 0)
    for _ in run.intervals(300):
        for key in run.costs:
            run.costs[key] = 0.002 * draw.choice([0.3, 1, 1, 3, 10])
            waited[key] = 0 if key in run.samples[-1] else waited[key] + 1
        assert max(waited.values()) <= num
    counts = [run.measured[key] for key in run.costs]
    assert max(counts) - min(counts) <= 4


def test_settled_products_are_measured_rarer_which_pays_for_the_others():
    plain, relieved = (Run(step_s=0.02, costs=(0.004,) * 12, fixed_s=0.001).run(20) for _ in range(2))
    for key in range(9):
        relieved.budget.settle(key, settled=True)
    before = relieved.measured.copy(), plain.measured.copy()
    relieved.run(400)
    plain.run(400)
    settled = [relieved.measured[key] - before[0][key] for key in range(9)]
    open_ones = [relieved.measured[key] - before[0][key] for key in range(9, 12)]
    even = [plain.measured[key] - before[1][key] for key in range(12)]
    assert max(open_ones) - min(open_ones) <= 1
    assert min(open_ones) == pytest.approx(4 * max(settled), rel=0.1)
    assert min(open_ones) > 1.9 * max(even)
    relieved.budget.settle(0, settled=False)
    relieved.run(100)
    assert relieved.measured[0] - settled[0] - before[0][0] > 20


def test_a_product_that_comes_no_more_does_not_hold_up_the_others():
    run = Run(step_s=0.02, costs=(0.001, 0.001, 0.001, 0.9), fixed_s=0.001).run(60)
    run.present = {0, 1, 2}
    before = sum(run.measured[key] for key in run.present)
    run.run(400)
    assert sum(run.measured[key] for key in run.present) - before > 100


def test_a_product_that_comes_late_is_measured_as_often_as_the_others_from_then_on():
    run = Run(step_s=0.02, costs=(0.006, 0.006, 0.006, 0.006), fixed_s=0.001)
    run.present = {0, 1, 2}
    run.run(100)
    before = dict(run.measured)
    run.present.add(3)
    run.run(100)
    after = [run.measured[key] - before.get(key, 0) for key in run.costs]
    assert max(after) - min(after) <= 2


def test_many_new_products_of_unknown_cost_are_not_all_measured_at_once():
    run = Run(step_s=0.05, costs=(0.002,) * 2000, fixed_s=0.003).run(3)
    for taken in run.samples:
        assert 1 <= len(taken) <= (0.01 * 100 * 0.05 - 0.003) / 0.002 * 1.2


def test_the_first_sample_takes_no_more_than_half_of_its_own_products_time():
    run = Run(step_s=0.05, costs=(0.002,) * 100).run(1)
    assert len(run.samples[0]) * 0.002 == pytest.approx(0.5 * 0.5 * 0.05, abs=0.002)


@pytest.mark.parametrize("every", DENSE_GRACE_S)
def test_dense_sampling_has_a_grace_before_the_budget_binds(every):
    """A run of a hundred short steps at every=1 is asked for evidence, not for cheapness."""
    run = Run(every=every, step_s=0.002, costs=(0.001,) * 5, fixed_s=0.001).run(3000)
    grace_s = DENSE_GRACE_S[every]
    assert run.budget.spent_s >= grace_s
    assert run.overdraft_s <= grace_s + 0.01
    while_it_lasts = int(grace_s / 0.006) - 1
    assert all(len(taken) == 5 for taken in run.samples[1 : max(while_it_lasts, 1)])


def test_the_first_step_is_always_sampled_and_measures_something():
    budget = Budget(every=100, overhead=1e-9)
    assert budget.begin_sample(0.0)
    assert budget.allows("product", own_s=0.01)
    assert budget.plain_step_s == 0.0


def test_samples_of_a_product_are_counted():
    run = Run(costs=(0.001,)).run(3)
    assert run.budget.samples_of(0) == 3
    assert run.budget.samples_of("unknown") == 0


def test_a_product_that_somebody_waits_for_is_measured_in_every_sample():
    run = Run(costs=(0.006,) * 12).run(12)
    shares = Counter(key for taken in run.samples[-6:] for key in taken)
    assert 0 < shares[7] < 6
    for _ in run.intervals(12):
        run.budget.first(lambda key: key == 7)
    assert all(7 in taken for taken in run.samples[-11:])
    assert set().union(*run.samples[-11:]) == set(range(12))


@pytest.mark.parametrize("fixed_s", [0.003, 0.02, 0.2])
def test_without_scheduled_samples_nothing_is_spent_that_was_not_earned_but_the_first(fixed_s):
    run = Run(scheduled=1, fixed_s=fixed_s)
    first = 0.0
    for samples in run.intervals(200):
        first = first or run.budget.spent_s
        earned = run.overhead * (run.clock - run.budget.spent_s)
        assert run.budget.spent_s <= earned + first + 0.004, samples
    assert run.budget.samples > 1
