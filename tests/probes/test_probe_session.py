"""A probe from the outside: its arguments, what it records, and what it tells of a loop it cannot see into."""

import re
import time

import pytest
import torch
from torch import nn

import loka
from loka.errors import ArgumentError, DatabaseError, EvidenceError
from loka.formats import DEFAULT_RECIPES
from loka.probes.judging.evidence import load_evidence
from tests.probes.made_probe import PASSES_OF_TWO, Two, assert_nothing_attached, probed, product, recorded, train
from tests.probes.made_session import warned


def stable(value: object) -> str:
    """Name a case the same in every process: without addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


# --- before the first step ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": 0}, r"every=0: one step in how many"),
        ({"every": -5}, r"every=-5"),
        ({"every": 2.5}, r"every=2\.5"),
        ({"every": True}, r"every=True"),
        ({"every": "10"}, r"every='10'"),
        ({"overhead": 0}, r"overhead=0: the share"),
        ({"overhead": -0.1}, r"overhead=-0\.1"),
        ({"overhead": float("nan")}, r"overhead=nan"),
        ({"overhead": float("inf")}, r"overhead=inf"),
        ({"overhead": "1%"}, r"overhead='1%'"),
        ({"recipes": ["rowwize"]}, r"no recipe 'rowwize'.*Nearest: 'rowwise'"),
        ({"recipes": "tensorwize"}, r"no recipe 'tensorwize'.*Nearest: 'tensorwise'"),
        ({"filter_fn": lambda module, fqn: fqn == "upp"}, r"admits none of the 3 modules of Two.*'up', 'down'"),
        ({"filter_fn": "up*"}, r"filter_fn='up\*': it is a function"),
        ({"loss": "cross-entropy"}, r"probe\(loss='cross-entropy'\).* Nearest: 'cross_entropy'"),
        ({"loss": 0.1}, r"probe\(loss=0.1\): a loss is 'bce', 'cross_entropy', or a callable"),
        ({"process_group": object()}, r"process_group"),
    ],
    ids=stable,
)
def test_wrong_arguments_are_told_at_once_and_nothing_is_made(tmp_path, options, words):
    path = tmp_path / "run.db"
    with pytest.raises(ArgumentError, match=words):
        loka.probe(Two(), path, **options)
    assert not path.exists()


@pytest.mark.parametrize("model", [lambda x: x, Two, None, torch.nn.functional.linear], ids=stable)
def test_what_is_no_module_is_refused(tmp_path, model):
    with pytest.raises(ArgumentError, match=r"watches a torch\.nn\.Module, not"):
        loka.probe(model, tmp_path / "run.db")


def test_a_model_whose_shapes_are_not_known_yet_is_refused(tmp_path):
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(ArgumentError, match=r"'0\.weight' of Sequential has no shape yet \(2 lazy"):
        loka.probe(model, tmp_path / "run.db")
    model(torch.randn(2, 3))
    probed(model, tmp_path, lambda: train(model, width=3))


def test_a_filter_may_name_a_parameter_that_is_no_module(tmp_path):
    model = Two()
    model.W = nn.Parameter(torch.randn(3, 3))
    loka.probe(model, tmp_path / "run.db", filter_fn=lambda module, fqn: fqn == "W")


def test_a_filter_on_a_model_of_one_module_names_its_root(tmp_path):
    with pytest.raises(ArgumentError, match=r"this model has only its root, ''"):
        loka.probe(nn.Linear(3, 3), tmp_path / "run.db", filter_fn=lambda module, fqn: False)


def test_integers_of_other_libraries_and_one_recipe_by_name_are_fine(tmp_path):
    import numpy as np

    model = Two()
    run, steps = probed(
        model, tmp_path, lambda: train(model), every=np.int64(2), overhead=np.float32(50), recipes="rowwise"
    )
    assert (run.info.every, run.info.overhead_budget, run.info.recipes) == (2, 50.0, ("rowwise",))
    assert set(product(steps[0], "up").errors) == {"rowwise"}


def test_a_recipe_named_twice_is_measured_once(tmp_path):
    model = Two()
    run, _ = probed(model, tmp_path, lambda: train(model), recipes=["rowwise", "rowwise", "mxfp8"])
    assert run.info.recipes == ("rowwise", "mxfp8")


@pytest.mark.parametrize("where", ["directory", "no-folder", "text-file", "wrong-url"])
def test_a_database_that_cannot_be_written_is_told_before_the_first_step(tmp_path, where):
    model = Two()
    path = {
        "directory": tmp_path,
        "no-folder": tmp_path / "missing" / "run.db",
        "text-file": tmp_path / "notes.txt",
        "wrong-url": "mysql://host/name",
    }[where]
    (tmp_path / "notes.txt").write_text("not a database")
    entered = False
    with pytest.raises(DatabaseError), loka.probe(model, path):
        entered = True
    assert not entered
    assert_nothing_attached(model)
    train(model)


# --- what is recorded of the run ---


def test_the_run_says_where_and_how_it_was_made(tmp_path):
    model = torch.compile(Two(), backend="eager")
    run, _ = probed(model, tmp_path, lambda: train(model, 5), every=3)
    info, progress = run.info, run.progress
    assert (info.model, info.every, info.recipes, info.world_size) == ("Two", 3, DEFAULT_RECIPES, 1)
    assert info.fingerprint == {
        "up.weight": (32, 16),
        "up.bias": (32,),
        "down.weight": (16, 32),
        "down.bias": (16,),
    }
    assert info.environment.device.startswith("cpu")
    assert info.environment.torch == torch.__version__
    assert (progress.steps, progress.sampled_steps, progress.skipped_samples) == (5, 2, 0)
    assert (progress.status, progress.reason, progress.unattributed) == ("complete", "", 0)
    assert 0 < progress.probe_s < progress.wall_s


def test_progress_can_be_asked_at_any_time(tmp_path):
    model = Two()
    probe = loka.probe(model, tmp_path / "run.db", every=2)
    assert (probe.progress.steps, probe.progress.status) == (0, "complete")
    with probe:
        train(model, 4)
        assert (probe.progress.steps, probe.progress.sampled_steps, probe.progress.status) == (4, 2, "running")
    assert (probe.progress.steps, probe.progress.status) == (4, "complete")
    wall_s = probe.progress.wall_s
    time.sleep(0.01)
    assert probe.progress.wall_s == wall_s


def test_evidence_can_be_read_from_what_a_probe_wrote(tmp_path):
    model = Two()
    probed(model, tmp_path, lambda: train(model, 30), every=1)
    evidence = load_evidence(tmp_path / "run.db")
    assert {(entry.site, entry.product) for entry in evidence.products} == set(PASSES_OF_TWO)
    for entry in evidence.products:
        for found in entry.recipes:
            assert found.samples == 30
            assert 0.01 < found.error.mean < 0.1


# --- nothing to see ---


def test_a_loop_that_calls_something_else_is_told_early_and_at_the_end(tmp_path):
    model, other, told = Two(), Two(), []
    with pytest.raises(EvidenceError, match=r"saw no forward of Two.*very object.*model\.forward"):
        warned(model, tmp_path, lambda probe: train(other, 15), told)
    assert len(told) == 1
    assert "saw no forward of Two" in told[0]
    assert recorded(tmp_path / "run.db")[0].progress.steps == 0


def test_forward_called_past_the_module_is_told(tmp_path):
    model = Two()
    with pytest.raises(EvidenceError, match=r"not model\.forward"), loka.probe(model, tmp_path / "run.db"):
        train(model.forward, 3)


class CallsItself(Two):
    """A class with a way of its own into its forward, as GPyTorch's are."""

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)


def test_a_call_that_passes_the_module_by_is_told_and_steps_by_hand_see_it(tmp_path):
    model = CallsItself()
    with pytest.raises(EvidenceError, match=r"`__call__` of its own.*with probe\.step\(\):"):
        probed(model, tmp_path, lambda: train(model, 3))
    with loka.probe(model, tmp_path / "own.db", every=1) as probe:
        for _ in range(3):
            with probe.step():
                train(model, 1)
    assert (probe.progress.steps, probe.progress.sampled_steps) == (3, 3)


def test_compiling_in_place_inside_the_block_is_told(tmp_path):
    model = Two()

    def loop():
        model.compile(backend="eager")
        train(model, 3)

    with pytest.raises(EvidenceError, match=r"module\.compile\(\)` inside the block"):
        probed(model, tmp_path, loop)
    assert model._compiled_call_impl is not None  # the user's own stays
    model._compiled_call_impl = None


def test_a_model_without_matrix_products_is_told(tmp_path):
    model = nn.Sequential(nn.Embedding(10, 4), nn.LayerNorm(4))

    def loop():
        for _ in range(3):
            model(torch.arange(3)).sum().backward()

    with pytest.raises(EvidenceError, match=r"watched 3 steps of Sequential, looked into 1 of them.*every=100 now"):
        probed(model, tmp_path, loop, every=100)


def test_a_filter_that_leaves_out_every_product_is_told(tmp_path):
    model = Two()
    model.norm = nn.LayerNorm(16)
    with pytest.raises(EvidenceError, match=r"filter_fn may leave out"):
        probed(model, tmp_path, lambda: train(model), filter_fn=lambda module, fqn: fqn == "norm")


def test_a_block_that_runs_nothing_is_told(tmp_path):
    with pytest.raises(EvidenceError, match="saw no forward"), loka.probe(Two(), tmp_path / "run.db"):
        pass


def test_a_run_too_short_to_judge_says_how_many_samples_it_takes(tmp_path):
    model = Two()
    probed(model, tmp_path, lambda: train(model, 5), every=100)
    evidence = load_evidence(tmp_path / "run.db")
    notes = {found.note for entry in evidence.products for found in entry.recipes}
    assert any(note.startswith("1 of ") and "sampled steps" in note for note in notes)


def test_samples_left_out_for_the_budget_are_counted_and_told_once(tmp_path):
    model = Two()
    run, steps = probed(model, tmp_path, lambda: train(model, 2000), every=100, overhead=1e-4)
    assert run.progress.skipped_samples > 5
    assert run.progress.sampled_steps + run.progress.skipped_samples == 20
    assert len(steps) == run.progress.sampled_steps
    (event,) = run.events
    assert event.kind == "over_budget"
    assert "they would cost more than the budget of 0.0001 of the run's own time" in event.message
    assert "probe(overhead=...)" in event.message
