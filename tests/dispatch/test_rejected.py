"""What lost, held as it was considered: it has to be the tuple of its records wherever somebody looks."""

import copy
import pickle
from dataclasses import replace

import pytest

from loka.dispatch.deciding.candidates import Candidate, consider
from loka.dispatch.deciding.decide import conclude
from loka.dispatch.deciding.plan import Plan
from loka.dispatch.deciding.rejected import Rejected, entries_of, told
from loka.dispatch.deciding.requests import request_of
from loka.dispatch.measuring.profile import TimeTable
from tests.dispatch.made_evidence import BOUND, HOPPER, built_in, decided, made_plan, product, recipe, timings

TIMES = {"torch.mm.bf16": 20.0, "torch.scaled_mm.rowwise": 10.0, "triton.gemm.rowwise": 9.0}
SEEN = product(recipes=(recipe("rowwise", 0.03), recipe("tensorwise", 0.2)))


def considered():
    times = TimeTable(timings(TIMES, of=SEEN))
    return consider(request_of(SEEN), SEEN, BOUND, built_in(), times, HOPPER)


def records(found):
    """The records, made here from the cases one by one."""
    made = []
    for case, (code, reason) in found.rejected:
        time, judged = case.offer.time, case.judged
        made.append(
            Candidate(
                kernel=case.spec.name,
                recipe=case.spec.recipe,
                code=code,
                reason=reason,
                time_us=None if time is None else time.median_us,
                spread_us=None if time is None else time.spread_us,
                error_mean=judged.mean,
                error_upper=judged.upper,
                loss=judged.loss,
            )
        )
    return tuple(sorted(made, key=lambda each: each.kernel))


def test_it_is_the_tuple_of_records_by_name():
    found = considered()
    expected = records(found)
    rejected = Rejected(found.rejected)
    assert len(expected) > 5
    assert rejected == expected
    assert expected == rejected
    assert rejected == Rejected(reversed(found.rejected))
    assert (len(rejected), hash(rejected), repr(rejected)) == (len(expected), hash(expected), repr(expected))
    assert (rejected[0], rejected[-1], rejected[1:3]) == (expected[0], expected[-1], expected[1:3])
    assert expected[0] in rejected
    assert rejected != expected[1:]
    assert rejected != list(expected)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_leaves_the_evidence_behind(copied):
    rejected = Rejected(considered().rejected)
    found = copied(rejected)
    assert found == rejected
    assert all(isinstance(each, Candidate) for each in found.entries)


def test_others_are_told_in_their_place_and_one_is_left_out():
    rejected = Rejected(considered().rejected)
    other = replace(rejected[2], kernel="m.other")
    gone = rejected[3].kernel
    expected = tuple(sorted((*(each for each in rejected if each.kernel != gone), other), key=lambda each: each.kernel))
    assert told(rejected, [other], without=gone) == expected
    assert told(tuple(rejected), [other], without=gone) == expected
    assert told(rejected, [], without="no.such.kernel") == rejected
    assert [each.kernel for each in Rejected(entries_of(rejected, without=gone))] == [
        each.kernel for each in rejected if each.kernel != gone
    ]


def test_a_decision_has_every_record_and_a_plan_reads_them_back():
    found = considered()
    decision = conclude(found)
    assert decision == decided(TIMES, evidence=SEEN)
    assert {each.kernel for each in records(found)} < {each.kernel for each in decision.rejected}
    plan = made_plan(decision)
    read = Plan.parse(plan.text().encode(), "plan")
    assert read == plan
    assert read.hash == plan.hash
    assert type(read.decisions[0].rejected) is tuple
