"""The plan file: same decisions, same bytes; anything else is refused with the place that is wrong."""

import contextlib
import json
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from loka.bounds import Bound
from loka.dispatch.deciding.plan import Plan
from loka.errors import PlanError
from tests.dispatch.made_conversion import plan_for
from tests.dispatch.made_evidence import AMPERE, HOPPER, built_in, decided, made_plan, product, recipe

ROW, BASE = "torch.scaled_mm.rowwise", "torch.mm.bf16"
TIMES = {BASE: 20.0, ROW: 10.0}


def decisions():
    up = product("up", recipes=(recipe("rowwise", 0.03, horizon=400),))
    down = product("down", product="dgrad", recipes=(recipe("rowwise", 0.3),))
    attention = product("attention", op="bmm", batch=8)
    return tuple(decided(TIMES, evidence=each) for each in (up, down, attention))


@pytest.fixture
def document(tmp_path):
    """Save a plan, change its JSON, and give back the path."""

    def write(change=lambda data: None):
        path = tmp_path / "plan.json"
        made_plan(*decisions()).save(path)
        data = json.loads(path.read_text())
        path.write_text(json.dumps(change(data) or data))
        return path

    return write


def test_a_plan_survives_saving_and_loading(tmp_path):
    plan = made_plan(*decisions())
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.hash == plan.hash
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()


def test_the_file_has_one_line_per_decision_and_speaks_of_passes(tmp_path):
    made_plan(*decisions()).save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    data = json.loads(text)
    assert (data["kind"], data["schema"]) == ("loka-plan", 1)
    assert [each["request"]["pass"] for each in data["decisions"]] == ["fprop", "dgrad", "fprop"]
    assert sum(line.startswith('{"baseline"') for line in text.splitlines()) == 3


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_the_order_of_decisions_changes_neither_bytes_nor_hash(seed, tmp_path_factory):
    shuffled = list(decisions())
    random.Random(seed).shuffle(shuffled)
    assert made_plan(*shuffled) == made_plan(*decisions())
    assert made_plan(*shuffled).hash == made_plan(*decisions()).hash


def test_the_hash_follows_the_content_and_not_the_date():
    plan = made_plan(*decisions())
    assert replace(plan, created="2030-01-01").hash == plan.hash
    assert replace(plan, bound=Bound(row_error=0.06)).hash != plan.hash
    assert replace(plan, decisions=plan.decisions[:2]).hash != plan.hash
    assert replace(plan, fingerprint={"up.weight": (768, 257)}).hash != plan.hash
    assert len(plan.hash) == 64


def test_a_plan_is_shown_in_one_line():
    shown = repr(made_plan(*decisions()))
    assert "3 decisions on 3 sites" in shown
    assert "row_error" in shown
    assert len(shown) < 200


def test_saving_leaves_no_other_file(tmp_path):
    made_plan(*decisions()).save(tmp_path / "plan.json")
    made_plan().save(tmp_path / "plan.json")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert Plan.load(tmp_path / "plan.json").decisions == ()


def request(index=0, **changes):
    return lambda data: data["decisions"][index]["request"].update(changes)


def decision(index=0, **changes):
    return lambda data: data["decisions"][index].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(schema=2), "reads schema 1"),
        (lambda data: data.update(kind="plan"), "is not a loka-plan"),
        (lambda data: data.pop("bound") and None, "'bound' is missing"),
        (lambda data: data.update(bound={"row_error": 0.05, "loss": 0.1}), "limits exactly one thing"),
        (lambda data: data.update(fingerprint=[1]), r"\.fingerprint: an object is needed"),
        (lambda data: data.update(fingerprint={"a": [-1]}), r"\.fingerprint\['a'\]\[0\]: a whole number"),
        (lambda data: data.update(environment={"torch": 2}), r"\.environment\['torch'\]: a text"),
        (lambda data: data.update(notes="none"), r"\.notes: a list"),
        (lambda data: data["decisions"].append(data["decisions"][0]), "decided twice"),
        (request(m=-1), r"\.decisions\[0\]\.request\.m: a whole number from 0"),
        (request(m=1), "m is 1, outside of 2048 to 2048"),
        (request(op="matmul"), r"\.request\.op: one of linear"),
        (request(op=["linear"]), r"\.request\.op: one of linear"),
        (request(site=""), "names no site"),
        (decision(kernel=""), "names no kernel"),
        (decision(time_us=0.0), "takes no time"),
        (decision(speed=2), "'speed' is unknown"),
        (decision(2, recipe=None), "has no recipe and is not the baseline"),
        (
            lambda data: data["decisions"][0]["rejected"][0].update(code="bad"),
            r"\.rejected\[0\]\.code: one of unavailable",
        ),
        (lambda data: data["decisions"][0].update(rejected=[None]), r"\.rejected\[0\]: an object"),
    ],
)
def test_a_plan_that_is_wrong_is_refused_and_the_place_is_named(document, change, message):
    with pytest.raises(PlanError, match=message):
        Plan.load(document(change))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(value=JSON, data=st.data())
def test_any_value_in_any_place_is_read_or_refused_but_never_crashes(value, data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    made_plan(*decisions()).save(folder / "plan.json")
    document = json.loads((folder / "plan.json").read_text())
    place = document
    while data.draw(st.booleans()) and isinstance(place, dict | list) and place:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key]:
            break
        place = place[key]
    key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    place[key] = value
    (folder / "plan.json").write_text(json.dumps(document))
    with contextlib.suppress(PlanError):
        assert isinstance(Plan.load(folder / "plan.json"), Plan)


def test_a_decision_is_found_by_site_and_pass():
    plan = made_plan(*decisions())
    assert plan.decision("up", "fprop").kernel == ROW
    assert plan.decision("down", "grad_input").kernel == BASE
    assert plan.decision("_orig_mod.up", "output").kernel == ROW


@pytest.mark.parametrize(
    ("site", "name", "message"),
    [("upp", "fprop", "Nearest: 'up'"), ("up", "wgrad", "It has fprop of this site")],
)
def test_a_decision_that_is_not_there_names_what_is(site, name, message):
    with pytest.raises(PlanError, match=message):
        made_plan(*decisions()).decision(site, name)


def test_the_share_in_fp8_is_that_of_the_operations():
    big = decided(TIMES, evidence=product("big", recipes=(recipe("rowwise", 0.03),)))
    small_evidence = product("small", m=512, m_min=512, m_max=512)
    small = decided({}, evidence=small_evidence)
    assert made_plan(big, small).fp8_share() == pytest.approx(0.8)
    assert made_plan(small).fp8_share() == 0.0
    assert made_plan().fp8_share() == 0.0


class Model(nn.Module):
    def __init__(self, columns=256, tied=False):
        super().__init__()
        self.up = nn.Linear(columns, 768)
        self.down = nn.Linear(768, columns, bias=False)
        if tied:
            self.head = nn.Linear(columns, 768, bias=False)
            self.head.weight = self.up.weight


FINGERPRINT = {"up.weight": (768, 256), "up.bias": (768,), "down.weight": (256, 768)}


def test_the_model_it_was_made_for_is_accepted_wrapped_or_not():
    plan = made_plan(fingerprint=FINGERPRINT)
    model = Model()
    plan.check_model(model)
    plan.check_model(torch.compile(model))
    plan.check_model(nn.DataParallel(model))


@pytest.mark.parametrize("name", ["up.weight", "head.weight"])
def test_a_shared_parameter_may_go_by_any_of_its_names(name):
    fingerprint = {**FINGERPRINT}
    del fingerprint["up.weight"]
    made_plan(fingerprint={**fingerprint, name: (768, 256)}).check_model(Model(tied=True))


def test_another_model_is_refused_with_the_differences():
    renamed = {"upp.weight": (768, 256), "up.bias": (768,), "down.weight": (256, 768)}
    with pytest.raises(
        PlanError, match=r"upp\.weight is missing\. Nearest: 'up\.weight'.*; up\.weight is not in the plan"
    ):
        made_plan(fingerprint=renamed).check_model(Model())
    with pytest.raises(PlanError, match=r"up\.weight is \[768, 128\], planned for \[768, 256\]"):
        made_plan(fingerprint=FINGERPRINT).check_model(Model(columns=128))


def test_at_most_three_differences_are_named():
    with pytest.raises(PlanError, match="and 4 more"):
        made_plan(fingerprint={f"layer{i}.weight": (1,) for i in range(4)}).check_model(Model())


def test_unknown_kernels_are_loaded_and_reported(document):
    plan = Plan.load(document(decision(2, kernel="torch.scaledmm.rowwise")))
    (problem,) = plan.kernel_problems(built_in(), HOPPER)
    assert "torch.scaledmm.rowwise is unknown here" in problem
    assert "'torch.scaled_mm.rowwise'" in problem


def test_kernels_that_cannot_run_here_or_mean_something_else_are_reported(document):
    plan = made_plan(*decisions())
    assert plan.kernel_problems(built_in(), HOPPER) == ()
    (problem,) = plan.kernel_problems(built_in(), AMPERE)
    assert "needs CUDA compute capability 8.9" in problem
    other = Plan.load(document(decision(2, recipe="tensorwise")))
    assert "has the recipe rowwise here, not tensorwise" in other.kernel_problems(built_in(), HOPPER)[0]


def test_a_name_that_no_file_may_hold_is_refused_when_it_is_written(tmp_path):
    model = nn.Sequential()
    model.add_module("a\nb", nn.Linear(16, 16))
    plan = plan_for(model, {"a\nb": {"fprop": "tensorwise"}})
    with pytest.raises(PlanError, match=r"'a\\nb.weight' of this model holds control characters.*Rename the module"):
        plan.save(tmp_path / "plan.json")
    assert not (tmp_path / "plan.json").exists()
    assert plan.hash
