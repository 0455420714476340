"""Products of experts and of batches from a probed model to times, verification and a plan."""

import pytest
import torch
from torch.nn.functional import grouped_mm

import loka
from loka.dispatch.measuring.bench import bench_database, bench_suite, profile_of, shapes_for, verify_shapes
from loka.dispatch.measuring.shapes import shapes_of
from loka.probes.judging.evidence import collect_evidence
from loka.probes.storing.database import open_database
from loka.workloads.suites import SUITES, SuiteProduct, suite

COUNTS, FEATURES, HIDDEN = (5, 0, 14, 2), 16, 24


class Experts(torch.nn.Module):
    """A linear layer per expert, and the scores of all tokens with each other."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(len(COUNTS), FEATURES, HIDDEN) / 4)
        self.offsets = torch.tensor(COUNTS).cumsum(0).to(torch.int32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = grouped_mm(x, self.weight, offs=self.offsets)
        heads = hidden.view(len(x), 3, -1).transpose(0, 1)
        return torch.bmm(heads, heads.mT)


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    torch.manual_seed(0)
    model, path = Experts(), tmp_path_factory.mktemp("grouped") / "run.db"
    with loka.probe(model, path, every=1, overhead=100.0):
        for _ in range(12):
            model(torch.randn(sum(COUNTS), FEATURES)).square().mean().backward()
    return path


def test_the_number_of_experts_comes_from_the_shape_of_their_weight(database):
    engine = open_database(database, create=False)
    shapes = shapes_of(collect_evidence(engine))
    engine.dispose()
    found = {(each.request.op, each.request.product): each.request for each in shapes}
    tokens = sum(COUNTS)
    for product, shape in (
        ("fprop", (tokens, HIDDEN, FEATURES)),
        ("wgrad", (FEATURES, HIDDEN, tokens)),
    ):
        request = found["grouped_linear", product]
        assert (request.m, request.n, request.k) in (shape, (shape[1], shape[0], shape[2]))
        assert request.batch == len(COUNTS)
    assert found["bmm", "fprop"].batch == 3


def test_a_run_with_experts_and_batches_is_timed_and_verified(database):
    timings = bench_database(database, "cpu", 30.0)
    by_kernel = {}
    for each in timings:
        by_kernel.setdefault(each.kernel, []).append(each)
    for recipe in ("tensorwise", "rowwise", "blockwise", "mxfp8"):
        assert {each.batch for each in by_kernel[f"emulated.grouped_linear.{recipe}"]} == {len(COUNTS)}
        assert {each.batch for each in by_kernel[f"emulated.bmm.{recipe}"]} == {3}
    assert "torch.grouped_mm.fp32" in by_kernel
    assert "torch.native.bmm" in by_kernel
    assert profile_of(timings, "here", "cpu").times
    assert bench_database(database, "cpu", 30.0) == timings  # nothing is timed twice
    assert all(each.holds for each in verify_shapes(shapes_for(str(database), None, "cpu"), "cpu"))


def test_a_plan_runs_experts_and_leaves_batches_as_written(database):
    plan = loka.plan(database, loka.Bound(row_error=0.2), device="cpu", assume_speedup=2.0)
    assert {decision.request.op for decision in plan.decisions} == {"grouped_linear", "bmm"}
    for decision in plan.decisions:
        if decision.request.op == "grouped_linear":
            assert decision.kernel.startswith("emulated.grouped_linear.")
            assert decision.baseline == "torch.grouped_mm.fp32"
            continue
        assert decision.kernel == decision.baseline
        reasons = [each for each in decision.rejected if each.kernel.startswith("emulated.")]
        assert len(reasons) == 4
        assert {each.code for each in reasons} == {"cannot"}
        assert {each.reason for each in reasons} == {
            "dispatch runs linear products and those of experts; this one stays as written"
        }


def test_a_suite_says_who_has_how_many_tokens():
    for product in suite("moe-small"):
        assert (len(product.tokens), sum(product.tokens)) == (product.batch, product.m)
    counts = [count for product in suite("moe-small") for count in product.tokens]
    assert min(counts) == 0
    assert any(count % 16 for count in counts)
    assert all(isinstance(product, SuiteProduct) and product.n for name in SUITES for product in suite(name))
    assert str(suite("moe-small")[0]) == "8x1024x256x1024"


def test_times_of_uneven_experts_say_so(monkeypatch):
    monkeypatch.setitem(SUITES, "tiny", (SuiteProduct(op="grouped_linear", m=9, k=16, n=8, batch=3, tokens=(0, 7, 2)),))
    timings = bench_suite("tiny", "cpu", 20.0)
    assert {(each.product, each.batch, each.values) for each in timings} == {
        (product, 3, "normal, uneven") for product in ("fprop", "dgrad", "wgrad")
    }
