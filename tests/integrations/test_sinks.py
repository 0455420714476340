"""Sinks read back with what reads them elsewhere: json, TensorBoard's own reader, a dict."""

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

import loka
from loka.bounds import Bound
from loka.errors import ArgumentError, LokaError
from loka.integrations import courier, jsonl, tensorboard, wandb
from loka.integrations.libraries import library
from loka.numerics import ProductError
from loka.probes.records import Event, ProductRecord, RunProgress, StepRecord
from loka.reports.build import report_of
from loka.reports.metrics import report_metrics, step_metrics
from tests.integrations.made_training import evidence_of, runs_of

OPTIONS = {"every": 2, "overhead": 100.0, "recipes": ["tensorwise", "rowwise"]}


def train(tmp_path, *listeners, steps=6, poison=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    with loka.probe(model, tmp_path / "run.db", **OPTIONS) as probe:
        for listener in listeners:
            probe.subscribe(listener)
        for _ in range(steps):
            batch = torch.randn(32, 16)
            if poison:
                batch[0, 0] = math.nan
            model(batch).square().mean().backward()
    return evidence_of(tmp_path / "run.db")


def strict(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


# --- JSON lines ---


def test_json_lines_hold_the_run_every_sample_and_the_end(tmp_path):
    steps = train(tmp_path, jsonl.Sink(tmp_path / "run.jsonl"))
    first, *samples, last = strict((tmp_path / "run.jsonl").read_text())
    (run,) = runs_of(tmp_path / "run.db")
    assert (first["kind"], first["run"], first["every"]) == ("run", run.info.id, 2)
    assert {line["kind"] for line in samples} == {"sample"}
    assert (last["kind"], last["status"], last["steps"]) == ("end", "complete", 6)
    for (number, loss, _, products), line in zip(steps, samples, strict=True):
        assert (line["step"], line["loss"]) == (number, loss)
        assert [(each["site"], each["pass"]) for each in line["products"]] == [
            (each["site"], each["product"]) for each in products
        ]
        for each, stored in zip(line["products"], products, strict=True):
            for recipe, errors in stored["errors"].items():
                assert each["errors"][recipe]["row_error"] == errors["row_error"]
                assert each["errors"][recipe]["infinite"] == []


def test_what_is_no_number_is_null_and_events_are_lines(tmp_path):
    train(tmp_path, jsonl.Sink(tmp_path / "run.jsonl"), poison=True)
    lines = strict((tmp_path / "run.jsonl").read_text())
    assert any(line["kind"] == "event" and line["event"] == "nonfinite" for line in lines)
    assert sum(line["kind"] == "sample" for line in lines) == 3


def test_infinite_errors_are_named(tmp_path):
    sink = jsonl.Sink(tmp_path / "run.jsonl")
    steps, (run,) = train(tmp_path), runs_of(tmp_path / "run.db")
    assert steps
    infinite = replace(sample(), products=(made_product(row_error=math.inf, sqnr_db=-math.inf),))
    sink.begin(run.info)
    sink.write(infinite, run.progress)
    sink.finish(run.progress)
    line = strict((tmp_path / "run.jsonl").read_text())[1]
    (errors,) = line["products"][0]["errors"].values()
    assert errors["row_error"] is None
    assert errors["infinite"] == ["row_error", "sqnr_db"]


def made_product(**errors):
    values = {"row_error": 0.1, "row_error_p99": 0.2, "relative_error": 0.1, "sqnr_db": 20.0, "mere": 0.3}
    error = ProductError(**{**values, **errors}, rows=4, zero_rows=0, bad_rows=0)
    return ProductRecord(
        site="",
        product="fprop",
        op="mm",
        batch=1,
        m=4,
        n=4,
        k=4,
        calls=1,
        dtype="float32",
        parameter="",
        errors={"rowwise": error},
    )


def sample(step=0):
    return StepRecord(step=step, products=(made_product(),))


def test_a_file_of_several_runs_and_a_cut_off_line_stays_readable(tmp_path):
    path = tmp_path / "run.jsonl"
    train(tmp_path, jsonl.Sink(path))
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])  # a process was killed while it wrote
    train(tmp_path, jsonl.Sink(path))
    lines = path.read_text().splitlines()
    cut = len(whole.splitlines()) - 1
    assert len(strict("\n".join(lines[:cut] + lines[cut + 1 :]))) == len(lines) - 1
    with pytest.raises(json.JSONDecodeError):
        json.loads(lines[cut])


def test_a_killed_training_leaves_whole_lines_and_sinks_import_no_library(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, torch, loka
            from loka.integrations import jsonl, tensorboard, wandb
            assert not {"tensorboard", "transformers", "pytorch_lightning", "wandb"} & set(sys.modules)
            model = torch.nn.Linear(64, 64)
            with loka.probe(model, "run.db", every=1, overhead=100.0) as probe:
                probe.subscribe(jsonl.Sink("run.jsonl"))
                for step in range(10**6):
                    model(torch.randn(16, 64)).sum().backward()
                    if step == 20:
                        print("going", flush=True)
            """
        )
    )
    process = subprocess.Popen([sys.executable, str(script)], cwd=tmp_path, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"going\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    lines = (tmp_path / "run.jsonl").read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    assert len(lines) - len(whole) <= 1
    assert len(strict(b"".join(whole).decode())) >= 2


def test_a_place_that_cannot_be_written_is_an_error_before_the_first_step(tmp_path):
    with pytest.raises(ArgumentError, match=r"Give jsonl\.Sink a file"):
        train(tmp_path, jsonl.Sink(tmp_path / "nowhere" / "run.jsonl"))


# --- flat dicts ---


def test_flat_dicts_have_the_documented_keys_and_the_numbers_of_the_run(tmp_path):
    logged = []
    steps = train(tmp_path, wandb.Sink(logged.append))
    for (number, loss, _, products), found in zip(steps, logged, strict=True):
        assert all(isinstance(value, float) for value in found.values())
        assert (found["loka/step"], found["loka/loss"]) == (number, loss)
        errors = {}
        for each in products:
            for recipe, error in each["errors"].items():
                assert found[f"loka/{each['site']}/{each['product']}/{recipe}/row_error"] == error["row_error"]
                errors.setdefault((each["product"], recipe), []).append(error["row_error"])
        for (product, recipe), values in errors.items():
            assert found[f"loka/all/worst/{product}/{recipe}/row_error"] == max(values)


def test_a_summary_leaves_the_sites_out(tmp_path):
    logged = []
    train(tmp_path, wandb.Sink(logged.append, detail="summary"))
    names = {"step", "sampled_steps", "overhead", "loss", "all"}
    assert {key.split("/")[1] for found in logged for key in found} == names


def test_what_was_not_measured_has_no_key_and_infinite_is_infinite():
    progress = RunProgress(
        steps=1, sampled_steps=1, skipped_samples=0, wall_s=2.0, probe_s=1.0, unattributed=0, weights_changed=False
    )
    product = made_product(row_error=math.inf, sqnr_db=math.nan)
    found = step_metrics(StepRecord(step=3, products=(product,)), progress)
    assert found["loka/(root)/fprop/rowwise/row_error"] == math.inf
    assert "loka/(root)/fprop/rowwise/sqnr_db" not in found
    assert "loka/loss" not in found
    with pytest.raises(ArgumentError, match="detail='all'"):
        step_metrics(StepRecord(step=3, products=()), progress, detail="all")


def test_a_report_is_a_flat_dict_too(tmp_path):
    train(tmp_path, steps=30)
    report = report_of(tmp_path / "run.db", Bound(row_error=0.05))
    found = report_metrics(report)
    counts = [found[f"loka/products/{verdict}"] for verdict in ("safe", "unsafe", "undecided")]
    assert sum(counts) == len(report["sites"]) == 5
    for row in report["sites"]:
        for recipe in row["recipes"]:
            key = f"loka/{row['site']}/{row['pass']}/{recipe['recipe']}/row_error_mean"
            assert found[key] == recipe["row_error"]["mean"]


# --- TensorBoard ---


@pytest.mark.third_party("tensorboard")
def test_tensorboard_s_own_reader_finds_the_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps = train(tmp_path, tensorboard.Sink(tmp_path / "logs"), poison=False)
    found = EventAccumulator(str(tmp_path / "logs"), size_guidance={"scalars": 0, "histograms": 0})
    found.Reload()
    for number, _, _, products in steps:
        for each in products:
            for recipe, error in each["errors"].items():
                tag = f"loka/{each['site']}/{each['product']}/{recipe}/row_error"
                (value,) = [event.value for event in found.Scalars(tag) if event.step == number]
                assert value == pytest.approx(error["row_error"], rel=1e-6)  # kept in single precision
    histogram = found.Histograms("loka/row_error/fprop/rowwise")
    errors = [
        [each["errors"]["rowwise"]["row_error"] for each in step[3] if each["product"] == "fprop"] for step in steps
    ]
    assert [event.histogram_value.max for event in histogram] == pytest.approx([max(values) for values in errors])
    assert [event.histogram_value.num for event in histogram] == [2, 2, 2]


@pytest.mark.third_party("tensorboard")
def test_tensorboard_s_mean_of_a_run_is_that_of_the_report(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, tensorboard.Sink(tmp_path / "logs"), steps=20)
    found = EventAccumulator(str(tmp_path / "logs"), size_guidance={"scalars": 0})
    found.Reload()
    for row in report_of(tmp_path / "run.db", Bound(row_error=0.05))["sites"]:
        for recipe in row["recipes"]:
            values = [
                event.value for event in found.Scalars(f"loka/{row['site']}/{row['pass']}/{recipe['recipe']}/row_error")
            ]
            assert len(values) == recipe["n"]
            assert sum(values) / len(values) == pytest.approx(recipe["row_error"]["mean"], rel=1e-5)


def test_any_writer_with_the_same_methods_serves_and_stays_open(tmp_path):
    class Kept:
        def __init__(self):
            self.scalars, self.texts, self.closed = [], [], False

        def add_scalar(self, tag, value, step):
            self.scalars.append((tag, step))

        def add_histogram(self, tag, values, step):
            assert values.ndim == 1

        def add_text(self, tag, text, step):
            self.texts.append((tag, text))

        def flush(self):
            pass

        def close(self):
            self.closed = True

    kept = Kept()
    train(tmp_path, tensorboard.Sink(kept, detail="summary"), poison=True)
    assert ("loka/sampled_steps", 4) in kept.scalars
    assert not kept.closed
    assert any(tag == "loka/events/nonfinite" for tag, _ in kept.texts)


def test_a_missing_library_is_an_error_that_names_what_to_install():
    with pytest.raises(LokaError, match=r"missing: no_such_library.*pip install '\.\[tensorboard\]'"):
        library("no_such_library.tensorboard", "tensorboard", "tensorboard.Sink")


@pytest.mark.parametrize(
    ("module", "libraries", "extra"),
    [
        ("lightning", ("lightning", "lightning.pytorch", "pytorch_lightning"), "lightning"),
        ("transformers", ("transformers",), "transformers"),
    ],
)
def test_a_callback_without_its_library_is_an_error_that_names_what_to_install(monkeypatch, module, libraries, extra):
    monkeypatch.delitem(sys.modules, f"loka.integrations.{module}", raising=False)
    for name in libraries:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(LokaError, match=rf"pip install '\.\[{extra}\]'"):
        importlib.import_module(f"loka.integrations.{module}")


# --- couriers ---


class Kept(courier.Courier):
    def __init__(self, gate=None, fails=False):
        super().__init__()
        self.kept, self.gate, self.fails = [], gate, fails

    def opened(self, info):
        pass

    def sampled(self, step, progress):
        if self.gate is not None:
            self.gate.wait(10)
        if self.fails:
            raise OSError("disk full")
        self.kept.append(step.step)

    def happened(self, event):
        self.kept.append(event.kind)

    def closed(self, progress):
        self.kept.append("closed")


def test_a_courier_that_cannot_keep_up_leaves_samples_out_and_never_holds_up_the_training(tmp_path, caplog):
    train(tmp_path)
    (run,) = runs_of(tmp_path / "run.db")
    gate = threading.Event()
    kept = Kept(gate)
    kept.begin(run.info)
    for step in range(courier.CAPACITY + 10):
        kept.write(sample(step), run.progress)
    kept.event(Event(step=9, kind="demoted", message=""))
    gate.set()
    kept.finish(run.progress)
    assert 9 <= kept.dropped <= 10  # one may be in its hands already
    assert len(kept.kept) == courier.CAPACITY + 10 - kept.dropped + 2
    assert kept.kept[-2:] == ["demoted", "closed"]
    assert "could not keep up" in caplog.text


def test_a_courier_that_fails_says_so_once_and_the_run_is_whole(tmp_path, caplog):
    kept = Kept(fails=True)
    steps = train(tmp_path, kept)
    assert len(steps) == 3
    assert kept.kept == []
    assert kept.failure
    assert caplog.text.count("disk full") == 1
    with pytest.raises(ArgumentError, match="has been used"):
        train(tmp_path, kept)
