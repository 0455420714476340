"""placement.json: what is saved is what is loaded, and nothing that is not a placement gets through."""

import json

import numpy as np
import pytest

from loka.dispatch.placement.options import PlaceOptions
from loka.dispatch.placement.place import place
from loka.dispatch.placement.record import METHODS, Placement, physical_of_maps
from loka.dispatch.placement.signature import Codes
from loka.errors import ArgumentError, PlanError
from tests.dispatch.made_routing import made_trace


@pytest.fixture(scope="module")
def made():
    return place(made_trace(requests=24, layers=2), PlaceOptions(devices=3, replicas=1))


@pytest.fixture
def document(made, tmp_path):
    made.save(tmp_path / "placement.json")
    return json.loads((tmp_path / "placement.json").read_text())


def test_a_placement_comes_back_as_it_was(made, tmp_path):
    made.save(tmp_path / "p.json")
    again = Placement.load(tmp_path / "p.json")
    assert again == made
    other = made_trace(requests=9, layers=2, seed=3)
    for name in ("paper", "loka"):
        before, after = made.methods[name].signature, again.methods[name].signature
        assert np.array_equal(before.scores(other.prefill), after.scores(other.prefill))


def test_every_method_places_every_expert_and_says_so_in_eplbs_form(made):
    for name in METHODS:
        hosts = made.hosts(name)
        assert hosts.shape == (2, 3, 16)
        assert hosts.any(axis=1).all()
        assert hosts.sum(axis=2).max() <= 7  # 6 of 16 on the first device, and a replica
        maps = made.maps(name)
        assert physical_of_maps(maps.physical_to_logical, 3, 16) == made.methods[name].physical_to_logical


def test_codes_keep_sixteen_bits_of_the_largest_magnitude():
    values = np.random.default_rng(0).normal(size=(2, 3, 4))
    assert np.abs(Codes.of(values).values() - values).max() <= np.abs(values).max() / 65_000
    assert (Codes.of(np.zeros((1, 1, 2))).values() == 0).all()


def edit(path, value):
    def apply(document):
        *parents, last = path
        place = document
        for key in parents:
            place = place[key]
        place[last] = value

    return apply


LOKA = ("methods", "loka")
PHYSICAL = (*LOKA, "physical_to_logical")
SHARE = (*LOKA, "signature", "share")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (edit(("schema",), 2), "schema 2"),
        (edit(("kind",), "loka-plan"), "is not a loka-placement"),
        (edit(("devices",), 4), "4"),
        (edit(("devices",), -1), "whole number"),
        (edit(("nodes",), 2), "do not divide into 2 nodes"),
        (edit(("experts",), 2**40), "more than fit"),
        (edit(("experts",), 15), "does not place"),
        (edit(("layers",), []), "layers are none"),
        (edit(("layers",), [1, 1]), "appears twice"),
        (edit(("slack",), 7.0), "slack"),
        (edit((*PHYSICAL, 0, 0, 0), 99), "does not place the experts 0 to 15"),
        (edit((*PHYSICAL, 0, 0, 0), "0"), "whole number"),
        (edit((*PHYSICAL, 0, 0, 0), -1), "whole number"),
        (edit((*PHYSICAL, 0, 1), [3, 3]), "twice"),
        (edit((*PHYSICAL, 0), []), "devices"),
        (edit(("methods",), {}), "methods are none"),
        (edit((*SHARE, "scale"), float("inf")), "not valid JSON"),
        (edit((*SHARE, "scale"), 1e300), "outside of 0 to 1e"),
        (edit((*SHARE, "codes", 0, 0, 0), 70_000), "outside of 0 to 65535"),
        (edit((*SHARE, "codes", 0, 0), [1, 2]), "equal lengths"),
        (edit((*SHARE, "codes"), []), "equal lengths"),
        (edit((*SHARE, "codes"), [[[32768]]]), "share of its signature"),
        (edit((*LOKA, "signature", "typical", "codes", 0, 0, 0), 0), "negative"),
        (edit((*LOKA, "signature", "rule"), "random"), "one of nearest, balanced"),
        (edit(("surprise",), 1), "unknown"),
    ],
)
def test_a_file_that_is_no_placement_is_refused_in_a_sentence(document, tmp_path, change, words):
    change(document)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(document))
    with pytest.raises(PlanError, match=words):
        Placement.load(path)


def test_a_method_that_is_not_there_is_named_with_those_that_are(made):
    with pytest.raises(ArgumentError, match="linear, eplb, paper, loka"):
        made.hosts("eplp")


@pytest.mark.parametrize(("asked", "highest"), [({"replicas": 2**20 + 1}, 1048576), ({"seed": 2**32}, 4294967295)])
def test_an_option_out_of_its_range_is_told_the_very_range(asked, highest):
    with pytest.raises(ArgumentError, match=f"must lie in 0 to {highest}[.]"):
        PlaceOptions(devices=4, **asked)
