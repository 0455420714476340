"""The command line: a frozen surface, right numbers, clear refusals, exit codes that a CI gate can rely on."""

import csv
import io
import json
import logging
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import loka
from loka.cli import app
from loka.dispatch.measuring.profile import DeviceProfile
from loka.hardware import device_info
from loka.probes.records import Timing

# Commands and flags are a promise to scripts: a change here is a change of the interface.
SURFACE = {
    "demo": {"--out"},
    "report": {
        *("--format", "--output", "--bound", "--bound-for", "--fail-on", "--run", "--device"),
        *("--watch", "--interval"),
    },
    "bench": {
        "--verify",
        "--tune",
        "--compare-values",
        "--suite",
        "--budget",
        "--device",
        "--export",
        "--format",
    },
    "plan": {
        "--output",
        "--bound",
        "--run",
        "--device",
        "--device-profile",
        "--assume-speedup",
        "--filter",
        "--budget",
        "--bound-for",
        "--by-rows",
        "--sweep",
        "--format",
    },
    "explain": {
        "--pass",
        "--bound",
        "--bound-for",
        "--run",
        "--device",
        "--device-profile",
        "--assume-speedup",
        "--format",
    },
    "advise": {"--format", "--output", "--bound", "--bound-for", "--run", "--device", "--device-profile"},
    "diff": {"--bound", "--run-a", "--run-b", "--common", "--fail-on-change", "--format"},
    "kernels": {"--format", "--device"},
    "env": {"--format"},
    "moe": set(),  # a group: its commands are frozen in test_cli_moe.py
}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of 30 real training steps of a small model, every step sampled."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("cli") / "run.db"
    model = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with loka.probe(model, path, every=1, overhead=100.0):
        for _ in range(30):
            optimizer.zero_grad()
            model(torch.randn(64, 32)).square().mean().backward()
            optimizer.step()
    return str(path)


@pytest.fixture(scope="module")
def forward_database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run that never went backward."""
    path = tmp_path_factory.mktemp("cli") / "forward.db"
    model = nn.Sequential(nn.Linear(32, 16))
    with torch.no_grad(), loka.probe(model, path, every=1, overhead=100.0):
        for _ in range(10):
            model(torch.randn(64, 32))
    return str(path)


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "120", "NO_COLOR": "1"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_commands_and_flags_are_the_frozen_ones() -> None:
    import typer

    group = typer.main.get_command(app)
    found = {
        name: {max(option.opts, key=len) for option in command.params if option.param_type_name == "option"}
        for name, command in group.commands.items()
    }
    assert found == SURFACE


def test_report_tells_every_product_in_every_format(database: str, tmp_path: Path) -> None:
    code, text, _ = run("report", database, "--format", "json")
    assert code == 0
    report = json.loads(text)
    assert report["schema"] == 1
    products = {(site["site"], site["pass"]) for site in report["sites"]}
    assert products == {("0", "fprop"), ("0", "wgrad"), ("2", "fprop"), ("2", "dgrad"), ("2", "wgrad")}
    code, text, _ = run("report", database, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert {(row["site"], row["pass"]) for row in rows} == products
    for kind in ("md", "html", "table"):
        target = tmp_path / f"report.{kind}"
        code, text, _ = run("report", database, "--format", kind, "--output", str(target))
        assert code == 0
        assert "fprop" in target.read_text(encoding="utf-8")


def test_fail_on_is_an_exit_code(database: str) -> None:
    assert run("report", database, "--fail-on", "unsafe", "--bound", "0.5")[0] == 0
    code, _, errors = run("report", database, "--fail-on", "unsafe", "--bound", "1e-6")
    assert code == 1
    assert "unsafe" in errors


def test_plan_writes_a_file_and_says_what_is_gained(database: str, tmp_path: Path) -> None:
    target = tmp_path / "plan.json"
    code, text, _ = run("plan", database, "-o", str(target), "--assume-speedup", "1.3", "--bound", "0.2")
    assert code == 0
    assert "assumption, not a measurement" in text.replace("\n", " ")
    plan = loka.Plan.load(target)
    assert plan.fp8_share() > 0
    code, text, _ = run("plan", database, "-o", str(target), "--budget", "3", "--bound", "0.2")
    assert code == 0
    assert loka.Plan.load(target).environment["time_source"] in ("measured", "none")


@pytest.mark.parametrize("name", ["plan[red].json", "[/bold].json", "a\\[red].json"])
def test_names_that_look_like_markup_are_said_as_they_are(database: str, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name.removesuffix(".json")  # "[/" is a folder, too
    folder.mkdir(parents=True)
    target = folder / "plan.json"
    code, text, _ = run("plan", database, "-o", str(target), "--assume-speedup", "1.3", "--bound", "0.2")
    assert code == 0
    assert f"Wrote {target}." in text
    assert run("explain", str(folder / "none.db"), "x")[2].count(str(folder / "none.db")) == 1


def test_few_rows_and_many_get_kernels_of_their_own_unless_that_is_not_wanted(tmp_path: Path) -> None:
    model, database = nn.Sequential(nn.Linear(32, 16)), tmp_path / "rows.db"
    with torch.no_grad(), loka.probe(model, database, every=1, overhead=100.0):
        for rows in (8, 512) * 10:
            model(torch.randn(rows, 32))
    device = device_info("cpu")
    shape = {"product": "fprop", "batch": 1, "n": 16, "k": 32, "dtype": "float32", "device": str(device)}
    how = {"spread_us": 0.1, "repetitions": 9, "values": "normal", "created": "2026-01-01T00:00:00+00:00"}
    took = {"tensorwise": {8: 10.0, 512: 90.0}, "rowwise": {8: 50.0, 512: 40.0}}
    times = {"torch.mm.fp32": {8: 40.0, 512: 100.0}, **{f"torch.scaled_mm.{name}": at for name, at in took.items()}}
    DeviceProfile(
        label="made up",
        source="example",
        device=device,
        environment={},
        times=tuple(
            Timing(kernel=kernel, m=m, median_us=us, **shape, **how)
            for kernel, at in times.items()
            for m, us in at.items()
        ),
    ).save(tmp_path / "profile.json")
    options = ("--device-profile", str(tmp_path / "profile.json"), "--bound", "0.2")
    for flag, split in ((), True), (("--by-rows",), True), (("--no-by-rows",), False):
        target = tmp_path / "plan.json"
        assert run("plan", str(database), "-o", str(target), *options, *flag)[0] == 0
        (decision,) = loka.Plan.load(target).decisions
        assert (decision.ranges is not None) == split
        assert decision.recipe == ("tensorwise, rowwise" if split else "rowwise")


def test_a_bound_on_the_loss_goes_through_every_command(database: str, tmp_path: Path) -> None:
    bound, target = ("--bound", "loss=0.1"), tmp_path / "plan.json"
    code, text, _ = run("plan", database, "-o", str(target), "--assume-speedup", "1.3", *bound)
    assert code == 0
    assert "Of the loss budget of 0.1" in text.replace("\n", " ")
    plan = loka.Plan.load(target)
    assert plan.bound == loka.Bound(loss=0.1)
    paid = [each.loss.cost for each in plan.decisions if each.loss is not None]
    assert paid
    assert 0 < sum(cost or 0.0 for cost in paid) <= 0.1
    documents = {}
    for format in ("table", "json", "csv", "md", "html"):
        code, documents[format], _ = run("report", database, "--format", format, *bound)
        assert code == 0
    report = json.loads(documents["json"])
    assert report["bound"]["loss"] == 0.1
    (row,) = (row for row in report["sites"] if (row["site"], row["pass"]) == ("0", "fprop"))
    best = next(recipe for recipe in row["recipes"] if recipe["recipe"] == row["best"])
    assert best["loss"]["cost"] >= best["loss"]["kl"] > 0
    assert all("cost" in documents[format] for format in ("table", "csv", "md", "html"))
    code, text, _ = run(
        "explain", database, "0", "--pass", "fprop", "--format", "json", "--assume-speedup", "1.3", *bound
    )
    assert code == 0
    (decision,) = json.loads(text)
    assert decision["loss"]["cost"] <= 0.1
    code, text, _ = run("diff", database, database, *bound)
    assert code == 0


def test_a_bound_in_decibels_and_bounds_per_site_go_through_every_command(database: str, tmp_path: Path) -> None:
    bounds = ("--bound", "sqnr_db=20", "--bound-for", "2=row_error=1e-4", "--bound-for", "re:0=sqnr_db=15")
    target = tmp_path / "plan.json"
    code, text, _ = run("plan", database, "-o", str(target), "--assume-speedup", "1.3", *bounds)
    assert code == 0
    assert "Held to a bound of their own: row_error <= 0.0001 on '2' (3 products)" in text.replace("\n", " ")
    plan = loka.Plan.load(target)
    assert str(plan.bound).startswith("sqnr_db >= 20 dB (row_error <= 0.0001 on '2', sqnr_db >= 15 dB on 're:0')")
    assert {each.request.site for each in plan.decisions if each.recipe is not None} == {"0"}
    code, text, _ = run("explain", database, "0", "--pass", "fprop", "--assume-speedup", "1.3", *bounds)
    assert code == 0
    assert "held to sqnr_db >= 15 dB, a bound of its own ('re:0')" in text
    code, text, _ = run("explain", database, "2", "--pass", "fprop", "--format", "json", *bounds)
    (decision,) = json.loads(text)
    assert decision["bound"] == {"metric": "row_error", "value": 1e-4, "bias": None, "pattern": "2"}
    code, text, _ = run("report", database, "--format", "json", *bounds)
    assert {row["site"]: row["bound"]["pattern"] for row in json.loads(text)["sites"]} == {"0": "re:0", "2": "2"}
    code, _, errors = run("report", database, "--bound-for", "head*=0.1")
    assert code == 2
    assert "matches no site" in errors
    code, _, errors = run("plan", database, "--bound-for", "0=loss=0.1")
    assert code == 2
    assert "--bound-for" in errors


def test_a_sweep_shows_what_bounds_buy_and_writes_no_plan(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = ("plan", database, "--sweep", "--assume-speedup", "1.3", "--bound", "0.1")
    code, text, _ = run(*sweep)
    assert code == 0
    assert "the largest gain, 1.3x" in text.replace("\n", " ")
    assert "asked" in text
    assert list(tmp_path.iterdir()) == []
    code, text, _ = run(*sweep, "--format", "json")
    found = json.loads(text)
    assert found["points"][0]["products"] == 0
    assert found["points"][-1]["products"] == found["products"] == 5
    assert [point["value"] for point in found["points"] if point["asked"]] == [0.1]
    code, text, _ = run(*sweep, "--output", "sweep.html")
    assert code == 0
    assert "<svg" in Path("sweep.html").read_text(encoding="utf-8")
    assert run(*sweep, "--output", "sweep.json")[0] == 0
    assert json.loads(Path("sweep.json").read_text(encoding="utf-8")) == found
    code, _, errors = run(*sweep, "--output", "sweep.txt")
    assert code == 2
    assert ".html or .json" in errors
    code, _, errors = run("plan", database, "--format", "json")
    assert code == 2
    assert "--sweep" in errors


def test_explain_gives_a_reason_for_every_candidate(database: str) -> None:
    code, text, _ = run("explain", database, "0", "--pass", "output", "--format", "json")
    assert code == 0
    (decision,) = json.loads(text)
    assert decision["pass"] == "fprop"
    assert decision["rejected"]
    assert all(candidate["code"] and candidate["reason"] for candidate in decision["rejected"])
    assert run("explain", database, "0")[0] == 0


def test_bench_measures_a_suite_and_exports_a_profile_that_plans_read(database: str, tmp_path: Path) -> None:
    profile = tmp_path / "here.json"
    code, text, _ = run("bench", database, "--budget", "4", "--export", str(profile))
    assert code == 0
    assert "torch.mm.fp32" in text
    assert "emulated.linear" in text
    target = tmp_path / "plan.json"
    code, text, _ = run("plan", database, "-o", str(target), "--device-profile", str(profile), "--bound", "0.2")
    assert code == 0
    assert "not from this machine" in text.replace("\n", " ")


def test_kernels_and_env_are_valid_json() -> None:
    code, text, _ = run("kernels", "--format", "json")
    assert code == 0
    kernels = {row["kernel"]: row for row in json.loads(text)["kernels"]}
    assert kernels["emulated.linear.rowwise"]["available"]
    if not torch.cuda.is_available():
        assert "needs cuda" in kernels["triton.gemm.rowwise"]["reason"]
    code, text, _ = run("env", "--format", "json")
    assert code == 0
    assert json.loads(text)["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("report", "missing.db"), "missing.db"),
        (("report", "."), "folder"),
        (("plan", "{db}", "--bound", "tight"), "--bound"),
        (("plan", "{db}", "--bound", "loss=-1"), "positive number"),
        (("plan", "{db}", "--bound", "loss=1e-4,row_error=0.05"), "is not a bound"),
        (("plan", "{forward}", "--bound", "loss=2e-4"), "loss evidence"),
        (("report", "{forward}", "--bound", "loss=2e-4"), "loss evidence"),
        (("explain", "{forward}", "0", "--bound", "loss=2e-4"), "loss evidence"),
        (("diff", "{forward}", "{forward}", "--bound", "loss=2e-4"), "loss evidence"),
        (("plan", "{db}", "--filter", "heed*"), "heed"),
        (("plan", "{db}", "--device-profile", "nowhere.json"), "nowhere.json"),
        (("explain", "{db}", "00"), "00"),
        (("explain", "{db}", "0", "--pass", "forward"), "forward"),
        (("explain", "{db}", "0", "--pass", "dgrad"), "dgrad"),
        (("report", "{db}", "--run", "ffff-none"), "ffff-none"),
        (("bench",), "lrm27"),
        (("bench", "--suite", "lrm28"), "lrm27"),
        (("report", "{db}", "--format", "json", "--output", "/nonexistent/report.json"), "/nonexistent"),
        (("demo", "--out", "/dev/null/x"), "/dev/null/x"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_input_is_one_paragraph_and_a_non_zero_exit(
    arguments: tuple[str, ...],
    words: str,
    database: str,
    forward_database: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = {"{db}": database, "{forward}": forward_database}
    code, _, errors = run(*(paths.get(argument, argument) for argument in arguments))
    assert code == 2
    text = errors.strip()
    assert text.startswith("Error:")
    assert "Traceback" not in text
    assert "\n\n" not in text
    assert words in text.replace("\n", "")


def test_debug_shows_the_traceback() -> None:
    result = CliRunner().invoke(app, ["--debug", "report", "missing.db"])
    assert isinstance(result.exception, loka.LokaError)
    CliRunner().invoke(app, ["env"])  # the flag does not outlive its invocation
    code, _, errors = run("report", "missing.db")
    assert code == 2
    assert errors.startswith("Error:")


def test_other_libraries_complaints_are_shown_under_debug_alone() -> None:
    for flags, shown in ((["--debug"], True), ([], False)):
        CliRunner().invoke(app, [*flags, "env"])
        assert logging.getLogger("torchao").isEnabledFor(logging.WARNING) is shown


def probed(path: Path, *, scale: float, width: int = 32) -> str:
    """A probed evaluation of one seeded model; outliers in a few columns grow with `scale`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, 16))
    with loka.probe(model, path, every=1, overhead=100.0), torch.no_grad():
        for _ in range(12):
            data = torch.randn(64, 32)
            data[:, :2] *= scale
            model(data)
    return str(path)


def test_diff_tells_a_change_of_the_data_from_none_and_refuses_another_model(tmp_path: Path) -> None:
    first, again = probed(tmp_path / "a.db", scale=1.0), probed(tmp_path / "b.db", scale=1.0)
    wild, other = probed(tmp_path / "c.db", scale=1e3), probed(tmp_path / "d.db", scale=1.0, width=48)
    code, text, _ = run("diff", first, again, "--fail-on-change", "--format", "json")
    assert code == 0
    assert json.loads(text)["changed"] is False
    code, text, _ = run("diff", first, wild, "--format", "json")
    assert code == 0
    assert {change["site"] for change in json.loads(text)["errors"]} == {"0", "2"}
    code, text, _ = run("diff", first, wild, "--fail-on-change")
    assert code == 1
    assert "changed beyond noise" in text
    code, _, errors = run("diff", first, other)
    assert code == 2
    assert "different models" in errors
    code, _, _ = run("diff", first, other, "--common")
    assert code == 0
    code, _, errors = run("diff", first, __file__)
    assert code == 2
    assert "neither" in errors


def test_bench_verify_compares_kernels_with_their_definition(database: str) -> None:
    code, text, _ = run("bench", database, "--verify", "--device", "cpu")
    assert code == 0
    compared = re.search(r"(\d+) of (\d+) comparisons fail", text)
    assert compared is not None
    assert int(compared[1]) == 0 < int(compared[2])


def test_bench_tells_work_and_shares_as_json(database: str) -> None:
    code, text, _ = run("bench", database, "--budget", "3", "--device", "cpu", "--format", "json")
    assert code == 0
    rows = json.loads(text)["rows"]
    for row in rows:
        m, n, k = row["m"], row["n"], row["k"]
        assert (row["flops"], row["bytes"]) == (2 * m * n * k, 4 * (m * k + n * k + m * n))
        assert row["median_us"] > 0
    emulated = [row for row in rows if row["kernel"].startswith("emulated.")]
    assert emulated
    assert all(row["binds"] in ("memory", "compute") for row in emulated)
    assert all(row["compute_share"] > 0 and row["bandwidth_share"] > 0 for row in emulated)


def test_bench_compares_times_on_several_kinds_of_values(database: str) -> None:
    asked = ("--compare-values", "normal,zeros,learned", "--budget", "3", "--device", "cpu")
    code, text, _ = run("bench", database, *asked, "--format", "json")
    assert code == 0
    rows = json.loads(text)["rows"]
    assert {row["values"] for row in rows} == {"normal", "zeros", "learned"}
    code, text, _ = run("bench", database, *asked)
    assert code == 0
    assert "zeros, us" in text


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--verify", "--tune"), "do not go together"),
        (("--tune", "--export", "here.json"), "do not go together"),
        (("--compare-values", "normal,ones"), "There are no values 'ones'"),
        (("--tune", "--device", "cpu"), "nothing to tune on cpu"),
    ],
)
def test_bench_refuses_what_makes_no_measurement(database: str, arguments: tuple[str, ...], word: str) -> None:
    code, _, errors = run("bench", database, *arguments)
    assert code == 2
    assert word in errors.replace("\n", " ")
