"""The timing protocol: interleaved, rotating, honest about its spread."""

import itertools
import time
from types import SimpleNamespace

import pytest
import torch

from loka.errors import ArgumentError
from loka.timing import MAX_REPETITIONS, Measurement, faster, interleaved_ratio, measure, num_inputs, summarise


class Clock:
    """A clock that only work moves: no neighbour on the machine can disturb it."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def work(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("loka.timing.time", SimpleNamespace(perf_counter=clock))
    return clock


def measurement(median_us, spread_us):
    return Measurement(median_us=median_us, spread_us=spread_us, repetitions=9)


def test_median_and_half_the_interquartile_range():
    result = summarise([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (result.median_us, result.spread_us, result.repetitions) == (3.0, 1.0, 5)


def test_one_repetition_has_no_spread():
    assert summarise([7.0]) == Measurement(median_us=7.0, spread_us=0.0, repetitions=1, best_us=7.0)


def test_known_durations_are_measured_in_microseconds(clock):
    durations = iter([0.002, 0.003, 0.004, 0.005, 0.100] * 2)
    candidates = {"steady": lambda index: clock.work(0.002), "jumpy": lambda index: clock.work(next(durations))}
    result = measure(candidates, device="cpu", budget_s=0.0, min_repetitions=5, warmup_s=0.0)
    assert result["steady"].median_us == pytest.approx(2000)
    assert result["steady"].spread_us == pytest.approx(0, abs=1e-6)
    # The warm-up took the first 2 ms; measured are 3, 4, 5, 100 and 2 ms.
    assert result["jumpy"].median_us == pytest.approx(4000)
    assert result["jumpy"].spread_us == pytest.approx(1000)


def test_real_time_is_what_is_measured():
    result = measure({"sleep": lambda index: time.sleep(0.002)}, device="cpu", budget_s=0.0, min_repetitions=3)["sleep"]
    assert 2000 <= result.median_us < 500_000
    assert result.repetitions == 3


def test_candidates_take_turns_and_the_first_in_turn_changes():
    calls = []
    candidates = {name: (lambda index, name=name: calls.append(name)) for name in "abc"}
    measure(candidates, device="cpu", budget_s=0.0, min_repetitions=4, warmup_s=0.0)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"


def test_no_call_reads_the_input_of_the_call_before_it():
    seen = []
    measure(dict.fromkeys("ab", seen.append), device="cpu", budget_s=0.0, inputs=3, min_repetitions=6, warmup_s=0.0)
    assert set(seen) == {0, 1, 2}
    assert all(first != second for first, second in itertools.pairwise(seen))


def test_the_budget_is_spent_and_a_slow_candidate_still_gets_its_repetitions(clock):
    start = clock.now
    result = measure({"short": lambda index: clock.work(0.001)}, device="cpu", budget_s=0.2005, warmup_s=0.0)
    assert clock.now - start == pytest.approx(0.201)
    assert result["short"].repetitions == 200  # and one call to warm up
    slow = measure({"slow": lambda index: clock.work(1.0)}, device="cpu", budget_s=0.2, min_repetitions=3)
    assert slow["slow"].repetitions == 3


def test_a_median_that_has_settled_ends_the_measurement(clock):
    result = measure({"short": lambda index: clock.work(1e-5)}, device="cpu", budget_s=60.0)
    assert result["short"].repetitions == MAX_REPETITIONS
    assert clock.now < 101.0


def test_warm_up_lasts_its_time(clock):
    calls = []
    candidates = {"x": lambda index: calls.append(clock.work(0.001))}
    measure(candidates, device="cpu", budget_s=0, min_repetitions=1, warmup_s=0.0195)
    assert len(calls) == 20 + 1


@pytest.mark.parametrize("wrong", [{"candidates": {}}, {"inputs": 0}, {"min_repetitions": 0}])
def test_nothing_to_time_is_an_error(wrong):
    arguments = {"candidates": {"a": lambda index: None}, "device": "cpu", "budget_s": 0.0, **wrong}
    with pytest.raises(ArgumentError, match="nothing to time"):
        measure(arguments.pop("candidates"), **arguments)


def test_what_a_candidate_raises_passes_through():
    def fails(index):
        raise RuntimeError("no kernel image")

    with pytest.raises(RuntimeError, match="no kernel image"):
        measure({"fails": fails}, device="cpu", budget_s=0.0)


@pytest.mark.parametrize(
    ("a", "b", "wins"),
    [((10, 0), (11, 0), True), ((10, 0.6), (11, 0.6), False), ((10, 0.4), (11, 0.4), True), ((10, 0), (10, 0), False)],
)
def test_a_difference_inside_the_combined_spread_is_a_tie(a, b, wins):
    assert faster(measurement(*a), measurement(*b)) is wins
    assert not faster(measurement(*b), measurement(*a))


def test_small_inputs_are_rotated_more_than_large_ones():
    assert num_inputs(10, "cpu") == 64
    assert num_inputs(100 * 2**20, "cpu") <= 3
    assert num_inputs(2**40, "cpu") == 1


def test_a_ratio_is_that_of_the_work_and_shows_its_quartiles():
    clock = Clock()
    slow = iter([0.001] + [0.002, 0.003, 0.003, 0.004, 0.090])  # the first is the warm-up
    ratio = interleaved_ratio(lambda: clock.work(next(slow)), lambda: clock.work(0.001), rounds=5, clock=clock)
    assert (ratio.q25, ratio.median, ratio.q75) == pytest.approx((3.0, 3.0, 4.0))
    assert ratio.rounds == 5


def test_a_ratio_follows_the_given_clock():
    ticks = iter([0.0, 1.0, 1.0, 3.0] + [3.0, 5.0, 5.0, 6.0])  # round 1: a, b; round 2: b, a
    ratio = interleaved_ratio(lambda: None, lambda: None, rounds=2, warmup=0, clock=lambda: next(ticks))
    assert (ratio.q25, ratio.median, ratio.q75) == (0.5, 0.5, 0.5)
    assert str(ratio) == "0.5 (0.5-0.5)"


def test_a_ratio_needs_a_round():
    with pytest.raises(ArgumentError, match="at least one round"):
        interleaved_ratio(lambda: None, lambda: None, rounds=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_events_see_the_work_and_not_its_launch():
    x = torch.randn(4096, 4096, device="cuda")
    times = measure({"one": lambda i: x @ x, "three": lambda i: [x @ x for _ in range(3)]}, device="cuda", budget_s=0.3)
    assert 2.5 < times["three"].median_us / times["one"].median_us < 3.5
