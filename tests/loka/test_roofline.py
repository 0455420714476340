"""Ceilings and shares: the arithmetic is checked by hand, the measurement by what no machine can contradict."""

import time

import pytest
import torch

from loka.kernel_registry.ceilings import precision_of
from loka.kernel_registry.spec import GemmRequest
from loka.roofline import Ceilings, measure_ceilings, roofline
from loka.workloads import suites

CEILINGS = Ceilings(bytes_per_s=1e11, flops_per_s={"float32": 1e12, "fp8": 4e12})


def request(**changes):
    fields = {"site": "up", "product": "fprop", "op": "linear", "m": 10, "n": 20, "k": 30, "dtype": "bfloat16"}
    return GemmRequest(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "flops", "moved"),
    [
        ({}, 12_000, 2 * (300 + 600 + 200)),
        ({"dtype": "float32"}, 12_000, 4 * (300 + 600 + 200)),
        ({"op": "bmm", "batch": 3}, 36_000, 3 * 2 * (300 + 600 + 200)),
        # Ten tokens in all, a weight for each of four experts; and a gradient for each.
        ({"op": "grouped_linear", "batch": 4}, 12_000, 2 * (300 + 4 * 600 + 200)),
        ({"op": "grouped_linear", "batch": 4, "product": "wgrad"}, 12_000, 2 * (300 + 600 + 4 * 200)),
    ],
)
def test_work_is_what_no_implementation_can_avoid(changes, flops, moved):
    made = request(**changes)
    assert (made.flops, made.moved_bytes) == (flops, moved)


def test_the_ceiling_that_takes_longer_binds():
    memory = roofline(1e8, 1e8, 2000.0, 1e12, CEILINGS)  # 1 ms of moving, 0.1 ms of computing, in 2 ms
    assert (memory.bandwidth_share, memory.compute_share, memory.binds) == pytest.approx((0.5, 0.05, "memory"))
    compute = roofline(1e7, 1e9, 2000.0, 1e12, CEILINGS)
    assert (compute.bandwidth_share, compute.compute_share, compute.binds) == pytest.approx((0.05, 0.5, "compute"))


@pytest.mark.parametrize(("time_us", "peak"), [(0.0, 1e12), (float("nan"), 1e12), (5.0, 0.0)])
def test_nothing_is_said_where_nothing_is_known(time_us, peak):
    assert roofline(1e8, 1e8, time_us, peak, CEILINGS) is None


@pytest.mark.parametrize(
    ("kernel", "recipe", "precision"),
    [
        ("torch.mm.bf16", None, "bfloat16"),
        ("emulated.linear.rowwise", "rowwise", "float32"),
        ("torch.scaled_mm.rowwise", "rowwise", "fp8"),
    ],
)
def test_a_kernel_is_held_to_the_ceiling_of_its_precision(kernel, recipe, precision):
    assert precision_of(kernel, recipe, "bfloat16") == precision


def test_a_measured_ceiling_is_of_this_machine():
    found = measure_ceilings("cpu", budget_s=0.05, fp8_product=lambda extent: torch.zeros(extent))
    assert set(found.flops_per_s) == {"float32", "bfloat16", "float16", "fp8"}
    # From an old laptop to a large server; and a call that does no work reaches more than one that does.
    assert 1e8 < found.bytes_per_s < 1e13
    assert 1e8 < found.flops_per_s["float32"] < found.flops_per_s["fp8"]


def test_a_slow_product_is_made_smaller_until_several_fit_the_budget():
    flops_per_s, extents = 2 * 1024**3 / 0.45, []

    def slow(extent):
        extents.append(extent)
        time.sleep(2 * extent**3 / flops_per_s)

    found = measure_ceilings("cpu", budget_s=0.5, fp8_product=slow)
    assert max(extents) == 256  # 0.007 s each, of 0.02 s; of twice the extent it takes 0.056 s
    assert found.flops_per_s["fp8"] == pytest.approx(flops_per_s, rel=0.3)


def test_suites_have_work():
    assert all(2 * each.m * each.n * each.k for name in suites.SUITES for each in suites.suite(name))
