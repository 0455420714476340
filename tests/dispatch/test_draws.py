"""Kernels are timed on values like those of the run: learned activations and gradients, weights of the measured rms."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import loka
from loka.dispatch.measuring.bench import bench_database
from loka.dispatch.measuring.draws import Source, draw_operands, sources
from loka.formats import PASS_OPERANDS, PASSES
from loka.kernel_registry.spec import GemmRequest
from loka.probes.judging.evidence import collect_evidence
from loka.probes.sampling.learning import Learner
from loka.probes.sampling.measure import Sampled
from loka.probes.storing.database import open_database, read_learned

CPU = torch.device("cpu")


def spiky(rows, features, seed):
    """Rows that N(0, 1) is nothing like: one loud feature, three quarters of zeros, the rest positive."""
    x = torch.randn(rows, features, generator=torch.Generator().manual_seed(seed)).sub(0.67).relu()
    x[:, 3] *= 100
    return x


def records(k=24, n=16):
    learner = Learner(limit_bytes=100 << 20)
    weight = torch.randn(n, k)
    for step in range(4):
        x, gradient = spiky(64, k, step), spiky(64, n, 100 + step)
        learner.learn("s", "fprop", Sampled(a=x, b=weight, y=x @ weight.T, a_amax=float(x.max())), step)
        learner.learn("s", "dgrad", Sampled(a=gradient, b=weight.T, y=gradient @ weight, a_amax=1.0), step)
    return {record.kind: record for record in learner.records({"s": "layer"}) if record.kind != "statistics"}


def request(product, m, n, k):
    return GemmRequest(site="layer", product=product, op="linear", m=m, n=n, k=k, dtype="float32")


def looks_spiky(x):
    assert (x >= 0).all()
    assert (x == 0).float().mean() == pytest.approx(0.75, abs=0.06)
    return float(x[:, 3].max() / x[:, 4].max()) > 20


def test_each_operand_of_each_pass_is_drawn_from_its_own_distribution():
    found = Source(learned=records(), rms={"weight": 0.02})
    shapes = {"fprop": (2000, 16, 24), "dgrad": (2000, 24, 16), "wgrad": (16, 24, 2000)}
    for product in PASSES:
        drawn = draw_operands(request(product, *shapes[product]), torch.float32, CPU, found)
        assert drawn.values == "learned"
        a, b = drawn.pairs[0]
        for role, x in zip(PASS_OPERANDS[product], (a, b), strict=True):
            natural = x.t() if product == "wgrad" else x
            if role == "weight":
                assert x.square().mean().sqrt() == pytest.approx(0.02, rel=0.2)
            else:
                assert looks_spiky(natural)
    a, b = draw_operands(request("wgrad", 16, 24, 1000), torch.float32, CPU, found).pairs[0]
    between = np.corrcoef(a.numpy(), b.numpy())[:16, 16:]
    assert np.abs(between).max() < 0.2  # drawn independently of each other


def test_other_features_and_unknown_operands_are_normal_at_the_measured_rms():
    other = Source(learned=records(), rms={"input": 3.0})
    a, b = draw_operands(request("fprop", 500, 16, 40), torch.float32, CPU, other).pairs[0]
    assert a.square().mean().sqrt() == pytest.approx(3.0, rel=0.05)
    assert (a < 0).any()
    assert b.square().mean().sqrt() == pytest.approx(1.0, rel=0.1)


def test_values_are_called_what_they_are():
    def values(product, m, n, k, **source):
        return draw_operands(request(product, m, n, k), torch.float32, CPU, Source(**source)).values

    known = records()
    assert values("wgrad", 16, 24, 50, learned=known) == "learned"
    assert values("wgrad", 16, 40, 50, learned=known) == "partly learned"  # the input has other features
    assert values("wgrad", 16, 24, 50, learned={"input": known["input"]}) == "partly learned"
    assert values("fprop", 50, 16, 40, learned=known) == "normal"
    assert values("fprop", 50, 16, 24, learned={"input": replace(known["input"], data=b"damaged")}) == "normal"
    assert values("fprop", 50, 16, 24) == "normal"


def test_the_same_values_every_time():
    found = Source(learned=records())
    first, second = (
        draw_operands(request("fprop", 1500, 16, 24), torch.bfloat16, CPU, found).pairs[0] for _ in range(2)
    )
    assert all(map(torch.equal, first, second))
    assert first[0].dtype == torch.bfloat16


def test_bench_draws_from_what_a_run_has_learned(tmp_path):
    layer = torch.nn.Sequential(torch.nn.Linear(24, 16))
    with loka.probe(layer, tmp_path / "run.db", every=1, overhead=100.0):
        for step in range(10):
            layer(spiky(64, 24, step)).square().mean().backward()
    timings = bench_database(str(tmp_path / "run.db"), "cpu", 20.0)
    assert {timing.values for timing in timings if timing.product == "fprop"} == {"learned"}
    engine = open_database(tmp_path / "run.db", create=False)
    found = sources(read_learned(engine), collect_evidence(engine).products)
    engine.dispose()
    a, b = draw_operands(request("fprop", 2000, 16, 24), torch.float32, CPU, found["0", "fprop"]).pairs[0]
    assert looks_spiky(a)
    assert b.square().mean().sqrt() == pytest.approx(float(layer[0].weight.detach().square().mean().sqrt()), rel=0.15)
