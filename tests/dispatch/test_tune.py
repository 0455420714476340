"""Tuning: what is measured, what is kept, what is refused; on tiny products, under Triton's interpreter."""

import io
import json
import logging
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

pytest.importorskip("triton")
from loka.dispatch.measuring import draws
from loka.dispatch.measuring import tune as tune_module
from loka.dispatch.measuring.draws import Source
from loka.dispatch.measuring.shapes import Shape
from loka.dispatch.measuring.tune import tune
from loka.dispatch.measuring.tune_keys import keys_of
from loka.errors import ArgumentError, LokaError, PlanError
from loka.hardware import DeviceInfo
from loka.kernel_registry.spec import GemmRequest
from loka.kernel_registry.triton import gemm, small, tuned
from loka.kernel_registry.triton.interpreter import INTERPRETED
from loka.kernel_registry.triton.launch import CODES, Key, Launch, Round, bucket
from loka.kernel_registry.triton.launches import TUNABLES
from loka.kernel_registry.triton.tuned import (
    Provenance,
    TunedLaunch,
    Tuning,
    launch_for,
    launches_here,
    tuning_path,
)
from loka.reports.tuning import tuning_rows, tuning_table
from loka.timing import Measurement, measure

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
CPU = torch.device("cpu")
CPU_INFO = DeviceInfo(type="cpu", name="")
SHAPE = (5, 140, 24)  # m, k, n


def quickly(contest, *, device, budget_s, inputs):
    """The real protocol with as little of it as there can be: what is timed here is an interpreter."""
    return measure(contest, device=device, budget_s=0, inputs=inputs, min_repetitions=1, warmup_s=0)


def shortened(rounds):
    """Little to try: one other tile, one other value of anything else."""
    return tuple(Round(each.names, each.values[:1]) for each in rounds)


@pytest.fixture(autouse=True)
def path(tmp_path, monkeypatch):
    """A file of its own, few launches to try, and no measured launch left behind."""
    file = tmp_path / "tuning" / "here.json"
    monkeypatch.setenv("LOKA_TUNING", str(file))
    for name, kernel in TUNABLES.items():
        monkeypatch.setitem(TUNABLES, name, replace(kernel, rounds=shortened(kernel.rounds)))
    monkeypatch.setattr(tune_module, "measure", quickly)
    monkeypatch.setattr(draws, "num_inputs", lambda *_: 2)
    launches_here.cache_clear()
    yield file
    launches_here.cache_clear()


def shape(op="linear", product="fprop", m=5, n=24, k=40, batch=1):
    request = GemmRequest(site="up", product=product, op=op, m=m, n=n, k=k, dtype="float32", batch=batch)
    return Shape(request=request, products=(), source=Source())


def shapes():
    """The three products of one layer of SHAPE."""
    m, k, n = SHAPE
    sizes = {"fprop": (m, n, k), "dgrad": (m, k, n), "wgrad": (n, k, m)}
    return [shape("linear", product, *size) for product, size in sizes.items()]


def every_kind():
    """One product of every op that our kernels serve."""
    return [
        shape(k=140),
        shape("grouped_linear", m=9, batch=3),
        shape("grouped_linear", "wgrad", m=24, n=40, k=130, batch=3),
        shape("linear_norm_act", k=140),
        shape("bmm", batch=3),
        shape("many_linear", "dgrad", batch=2),
    ]


def one_of_a_kind(shapes, info=CPU_INFO):
    """The first key of every kernel: little to measure."""
    found = {}
    for key in keys_of(shapes, info):
        found.setdefault(key.kernel, key)
    return list(found.values())


SOME = Launch(block_m=32, block_n=16, num_warps=4, num_stages=2)


def launch(*, n=24, key=None, **changes):
    key = key or Key("gemm", "rowwise", "fprop", CODES, 8, n, 40)
    times = {"median_us": 1.0, "spread_us": 0.1, "default_us": 2.0}
    return TunedLaunch(**key._asdict(), launch=replace(SOME, **changes), **times)


def chosen(m, n=24, recipe="rowwise"):
    return launch_for(Key("gemm", recipe, "fprop", CODES, m, n, 40), CPU)


def tuning(*launches):
    return Tuning(provenance=Provenance.here(CPU), created="2026-01-01T00:00:00+00:00", launches=launches)


def product():
    from loka.formats import RECIPES
    from loka.quantize import quantize

    spec = RECIPES["rowwise"].operand("input")
    (a, sa), (b, sb) = quantize(torch.randn(5, 40), spec), quantize(torch.randn(24, 40), spec)
    return a, b, sa, sb


# --- measuring ---


def test_every_kind_of_kernel_is_tuned_and_what_is_found_is_what_it_runs_on(path, monkeypatch):
    monkeypatch.setattr(tune_module, "keys_of", one_of_a_kind)
    found = tune(every_kind(), "cpu", budget_s=600)
    assert {each.kernel for each in found.launches} == {*TUNABLES}
    assert Tuning.load(path) == found
    assert {each.key for each in found.launches} == {*one_of_a_kind(every_kind())}
    for each in found.launches:
        assert launch_for(each.key, CPU) == each.launch


def test_a_product_and_its_casts_are_measured_once_whoever_has_them():
    found = keys_of(shapes(), DeviceInfo(type="cuda", name="", capability=(9, 0)))
    assert len(set(found)) == len(found)
    # Three passes of one layer, two kinds of scales where there is more than one block; products before casts.
    assert {(each.recipe, each.m, each.n, each.k) for each in found[:4]} == {
        ("rowwise", 8, 24, 140),
        ("blockwise", 8, 24, 140),
        ("rowwise", 8, 140, 24),
        ("rowwise", 32, 140, 5),
    }
    casts = {(each.recipe, each.variant, each.m, each.k) for each in found[4:]}
    assert all(each.kernel == "quantize" for each in found[4:])
    # x and its transpose, alone and together; blocks of a weight are those of its transpose.
    assert {("rowwise", "rows", 8, 256), ("rowwise", "columns", 256, 8), ("rowwise", "both", 8, 256)} <= casts
    assert {("blockwise", "weight rows", 32, 256), ("blockwise", "weight columns", 256, 32)} <= casts
    assert not {each for each in casts if each[1] == "weight both"}
    assert keys_of(shapes() * 2, CPU_INFO) == found


def test_mx_is_tuned_where_the_hardware_has_its_scales():
    for capability, has_mx in (((8, 9), False), ((9, 0), False), ((10, 0), True)):
        found = keys_of(shapes(), DeviceInfo(type="cuda", name="", capability=capability))
        assert {(each.kernel, each.recipe) for each in found} >= {("gemm", "rowwise"), ("quantize", "tensorwise")}
        assert any(each.recipe == "mxfp8" for each in found) is has_mx


def test_the_faster_launch_wins_and_one_inside_the_noise_does_not(monkeypatch):
    speed = {}

    def measured(contest, **_):
        return {name: Measurement(median_us=speed.get(name, 10.0), spread_us=0.5, repetitions=7) for name in contest}

    monkeypatch.setattr(tune_module, "measure", measured)
    monkeypatch.setattr(tune_module, "_runnable", lambda key, launches, calls, device: dict.fromkeys(launches))
    wanted = shapes()[:1]
    default = launch_for(Key("gemm", "rowwise", "fprop", CODES, 8, 24, 140), CPU)
    assert {each.launch for each in tune(wanted, "cpu", budget_s=1).launches if each.kernel == "gemm"} == {default}

    tuning_path(CPU).unlink()
    launches_here.cache_clear()
    better = replace(default, block_m=16, block_n=16)  # the only other tile that is tried
    speed[str(better)] = 8.0
    found = {each.recipe: each for each in tune(wanted, "cpu", budget_s=1).launches if each.kernel == "gemm"}
    assert (found["rowwise"].launch, found["rowwise"].median_us, found["rowwise"].default_us) == (better, 8.0, 10.0)


def test_operands_that_do_not_fit_the_device_leave_their_key_untuned_and_no_other(monkeypatch, caplog):
    def drawn(key, device):
        if key.recipe == "rowwise":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [lambda: None]

    monkeypatch.setattr(tune_module, "calls_of", drawn)
    monkeypatch.setattr(tune_module, "_runnable", lambda key, launches, calls, device: dict.fromkeys(launches))
    monkeypatch.setattr(
        tune_module,
        "measure",
        lambda contest, **_: dict.fromkeys(contest, Measurement(median_us=1.0, spread_us=0.1, repetitions=7)),
    )
    with caplog.at_level(logging.WARNING, "loka.dispatch"):
        found = tune(shapes()[:1], "cpu", budget_s=60).launches
    assert {each.recipe for each in found} == {"tensorwise", "blockwise"}
    assert "left untuned: CUDA out of memory" in caplog.text


def test_what_runs_under_another_key_is_not_kept(monkeypatch, caplog):
    """A launch that no call would ever look up is worth nothing."""
    monkeypatch.setattr(small, "_PASS_OF_UNITS", {("k", "k"): "wgrad"})
    with caplog.at_level(logging.WARNING, "loka.dispatch"):
        assert tune([shape("bmm", batch=2)], "cpu", budget_s=60).launches == ()
    assert "runs under other keys" in caplog.text


def test_a_stopped_run_is_taken_up_where_it_was(path, monkeypatch):
    measured = []

    def original(key, device, budget_s):
        untuned = TUNABLES[key.kernel].untuned(key, 1)
        return TunedLaunch(**key._asdict(), launch=untuned, median_us=1.0, spread_us=0.0, default_us=1.0)

    def interrupted(product, device, budget_s):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(product)
        return original(product, device, budget_s)

    monkeypatch.setattr(tune_module, "_fastest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(shapes(), "cpu", budget_s=60)
    kept = Tuning.load(path).launches
    assert sorted(each.key for each in kept) == sorted(measured)
    again = []
    monkeypatch.setattr(
        tune_module, "_fastest", lambda product, *rest: again.append(product) or original(product, *rest)
    )
    found = tune(shapes(), "cpu", budget_s=60)
    assert len(again) == len(keys_of(shapes(), CPU_INFO)) - 2
    assert not set(again) & set(measured)
    assert set(kept) <= set(found.launches)


def test_a_budget_that_is_spent_leaves_the_rest_untuned_and_says_so(caplog):
    with caplog.at_level(logging.WARNING, "loka.dispatch"):
        assert tune(shapes(), "cpu", budget_s=0).launches == ()
    assert re.search(r"(\d+) of \1 launches left untuned", caplog.text)


def test_launches_that_do_not_compile_are_left_out(monkeypatch):
    original = gemm.wrap_triton

    def refuses(kernel):
        class Launcher:
            def __getitem__(self, grid):
                def run(*args, **options):
                    if options.get("BLOCK_N") == 32:
                        raise RuntimeError("out of resource: shared memory")
                    return original(kernel)[grid](*args, **options)

                return run

        return Launcher()

    monkeypatch.setattr(gemm, "wrap_triton", refuses)
    kernel = TUNABLES["gemm"]
    monkeypatch.setitem(TUNABLES, "gemm", replace(kernel, rounds=(kernel.rounds[0]._replace(values=((16, 32),)),)))
    monkeypatch.setattr(tune_module, "keys_of", lambda *given: keys_of(*given)[:2])
    found = [each.launch.block_n for each in tune(shapes()[:1], "cpu", budget_s=60).launches if each.kernel == "gemm"]
    assert len(found) == 2
    assert 32 not in found


# --- using ---


def test_a_measured_launch_serves_its_own_bucket_of_rows_and_nothing_else(path):
    default = chosen(4)
    assert default != SOME
    tuning(launch()).save(path)
    launches_here.cache_clear()
    for m, expected in ((4, default), (5, SOME), (8, SOME), (9, default)):
        assert chosen(m) == expected
    assert chosen(8, n=25) == chosen(8, recipe="blockwise") == default


def test_the_product_is_the_same_under_a_measured_launch(path):
    operands = product()
    expected = gemm.scaled_gemm(*operands, out_dtype=torch.float32)
    tuning(launch()).save(path)
    launches_here.cache_clear()
    assert chosen(5) == SOME
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
        assert chosen(8) != SOME
        chosen(8)
    assert [word in record.message for record in caplog.records] == [True]
    with pytest.raises(PlanError, match="does not hold here"):
        tune(shapes(), "cpu", budget_s=60)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        *(("launch", "block_m", value) for value in (0, 24, 1024, -16, "16")),
        ("launch", "num_stages", 17),
        (None, "kernel", "nothing"),
        (None, "recipe", "tensorwise"),
        (None, "m", 9),
    ],
)
def test_a_damaged_file_is_set_aside(path, place, name, value, caplog):
    tuning(launch()).save(path)
    text = json.loads(path.read_text())
    where = text["launches"][0]
    (where if place is None else where[place])[name] = value
    path.write_text(json.dumps(text))
    before = path.read_bytes()
    with caplog.at_level(logging.WARNING, "loka.kernel_registry"):
        assert launches_here(CPU) == {}
    assert "launches are not tuned" in caplog.text
    with pytest.raises(LokaError):
        tune(shapes(), "cpu", budget_s=60)
    assert path.read_bytes() == before


def test_a_launch_that_breaks_the_definition_is_set_aside_with_its_file(path, caplog):
    """128 rows of b share a scale: a tile of 64 of them would give half of a block a scale of its own."""
    key = Key("small", "blockwise", "fprop", "float32", 8, 24, 64, 2, "blocks of b")
    tuning(launch(), launch(key=key, block_m=16, block_n=64, num_warps=8, num_stages=1)).save(path)
    with caplog.at_level(logging.WARNING, "loka.kernel_registry"):
        assert launches_here(CPU) == {}
    assert "128 rows of b share a scale" in caplog.text


def test_the_table_names_kinds(path):
    key = Key("small", "blockwise", "dgrad", "bfloat16", 8, 24, 64, 4, "blocks of b")
    cast = Key("quantize", "rowwise", "fprop", "float32", 8, 1, 64, 1, "both")
    made = tuning(*(launch(key=each) for each in (launch().key, key, cast)))
    stream = io.StringIO()
    Console(file=stream, width=200).print(tuning_table(made, path))
    lines = [" ".join(line.split()) for line in stream.getvalue().splitlines()]
    assert "gemm tensorwise, rowwise 8x40x24 32x16 4 2 1 1.0 2.00x" in lines
    assert "small dgrad blocks of b blockwise 4x8x64x24 32x16 4 2 1 1.0 2.00x" in lines
    assert "quantize both rowwise 8x64 32x16 4 2 1 1.0 2.00x" in lines
    assert {row["kernel"] for row in tuning_rows(made)} == {"gemm", "small", "quantize"}


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
from loka.dispatch.measuring import draws, tune as module
from dataclasses import replace
from loka.kernel_registry.triton.launches import TUNABLES
from tests.dispatch.test_tune import keys_of, quickly, shapes, shortened
rank, folder, fails = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "fails"
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
TUNABLES.update({name: replace(kernel, rounds=shortened(kernel.rounds)) for name, kernel in TUNABLES.items()})
if rank == 1:
    module._fastest = None  # nobody but rank 0 measures
module.measure = quickly
draws.num_inputs = lambda *_: 2
module.keys_of = lambda *given: [keys_of(*given)[0], keys_of(*given)[-1]]
path = folder / f"rank{rank}.json"
if fails and rank == 0:
    path.write_text("{}")
try:
    module.tune(shapes()[:1], "cpu", budget_s=60, path=path, group=dist.group.WORLD)
except module.PlanError as error:
    print("REFUSED", error)
dist.barrier()  # nobody leaves while another still listens
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # threads of torch may abort an interpreter that ends
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
    outputs = [rank.communicate(timeout=240) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    refused = [out.decode().startswith("REFUSED") for out, _ in outputs]
    assert refused == [fails, fails]
    if not fails:
        first, second = ((tmp_path / f"rank{rank}.json").read_bytes() for rank in range(2))
        assert first == second
        assert {each.kernel for each in Tuning.load(tmp_path / "rank1.json").launches} == {"gemm", "quantize"}


def test_the_source_of_every_kernel_file_is_part_of_the_provenance():
    folder = Path(tuned.__file__).parent
    assert all((folder / name).is_file() for name in tuned._SOURCES)
    with_kernels = {path.name for path in folder.glob("*.py") if "@triton.jit" in path.read_text()}
    assert with_kernels - {"unrouted.py"} <= {*tuned._SOURCES}  # zeros for rows of nobody have one launch
    with_launches = {
        path.name for path in folder.glob("*.py") if re.search(r"\b(launch_for|measured)\(", path.read_text())
    }
    assert with_launches - {"tuned.py"} <= {*tuned._SOURCES}
