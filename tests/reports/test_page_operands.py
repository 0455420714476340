"""Histograms of the page: their texts, and that reading many at once says the same as reading each by itself."""

import math

import numpy as np
import pytest
import torch

from loka.probes.distributions.alike import stacked
from loka.probes.distributions.closed_form import ProductStatistics
from loka.probes.distributions.gather import packed, unpacked
from loka.probes.distributions.histograms import AMAX_BIN, BELOW, BINS, BINS_PER_OCTAVE
from loka.probes.records import LearnedRecord
from loka.probes.sampling.learning import STATISTICS
from loka.probes.storing.database import open_database
from loka.probes.storing.writer import RunWriter
from loka.reports.page import operands
from loka.reports.page.levels import BINS_OF_AN_OCTAVE, level_texts, levels_of
from loka.reports.page.operands import histograms
from tests.probes.made_records import made_info, made_progress


def plain_levels(energy):
    """Return the levels of one histogram, bin by bin."""
    width = BINS_PER_OCTAVE // BINS_OF_AN_OCTAVE
    parts = [energy[AMAX_BIN], *energy[AMAX_BIN + 1 : BELOW].reshape(-1, width).sum(axis=1), energy[BELOW]]
    total = energy.sum()
    levels = [10 * math.log10(part / total) if part else -math.inf for part in parts]
    result = [round(level) if level > -120 else None for level in levels]
    while result and result[-1] is None:
        result.pop()
    return result


@pytest.mark.parametrize("spread", [0.5, 3.0, 12.0])  # the last: rises of more than fifty decibels
def test_a_text_holds_the_levels_of_a_histogram(spread):
    rng = np.random.default_rng(0)
    energy = np.exp(spread * rng.normal(size=(200, BINS)) - 0.1 * np.arange(BINS))
    energy[rng.random(energy.shape) < 0.4] = 0.0
    energy[0], energy[1] = 0.0, np.eye(BINS)[100]
    texts = level_texts(energy)
    assert [list(levels_of(text)) for text in texts] == [[], *map(plain_levels, energy[1:])]


def statistics(seed, product="fprop", features=96):
    torch.manual_seed(seed)
    return ProductStatistics.of(torch.randn(24, features), 0.1 * torch.randn(40, features), product)


def test_states_of_one_layout_are_read_at_once_and_are_what_each_holds():
    payloads = [packed(statistics(seed).arrays()) for seed in range(4)]
    payloads += [b"nothing", packed({"x": np.arange(3)}), packed(statistics(9, "dgrad").arrays())]
    names = ("shape", "a.energy", "b.kinds")
    found = {
        place: {name: array[at] for name, array in arrays.items()}
        for places, arrays in stacked(payloads, names)
        for at, place in enumerate(places)
    }
    assert sorted(found) == [0, 1, 2, 3, 6]
    for place, arrays in found.items():
        expected = unpacked(payloads[place])
        assert set(arrays) == set(names)
        for name in names:
            np.testing.assert_array_equal(arrays[name], expected[name])


@pytest.mark.parametrize("place", [200, 1200, 3000])
def test_a_changed_byte_is_not_read_with_the_others(place):
    whole = packed(statistics(0).arrays())
    changed = bytearray(whole)
    changed[place] ^= 0x11
    alike = [places for places, _ in stacked([whole, bytes(changed), whole], operands._NAMES)]
    assert [0, 2] in alike
    assert all(1 not in places or places == [1] for places in alike)


@pytest.fixture
def learned(tmp_path):
    """A database with the statistics of three sites, of other widths, one of them damaged."""
    path = tmp_path / "run.db"
    writer = RunWriter(path, made_info())
    records = [
        LearnedRecord(site=site, product=product, kind=STATISTICS, samples=5, step=7, data=data)
        for seed, (site, width) in enumerate([("a", 96), ("b", 96), ("c", 300)])
        for product in ("fprop", "dgrad", "wgrad")
        for data in [packed(statistics(seed, product, width).arrays())]
    ]
    bad = LearnedRecord(site="d", product="fprop", kind=STATISTICS, samples=5, step=7, data=records[0].data[:-9])
    writer.learned([*records, bad], final=True)
    writer.finish(made_progress(8))
    return path


def test_histograms_of_a_database_are_those_of_each_record_by_itself(learned, monkeypatch):
    engine = open_database(learned, create=False)
    at_once = histograms(engine, None)
    monkeypatch.setattr(operands, "stacked", lambda payloads, names: iter(()))
    alone = histograms(engine, None)
    engine.dispose()
    assert at_once == alone
    assert list(at_once) == ["a", "b", "c"]
    assert all(set(roles) == {"input", "weight", "grad_output"} for roles in at_once.values())
    expected = statistics(0).a.by_group[None, None].energy
    (text,) = (text for words, text in at_once["a"]["input"]["groups"].items() if "tensor" in words.split(", "))
    assert list(levels_of(text)) == plain_levels(expected)


def test_only_the_sites_that_are_wanted_have_histograms(learned):
    engine = open_database(learned, create=False)
    assert list(histograms(engine, None, frozenset({"b"}))) == ["b"]
    engine.dispose()
