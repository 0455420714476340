"""What a run remembers of a layer with its norm and activation, as it is kept and merged."""

import numpy as np
import pytest

from loka.errors import ArgumentError
from loka.probes.capturing.epilogues import Epilogue
from loka.probes.distributions.gather import packed
from loka.probes.records import LearnedRecord
from loka.probes.sampling.learning import EPILOGUE, Learner, merged, restore


def record(steps, samples=1):
    data = packed(Epilogue(steps).arrays())
    return LearnedRecord(site="up", product="fprop", kind=EPILOGUE, samples=samples, step=7, data=data)


def test_it_comes_back_as_it_was_kept_and_ranks_add_up():
    assert restore(record(3)) == Epilogue(3)
    (both,) = merged([record(3, 3), record(2, 2)])
    assert (restore(both), both.samples) == (Epilogue(5), 5)


def test_each_sampled_step_counts_once():
    learner = Learner.within(0)
    for step in range(4):
        learner.learn_epilogue("up", step)
    (found,) = learner.records({"up": "up"})
    assert (found.kind, found.product, found.samples, restore(found)) == (EPILOGUE, "fprop", 4, Epilogue(4))


@pytest.mark.parametrize("arrays", [{}, {"steps": np.asarray([0])}, {"steps": np.asarray([1, 2])}])
def test_what_is_damaged_is_told(arrays):
    with pytest.raises(ArgumentError):
        Epilogue.from_arrays(arrays)
