"""Times on several kinds of values: the same shapes and kernels, other operands, no time made up."""

import pytest
import torch

from loka.dispatch.measuring import compare_values as module
from loka.dispatch.measuring.compare_values import compare_values, parse_kinds
from loka.dispatch.measuring.draws import Source
from loka.dispatch.measuring.shapes import Shape
from loka.errors import ArgumentError
from loka.kernel_registry.builtin import KERNELS
from loka.kernel_registry.registry import Registry
from loka.kernel_registry.spec import GemmRequest, KernelSpec
from loka.probes.sampling.learning import Learner
from loka.probes.sampling.measure import Sampled
from loka.reports.values import values_table

SEEN: list[tuple[str, float, float]] = []


def noting(a, b, *, product, out_dtype):
    """A kernel that notes the size of what it is given."""
    SEEN.append((product, float(a.float().abs().max()), float(b.float().abs().max())))
    return a.to(out_dtype) @ b.to(out_dtype).t()


@pytest.fixture
def registry():
    made = Registry()
    for spec in KERNELS:
        if spec.recipe is None:
            made.add(spec, owner="loka")
    where = "tests.dispatch.test_compare_values:noting"
    made.add(KernelSpec(name="noting.linear.rowwise", op="linear", recipe="rowwise", implementation=where), owner="me")
    SEEN.clear()
    return made


def shape(source):
    request = GemmRequest(site="up", product="fprop", op="linear", m=16, n=4, k=8, dtype="float32")
    return Shape(request=request, products=(), source=source)


def test_every_kind_has_a_time_for_every_kernel_and_zeros_are_zeros(registry):
    source = Source(rms={"input": 50.0, "weight": 0.01})
    found = compare_values([shape(source)], registry, "cpu", ("normal", "zeros"), budget_s=0.01)
    assert {(each.kernel, each.values) for each in found} == {
        (kernel, kind) for kernel in ("torch.mm.fp32", "noting.linear.rowwise") for kind in ("normal", "zeros")
    }
    assert all(each.median_us > 0 and each.repetitions >= 7 for each in found)
    sizes = {(a, b) for _, a, b in SEEN}
    assert (0.0, 0.0) in sizes
    assert all(a > 50 and b < 0.1 for a, b in sizes - {(0.0, 0.0)})


def test_learned_values_are_drawn_as_the_run_has_learned_them(registry):
    x, weight = 7.0 + torch.rand(64, 8), torch.randn(4, 8)
    learner = Learner(limit_bytes=1 << 20)
    learner.learn("s", "fprop", Sampled(a=x, b=weight, y=x @ weight.T, a_amax=float(x.max())), 1)
    record = next(record for record in learner.records({"s": "up"}) if record.kind == "input")
    found = compare_values(
        [shape(Source(learned={"input": record}))], registry, "cpu", ("zeros", "learned"), budget_s=0.01
    )
    assert {each.values for each in found} == {"zeros", "learned"}
    assert {round(a) for _, a, _ in SEEN} == {0, 8}


def test_asking_for_learned_values_where_nothing_is_learned_is_an_error(registry):
    with pytest.raises(ArgumentError, match="Nothing is learned"):
        compare_values([shape(Source())], registry, "cpu", ("normal", "learned"), budget_s=0.01)


@pytest.mark.parametrize(("text", "word"), [("normal", "two kinds"), ("normal,zeroes", "zeros"), ("", "two kinds")])
def test_kinds_that_make_no_comparison_are_refused(text, word):
    with pytest.raises(ArgumentError, match=word):
        parse_kinds(text)
    assert parse_kinds(" zeros , normal,zeros") == ("zeros", "normal")


def test_a_budget_that_is_spent_leaves_shapes_out(registry, caplog):
    assert compare_values([shape(Source())] * 3, registry, "cpu", ("normal", "zeros"), budget_s=0) == []
    assert "3 of 3 shapes left untimed" in caplog.text


def test_the_table_compares_with_the_first_kind(registry):
    from rich.console import Console

    found = compare_values([shape(Source())], registry, "cpu", ("zeros", "normal"), budget_s=0.01)
    console = Console(width=120, record=True)
    console.print(values_table(found))
    text = console.export_text()
    assert text.index("zeros, us") < text.index("normal, us")
    (line,) = (line for line in text.split("\n") if "noting" in line)
    assert "x" in line.rsplit("(", 1)[1]
    assert module.KINDS == ("normal", "zeros", "learned")
