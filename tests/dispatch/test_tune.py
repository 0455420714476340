"""Tuning: what is measured, what is kept, what is refused; on tiny products, under Triton's interpreter."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from loka.dispatch import tune as tune_module
from loka.dispatch.draws import Source
from loka.dispatch.shapes import Shape
from loka.dispatch.tune import tune
from loka.errors import ArgumentError, LokaError, PlanError
from loka.kernel_registry.spec import GemmRequest
from loka.kernel_registry.triton import gemm, tuned
from loka.kernel_registry.triton.interpreter import INTERPRETED
from loka.kernel_registry.triton.tuned import Provenance, TunedLaunch, Tuning, bucket, launches_here, tuning_path
from loka.timing import Measurement, measure

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
CPU = torch.device("cpu")
SHAPE = (5, 40, 24)  # m, k, n


def quickly(contest, *, device, budget_s, inputs):
    """The real protocol with as little of it as there can be: what is timed here is an interpreter."""
    return measure(contest, device=device, budget_s=0, inputs=inputs, min_repetitions=1, warmup_s=0)


@pytest.fixture(autouse=True)
def path(tmp_path, monkeypatch):
    """A file of its own, few launches to try, and no measured launch left behind."""
    file = tmp_path / "tuning" / "here.json"
    monkeypatch.setenv("LOKA_TUNING", str(file))
    monkeypatch.setattr(tune_module, "_TILES", ((16, 16), (16, 32)))
    monkeypatch.setattr(tune_module, "_PIPELINES", ((4, 2),))
    monkeypatch.setattr(tune_module, "_GROUPS_OF_ROWS", (1,))
    monkeypatch.setattr(tune_module, "measure", quickly)
    launches_here.cache_clear()
    yield file
    launches_here.cache_clear()


def shapes():
    """The three products of one layer of SHAPE."""
    m, k, n = SHAPE
    sizes = {"fprop": (m, n, k), "dgrad": (m, k, n), "wgrad": (n, k, m)}
    return [
        Shape(
            request=GemmRequest(site="up", product=product, op="linear", m=m, n=n, k=k, dtype="float32"),
            products=(),
            source=Source(),
        )
        for product, (m, n, k) in sizes.items()
    ]


def launch(**changes):
    fields = {
        "group_k": 0,
        "m": 8,
        "n": 24,
        "k": 40,
        "block_m": 32,
        "block_n": 16,
        "group_m": 1,
        "num_warps": 4,
        "num_stages": 2,
        "splits": 1,
        "median_us": 1.0,
        "spread_us": 0.1,
        "default_us": 2.0,
    }
    return TunedLaunch(**{**fields, **changes})


def tuning(*launches):
    return Tuning(provenance=Provenance.here(CPU), created="2026-01-01T00:00:00+00:00", launches=launches)


def product():
    from loka.formats import RECIPES
    from loka.quantize import quantize

    spec = RECIPES["rowwise"].operand("input")
    (a, sa), (b, sb) = quantize(torch.randn(5, 40), spec), quantize(torch.randn(24, 40), spec)
    return a, b, sa, sb


# --- measuring ---


def test_every_linear_product_is_measured_once_and_what_is_found_is_what_the_kernel_uses(path):
    found = tune(shapes(), "cpu", budget_s=60)
    # Three passes of one layer, two kinds of scales.
    assert {each.key for each in found.launches} == {
        (group, m, n, k) for group in (0, 128) for m, n, k in ((8, 24, 40), (8, 40, 24), (32, 40, 5))
    }
    assert Tuning.load(path) == found
    for each in found.launches:
        used, splits = gemm.choose(each.m, each.n, each.k, each.group_k, CPU)
        assert (used.block_m, used.block_n, used.num_warps, splits) == (
            *(each.block_m, each.block_n, each.num_warps),
            each.splits,
        )


def test_the_faster_launch_wins_and_one_inside_the_noise_does_not(monkeypatch):
    speed = {}

    def measured(contest, **_):
        return {name: Measurement(median_us=speed.get(name, 10.0), spread_us=0.5, repetitions=7) for name in contest}

    monkeypatch.setattr(tune_module, "measure", measured)
    monkeypatch.setattr(tune_module, "_runnable", lambda settings, operands: {str(each): None for each in settings})
    wanted = shapes()[:1]
    default, _ = gemm.choose(8, 24, 40, 0, CPU)
    assert {each.block_n for each in tune(wanted, "cpu", budget_s=1).launches} == {default.block_n}

    tuning_path(CPU).unlink()
    launches_here.cache_clear()
    faster = replace(default, block_m=16, block_n=32)
    speed[str(tune_module._Setting(launch=faster, splits=1))] = 8.0
    found = {each.group_k: each for each in tune(wanted, "cpu", budget_s=1).launches}
    assert (found[0].block_m, found[0].block_n, found[0].median_us, found[0].default_us) == (16, 32, 8.0, 10.0)


def test_a_stopped_run_is_taken_up_where_it_was(path, monkeypatch):
    measured = []
    original = tune_module._fastest

    def interrupted(product, device, budget_s):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(product.key)
        return original(product, device, budget_s)

    monkeypatch.setattr(tune_module, "_fastest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(shapes(), "cpu", budget_s=60)
    kept = Tuning.load(path).launches
    assert sorted(each.key for each in kept) == sorted(measured)
    again = []
    monkeypatch.setattr(
        tune_module, "_fastest", lambda product, *rest: again.append(product.key) or original(product, *rest)
    )
    found = tune(shapes(), "cpu", budget_s=60)
    assert len(again) == 4
    assert not set(again) & set(measured)
    assert set(kept) <= set(found.launches)


def test_a_budget_that_is_spent_leaves_the_rest_untuned_and_says_so(caplog):
    with caplog.at_level(logging.WARNING, "loka.dispatch"):
        assert tune(shapes(), "cpu", budget_s=0).launches == ()
    assert "6 of 6 products left untuned" in caplog.text


def test_launches_that_do_not_compile_are_left_out(monkeypatch):
    original = gemm.launched

    def refuses(*args):
        if args[-2].block_n == 32:
            raise RuntimeError("out of resource: shared memory")
        return original(*args)

    monkeypatch.setattr(gemm, "launched", refuses)
    assert {each.block_n for each in tune(shapes()[:1], "cpu", budget_s=60).launches} <= {16, 64}


# --- using ---


def test_a_measured_launch_serves_its_own_bucket_of_rows_and_nothing_else(path):
    tuning(launch()).save(path)
    default = gemm.LAUNCHES[0]
    for m, chosen in ((4, default.block_m), (5, 32), (8, 32), (9, default.block_m)):
        assert gemm.choose(m, 24, 40, 0, CPU)[0].block_m == chosen
    assert gemm.choose(8, 25, 40, 0, CPU)[0].block_m == default.block_m
    assert gemm.choose(8, 24, 40, 128, CPU)[0].block_m == default.block_m


def test_the_product_is_the_same_under_a_measured_launch(path):
    operands = product()
    expected = gemm.scaled_gemm(*operands, out_dtype=torch.float32)
    tuning(launch()).save(path)
    launches_here.cache_clear()
    assert gemm.choose(5, 24, 40, 0, CPU)[0].block_m == 32
    torch.testing.assert_close(gemm.scaled_gemm(*operands, out_dtype=torch.float32), expected)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"versions": {"torch": "1.0", "triton": "1.0"}}, "it was made with torch 1.0"),
        ({"source": "0" * 64}, "the kernels have changed"),
        ({"device": replace(Provenance.here("cpu").device, name="another")}, "it is of cpu (another)"),
    ],
)
def test_foreign_data_is_set_aside_and_never_overwritten(path, change, word, caplog):
    there = replace(tuning(launch()), provenance=replace(Provenance.here(CPU), **change))
    there.save(path)
    before = path.read_bytes()
    with caplog.at_level(logging.WARNING, "loka.kernel_registry"):
        assert gemm.choose(8, 24, 40, 0, CPU)[0].block_m == gemm.LAUNCHES[0].block_m
        gemm.choose(8, 24, 40, 0, CPU)
    assert [word in record.message for record in caplog.records] == [True]
    with pytest.raises(PlanError, match="does not hold here"):
        tune(shapes(), "cpu", budget_s=60)
    assert path.read_bytes() == before


@pytest.mark.parametrize("block_m", [0, 24, 1024, -16, "16"])
def test_a_damaged_file_is_set_aside(path, block_m, caplog):
    tuning(launch()).save(path)
    text = json.loads(path.read_text())
    text["launches"][0]["block_m"] = block_m
    path.write_text(json.dumps(text))
    with caplog.at_level(logging.WARNING, "loka.kernel_registry"):
        assert launches_here(CPU) == {}
    assert "launches are not tuned" in caplog.text
    with pytest.raises(LokaError):
        tune(shapes(), "cpu", budget_s=60)


def test_tuning_can_be_switched_off(path, monkeypatch):
    tuning(launch()).save(path)
    monkeypatch.setenv("LOKA_TUNING", "off")
    assert launches_here(CPU) == {}
    with pytest.raises(ArgumentError, match="LOKA_TUNING=off"):
        tune(shapes(), "cpu", budget_s=60)


def test_without_a_setting_the_file_lies_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("LOKA_TUNING")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = tuning_path(CPU)
    assert found is not None
    assert found.parent == tmp_path / "loka" / "tuning"
    assert found.suffix == ".json"


def test_two_launches_for_one_product_are_refused():
    with pytest.raises(PlanError, match="two launches"):
        tuning(launch(), launch(block_m=16))
    assert tuning(launch()).with_launch(launch(block_m=16)).launches == (launch(block_m=16),)


@pytest.mark.parametrize(("m", "end"), [(1, 1), (2, 2), (3, 4), (2048, 2048), (2049, 4096)])
def test_buckets_end_at_powers_of_two(m, end):
    assert bucket(m) == end


# --- ranks ---

RANKS = """
import os, sys
from pathlib import Path
import torch, torch.distributed as dist
from loka.dispatch import tune as module
from tests.dispatch.test_tune import quickly, shapes
rank, folder, fails = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "fails"
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
module._TILES, module._PIPELINES, module._GROUPS_OF_ROWS = ((16, 16),), ((4, 2),), (1,)
if rank == 1:
    module._fastest = None  # nobody but rank 0 measures
module.measure = quickly
path = folder / f"rank{rank}.json"
if fails and rank == 0:
    path.write_text("{}")
try:
    module.tune(shapes(), "cpu", budget_s=60, path=path, group=dist.group.WORLD)
except module.PlanError as error:
    print("REFUSED", error)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("fails", [False, True])
def test_all_ranks_get_what_rank_0_found_and_none_waits_when_it_fails(tmp_path, fails):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("LOKA_TUNING", None)
    command = [sys.executable, "-c", RANKS]
    arguments = (str(tmp_path), "fails" if fails else "works")
    root = Path(__file__).parents[2]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), *arguments], env=environment, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    refused = [out.decode().startswith("REFUSED") for out, _ in outputs]
    assert refused == [fails, fails]
    if not fails:
        first, second = ((tmp_path / f"rank{rank}.json").read_bytes() for rank in range(2))
        assert first == second
        assert len(Tuning.load(tmp_path / "rank1.json").launches) == 6


def test_the_source_of_every_kernel_file_is_part_of_the_provenance():
    folder = Path(tuned.__file__).parent
    assert all((folder / name).is_file() for name in tuned._SOURCES)
    assert "gemm.py" in tuned._SOURCES
