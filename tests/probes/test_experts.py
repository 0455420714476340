"""Experts told apart: tokens and errors by expert, against counts and casts made here."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loka.bounds import Limit
from loka.errors import ArgumentError
from loka.numerics import ProductError
from loka.probes.distributions.gather import packed, unpacked
from loka.probes.experts.layers import parts_of, unseen_experts
from loka.probes.experts.statistics import MIN_MEASURED, ExpertStatistics
from loka.probes.experts.verdicts import judge_experts, unsafe_experts
from loka.probes.judging.intervals import MIN_SAMPLES
from loka.probes.judging.predictions import read_experts
from loka.probes.storing.database import open_database
from tests.probes.made_fragile_experts import (
    EXPERTS,
    FRAGILE,
    IN,
    OUT,
    TOKENS,
    Everyone,
    Grouped,
    Looped,
    Stacked,
    rows,
    train_probed,
)


def error(value):
    return ProductError(
        row_error=value, row_error_p99=value, relative_error=value, sqnr_db=20.0, mere=value, rows=4, zero_rows=0,
        bad_rows=0,
    )  # fmt: skip


def probed(model, path, steps=12):
    train_probed(model, path, steps)
    engine = open_database(path, create=False)
    try:
        return {key: value for key, value in read_experts(engine).items() if key[0] == model.site}
    finally:
        engine.dispose()


def cast(x):
    """Round to e4m3 with one scale for the whole, with ml_dtypes."""
    scale = np.abs(x).max() / 448.0
    return (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


def expected(model, expert, step):
    start = sum(TOKENS[:expert])
    x = rows(step)[start : start + TOKENS[expert]].double().numpy()
    weights = model.get_parameter(model.site).detach().double().numpy()
    weight = weights.reshape(EXPERTS, OUT, IN)[expert]
    exact, rounded = x @ weight.T, cast(x) @ cast(weight).T
    return float((np.linalg.norm(rounded - exact, axis=1) / np.linalg.norm(exact, axis=1)).mean())


@pytest.mark.parametrize("kind", [Grouped, Looped, Stacked, Everyone])
def test_tokens_and_errors_are_those_of_each_expert(tmp_path, kind):
    torch.manual_seed(3)
    model = kind()
    found = probed(model, tmp_path / "run.db", steps=40)
    assert set(found) == {(kind.site, name) for name in ("fprop", "dgrad", "wgrad")}
    for statistics in found.values():
        assert (statistics.tokens / statistics.steps).tolist() == list(TOKENS)
        assert statistics.idle == (1,)
        assert statistics.shares == tuple(sorted((count / sum(TOKENS) for count in TOKENS), reverse=True))
        assert statistics.imbalance == pytest.approx(max(TOKENS) * EXPERTS / sum(TOKENS))
    statistics = found[kind.site, "fprop"]
    errors = {each.expert: each for each in statistics.errors("tensorwise")}
    assert len(errors) >= 4
    assert errors[FRAGILE] == statistics.errors("tensorwise")[0]
    for expert, each in errors.items():
        by_step = [expected(model, expert, step) for step in range(40)]
        # The steps measured are some of those, and of the busiest experts some rows.
        spread = 4 * np.std(by_step) / math.sqrt(each.samples) + 0.02 * each.mean
        assert each.mean == pytest.approx(np.mean(by_step), abs=spread)
        assert each.worst <= max(by_step) * 1.15


def test_a_fragile_expert_is_named_and_the_others_are_not(tmp_path):
    statistics = probed(Grouped(), tmp_path / "run.db", steps=60)["weight_of", "fprop"]
    limit = Limit(metric="row_error", value=0.08)
    verdicts = judge_experts(statistics, "tensorwise", limit, 0.95)
    assert unsafe_experts(statistics, "tensorwise", limit, 0.95) == (FRAGILE,)
    assert all(verdict == "safe" for expert, verdict in verdicts.items() if expert != FRAGILE)
    assert unsafe_experts(statistics, "tensorwise", Limit(metric="loss", value=1e-4), 0.95) == ()


def test_too_few_samples_judge_no_expert():
    few = ExpertStatistics.of([4, 4], {0: [error(1.0)], 1: [error(0.01)]}, ["rowwise"])
    states = [few]
    while len(states) < MIN_SAMPLES - 1:
        states.append(states[-1].merge(few))
    assert few.errors("rowwise") == ()
    assert few.pooled("rowwise").mean == pytest.approx(0.505)
    assert len(states[MIN_MEASURED - 1].errors("rowwise")) == 2
    assert set(judge_experts(states[-1], "rowwise", Limit(metric="row_error", value=0.1), 0.95).values()) == {
        "undecided"
    }
    enough = states[-1].merge(few)
    assert judge_experts(enough, "rowwise", Limit(metric="row_error", value=0.1), 0.95) == {0: "unsafe", 1: "safe"}


sample = st.builds(
    lambda tokens, errors: ExpertStatistics.of(tokens, {e: [error(v)] for e, v in errors.items()}, ["rowwise"]),
    st.lists(st.integers(0, 1000), min_size=4, max_size=4),
    st.dictionaries(st.integers(0, 3), st.one_of(st.floats(0, 2), st.just(math.nan)), max_size=4),
)


def close(a, b):
    return all(np.allclose(a.arrays()[k], b.arrays()[k], rtol=1e-12) for k in a.arrays() if k != "recipes")


@given(sample, sample, sample)
def test_merging_is_associative_and_free_of_order(a, b, c):
    assert close(a.merge(b).merge(c), c.merge(a).merge(b))
    assert close(a.merge(b.merge(c)), a.merge(b).merge(c))


@given(sample)
def test_what_is_stored_comes_back(state):
    back = ExpertStatistics.from_arrays(unpacked(packed(state.arrays())))
    assert (back.recipes, back.steps) == (state.recipes, state.steps)
    assert close(back, state)


@pytest.mark.parametrize(
    "damage",
    [
        {"recipes": np.asarray([1.0])},
        {"recipes": np.asarray(["rowwise", "rowwise"])},
        {"tokens": np.asarray([-1.0, 2.0])},
        {"tokens": np.asarray([np.nan, 2.0])},
        {"active": np.asarray([5, 0])},
        {"measured": np.asarray([[-1], [0]])},
        {"total": np.zeros((3, 1))},
        {"steps": np.asarray(0)},
    ],
    ids=str,
)
def test_a_damaged_state_is_refused(damage):
    state = ExpertStatistics.of([1, 2], {0: [error(0.1)]}, ["rowwise"]).arrays()
    with pytest.raises(ArgumentError):
        ExpertStatistics.from_arrays({**state, **damage})


def test_states_of_different_layers_do_not_merge():
    one, other = (ExpertStatistics.of([1] * count, {}, ["rowwise"]) for count in (2, 3))
    with pytest.raises(ArgumentError, match="different layers"):
        one.merge(other)


def test_parts_of_a_layer_are_told_from_shapes():
    fingerprint = {
        "layers.0.mlp.gate.weight": (8, 64),
        "layers.0.mlp.experts.gate_up_proj": (8, 96, 64),
        "layers.0.mlp.experts.gate_up_proj_bias": (8, 96),
        "layers.0.mlp.shared_expert.gate_proj.weight": (96, 64),
        "layers.0.mlp.shared_expert_gate.weight": (1, 64),
        "layers.0.self_attn.q_proj.weight": (64, 64),
        "layers.1.mlp.gate_proj.weight": (96, 64),  # a dense layer
        "encoder.mlp.router.classifier.weight": (4, 64),
        "encoder.mlp.experts.expert_0.wi.weight": (96, 64),
        "encoder.mlp.experts.expert_3.wi.weight": (96, 64),
        "cross.kernels": (4, 64, 64),  # a stack, of no experts
    }
    assert parts_of(fingerprint) == {
        "layers.0.mlp.gate.weight": "router",
        "layers.0.mlp.experts.gate_up_proj": "expert",
        "layers.0.mlp.experts.gate_up_proj_bias": "expert",
        "layers.0.mlp.shared_expert.gate_proj.weight": "shared",
        "layers.0.mlp.shared_expert_gate.weight": "shared",
        "encoder.mlp.router.classifier.weight": "router",
        "encoder.mlp.experts.expert_0.wi.weight": "expert",
        "encoder.mlp.experts.expert_3.wi.weight": "expert",
    }


def test_a_router_tells_the_experts_beside_it_where_no_name_does():
    layer = {
        "mlp.router.layer.weight": (4, 64),
        "mlp.input_linear.weight": (4, 192, 64),  # JetMoE
        "mlp.output_linear.weight": (4, 64, 96),
        "mlp.bias": (64,),
        "moe.gate.weight": (4, 64),
        "moe.w1": (4, 64, 96),  # held by the layer itself
        "moe.w1_bias": (4, 96),
        "moe.out": (64, 32),
        "ffn.router.layer.weight": (4, 64),
        "ffn.experts.mlp.w1": (384, 64),  # DBRX: one below the other
        "ffn.experts.mlp.w2": (384, 64),
    }
    beside = {
        "mixer.gate.weight": (64, 64),
        "mixer.conv1d.weight": (64, 1, 4),  # has as many rows, and reads something else
        "attention.router.weight": (3, 64),
        "attention.kernels": (4, 64, 64),  # more than there are to choose from
        "dense.experts.mlp.w1": (384, 64),  # nothing chooses
    }
    parts = parts_of(layer | beside)
    assert {name: part for name, part in parts.items() if part != "router"} == dict.fromkeys(
        [
            *("mlp.input_linear.weight", "mlp.output_linear.weight"),
            *("moe.w1", "moe.w1_bias", "ffn.experts.mlp.w1", "ffn.experts.mlp.w2"),
        ],
        "expert",
    )
    assert {name for name, part in parts.items() if part == "router"} == {
        "mlp.router.layer.weight",
        "moe.gate.weight",
        "ffn.router.layer.weight",
    }


def test_a_router_may_be_a_network_or_choose_more_than_there_is_and_shared_experts_may_stand_beside():
    parts = parts_of(
        {
            "layers.0.mlp.gate.router_mlp.fc1.weight": (256, 64),  # Zaya: of a row for no expert, too
            "layers.0.mlp.gate.router_mlp.out_proj.weight": (5, 256),
            "layers.0.mlp.experts.gate_up_proj": (4, 96, 64),
            "layers.1.mlp.router.classifier.weight": (6, 64),  # LongCat: two of them compute nothing
            "layers.1.mlp.experts.gate_up_proj": (6, 96, 64),
            "layers.1.mlp.experts.down_proj": (4, 64, 48),
            "layers.2.moe.router.weight": (4, 64),
            "layers.2.moe.experts.gate_up_proj": (4, 96, 64),
            "layers.2.shared_mlp.input_linear.weight": (96, 64),  # Granite
            "layers.2.attention.shared.weight": (96, 64),
            "layers.3.shared_mlp.input_linear.weight": (96, 64),  # without experts
        }
    )
    assert {name: part for name, part in parts.items() if part != "expert"} == {
        "layers.0.mlp.gate.router_mlp.fc1.weight": "router",
        "layers.0.mlp.gate.router_mlp.out_proj.weight": "router",
        "layers.1.mlp.router.classifier.weight": "router",
        "layers.2.moe.router.weight": "router",
        "layers.2.shared_mlp.input_linear.weight": "shared",
    }


def test_experts_that_are_modules_and_left_no_trace_are_named():
    fingerprint = {f"mlp.experts.{expert}.{name}": (4, 4) for expert in range(3) for name in ("w1", "w2")}
    fingerprint |= {"other.experts.0.w1": (4, 4), "head.weight": (4, 4)}
    assert unseen_experts(fingerprint, {"mlp.experts.1.w2", "head.weight"}) == {"mlp.experts": (0, 2)}
    assert unseen_experts(fingerprint, {f"mlp.experts.{expert}.w1" for expert in range(3)}) == {}
    assert unseen_experts(fingerprint, {"head.weight"}) == {}


def test_what_is_not_an_experts_takes_no_part_in_any_pass(tmp_path):
    """Gradients of tokens that are another expert's need not be zero, as those of the weights' input are."""
    torch.manual_seed(3)
    found = probed(Everyone(), tmp_path / "run.db", steps=40)
    for name, statistics in found.items():
        measured = [each.expert for each in statistics.errors("tensorwise")]
        assert 1 not in measured, name
        assert statistics.measured[1].tolist() == [0, 0], name
