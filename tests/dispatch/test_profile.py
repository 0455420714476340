"""Times: exact shapes only, profiles that cannot lie about their shape, assumptions that say so."""

import json
from dataclasses import replace

import pytest

from loka.dispatch.deciding.options import PlanOptions
from loka.dispatch.deciding.requests import request_of
from loka.dispatch.measuring.profile import DeviceProfile, TimeTable, newest
from loka.errors import ArgumentError, PlanError
from tests.dispatch.made_evidence import CPU, HOPPER, product, timing

REQUEST = request_of(product())


def made_profile(*times, **changes):
    times = times or (
        timing("torch.mm.bf16", 20.0, device=HOPPER),
        timing("torch.scaled_mm.rowwise", 12.5, device=HOPPER),
    )
    fields = {"label": "h200", "source": "measured", "device": HOPPER, "environment": {"torch": "2.13"}, "times": times}
    return DeviceProfile(**{**fields, **changes})


@pytest.fixture
def document(tmp_path):
    """Save a profile, change its JSON, and give back the path."""

    def write(change=lambda data: None):
        path = tmp_path / "profile.json"
        made_profile().save(path)
        data = json.loads(path.read_text())
        path.write_text(json.dumps(change(data) or data))
        return path

    return write


def test_a_profile_survives_saving_and_loading(tmp_path):
    path = tmp_path / "h200.json"
    made_profile().save(path)
    loaded = DeviceProfile.load(path)
    assert loaded.device == HOPPER
    assert sorted(loaded.times, key=lambda each: each.kernel) == list(made_profile().times)
    assert (loaded.label, loaded.source, loaded.environment) == ("h200", "measured", {"torch": "2.13"})


def test_a_profile_has_the_same_bytes_whatever_the_order_of_its_times(tmp_path):
    profile = made_profile()
    profile.save(tmp_path / "a.json")
    replace(profile, times=profile.times[::-1]).save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def first(**changes):
    return lambda data: data["times"][0].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(kind="loka-plan"), "its kind is 'loka-plan'"),
        (lambda data: data.update(schema=2), "schema 2; this version of LoKA reads schema 1"),
        (lambda data: data.update(schema=True), "schema True"),
        (lambda data: data.update(extra=1), "'extra' is unknown"),
        (lambda data: data.pop("label") and None, "'label' is missing"),
        (lambda data: data.update(label=""), "without label"),
        (lambda data: data.update(times=[]), "without times"),
        (lambda data: data.update(source="guessed"), r"\.source: one of measured, example"),
        (lambda data: data["device"].update(capability=[9]), r"\.device\.capability: a list of 2"),
        (lambda data: data["times"].append(data["times"][0]), "twice"),
        (first(median_us=-1), r"\.times\[0\]\.median_us: a finite number from 0"),
        (first(median_us=0), "takes no time"),
        (first(median_us="12"), r"\.median_us"),
        (first(median_us=True), r"\.median_us"),
        (first(m=2.5), r"\.times\[0\]\.m: a whole number"),
        (first(m=10**400), r"\.m: a whole number"),
        (first(median_us=10**400), r"\.median_us: .* is too large"),
        (first(kernel="a\u001b[31m"), "control characters"),
        (first(device="cpu (test)"), "Write one profile per device"),
        (lambda data: data["times"][0].update({"pass": "forward"}), r"\.pass: one of fprop, dgrad, wgrad"),
        (lambda data: [data], "its kind is 'list'"),
    ],
)
def test_a_profile_that_is_wrong_is_refused_and_the_place_is_named(document, change, message):
    with pytest.raises(PlanError, match=message):
        DeviceProfile.load(document(change))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"kind":"loka-device-profile","schema":1,"label":NaN}', "NaN is not JSON"),
        ('{"kind":"loka-device-profile","schema":1,"schema":2}', "'schema' appears twice"),
        ("[" * 100_000, "nested too deeply"),
        ("", "not valid JSON"),
        ("\ufeff{}", "not valid JSON|not a loka-device-profile"),
        ('{"kind":"loka-device-profile","schema":' + "9" * 5000 + "}", "not valid JSON"),
    ],
    ids=["nan", "duplicate_key", "depth", "empty", "bom", "huge_integer"],
)
def test_text_that_is_no_honest_json_is_refused(tmp_path, text, message):
    path = tmp_path / "profile.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PlanError, match=message):
        DeviceProfile.load(path)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "profile.json"
    path.write_bytes(b'{"kind": "\xff\xfe"}')
    with pytest.raises(PlanError, match="not valid JSON"):
        DeviceProfile.load(path)


def test_a_file_that_is_too_large_is_not_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr("loka.document.MAX_BYTES", 1000)
    path = tmp_path / "profile.json"
    path.write_text(" " * 1001)
    with pytest.raises(PlanError, match="more than 0 MiB, too much"):
        DeviceProfile.load(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "nowhere.json", tmp_path):
        with pytest.raises(PlanError, match="could not be read"):
            DeviceProfile.load(path)


def test_a_place_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(PlanError, match="could not be written"):
        made_profile().save(tmp_path / "no" / "such" / "folder.json")
    (tmp_path / "taken").mkdir()
    with pytest.raises(PlanError, match="could not be written"):
        made_profile().save(tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_time_answers_for_its_own_shape_only():
    table = TimeTable([timing("torch.mm.bf16", 20.0, 0.5)])
    found = table.lookup("torch.mm.bf16", REQUEST)
    assert (found.median_us, found.spread_us, found.source, found.assumed) == (20.0, 0.5, "measured", False)
    for other in ({"m": 2047}, {"n": 769}, {"k": 255}, {"dtype": "float32"}, {"product": "wgrad"}, {"batch": 2}):
        assert table.lookup("torch.mm.bf16", replace(REQUEST, **other)) is None
    assert table.lookup("torch.mm.fp32", REQUEST) is None
    assert table.lookup("torch.mm.bf16", replace(REQUEST, site="elsewhere")) == found


def test_the_newest_time_of_a_shape_counts_in_any_order():
    old, new = timing("torch.mm.bf16", 20.0, created="2026-01-01"), timing("torch.mm.bf16", 30.0, created="2026-01-02")
    for order in ([old, new], [new, old]):
        assert TimeTable(order).lookup("torch.mm.bf16", REQUEST).median_us == 30.0
        assert newest([*order, timing("a.b", 1.0)]) == (timing("a.b", 1.0), new)


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_a_speedup_that_is_none_is_refused(wrong):
    with pytest.raises(ArgumentError, match=r"e\.g\. 1\.3"):
        TimeTable(assume_speedup=wrong)


def test_an_assumption_is_about_emulated_kernels_only():
    table = TimeTable([timing("torch.mm.bf16", 20.0)], assume_speedup=2.0)
    baseline = table.of_baseline("torch.mm.bf16", REQUEST)
    assert (baseline.median_us, baseline.assumed) == (20.0, False)
    emulated = table.of_candidate("emulated.linear.rowwise", REQUEST, baseline)
    assert (emulated.median_us, emulated.source, emulated.assumed) == (10.0, "assumed 2x", True)
    assert table.of_candidate("torch.scaled_mm.rowwise", REQUEST, baseline) is None
    unit = table.of_baseline("torch.mm.bf16", replace(REQUEST, m=1))
    assert (unit.median_us, unit.assumed) == (1.0, True)


def test_the_source_of_a_table_is_that_of_its_times():
    assert TimeTable([timing("a.b", 1.0)], source="profile: h200").lookup("a.b", REQUEST).source == "profile: h200"
    assert TimeTable().assumption == ""
    assert str(CPU) == timing("a.b", 1.0).device


def test_a_device_elsewhere_may_be_named_with_its_profile():
    options = PlanOptions.of(device="cuda", device_profile=made_profile())
    assert options.info == HOPPER
