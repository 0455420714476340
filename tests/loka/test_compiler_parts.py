"""The backend `loka` where a graph is not the whole model: checkpoints, graph breaks, blocks compiled by themselves."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loka.compiler import _plan, unreached
from loka.dispatch.deciding.plan import Plan
from loka.dispatch.running.convert import convert
from loka.dispatch.running.linear import linear
from loka.errors import ArgumentError
from tests.dispatch.made_conversion import MIXED, emulated, plan_for
from tests.loka.made_compiled import Backend


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Blocks share their code, and Dynamo's graphs of it with those of the test before."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(x)))


class Stack(nn.Module):
    """Blocks that are all of one shape, run in the way that is given."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__) -> None:
        super().__init__()
        self.up = nn.Linear(12, 16)  # a name that blocks have as well, for another shape
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(16, 4)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        for block in self.blocks:
            x = self.run(block, x)
        return self.head(x)


BODY = [f"blocks.{i}.{name}" for i in range(3) for name in ("up", "down")]
ALL = ["up", *BODY, "head"]


def gradients(model: Callable, parameters: nn.Module, x: Tensor) -> dict[str, Tensor]:
    parameters.zero_grad()
    model(x).square().sum().backward()
    return {name: parameter.grad for name, parameter in parameters.named_parameters()}


def assert_equals_conversion(compiled: Callable, model: nn.Module, plan: Plan, x: Tensor) -> None:
    expected = copy.deepcopy(model)
    torch.testing.assert_close(
        gradients(compiled, model, x), gradients(convert(expected, plan), expected, x), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_checkpoint_computes_again_runs_as_planned(reentrant: bool) -> None:
    model, x = Stack(lambda block, x: checkpoint(block, x, use_reentrant=reentrant)), torch.randn(5, 12)
    plan = plan_for(model, ALL)
    backend = Backend(plan)
    assert_equals_conversion(torch.compile(model, backend=backend, fullgraph=True), model, plan, x)
    assert sorted(backend.sites) == sorted(ALL)
    assert len(backend.found) == 1


def test_a_checkpoint_within_a_checkpoint_runs_as_planned() -> None:
    def twice(block: nn.Module, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return checkpoint(block, x, use_reentrant=False).cos()

        return checkpoint(inner, x, use_reentrant=False)

    model, x = Stack(twice), torch.randn(5, 12)
    plan = plan_for(model, ["blocks.1.up", "blocks.2.down"])
    backend = Backend(plan)
    assert_equals_conversion(torch.compile(model, backend=backend, fullgraph=True), model, plan, x)
    assert sorted(backend.sites) == ["blocks.1.up", "blocks.2.down"]


def test_a_transposed_weight_that_is_handed_to_a_checkpoint_is_found() -> None:
    class Handed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(torch.matmul, x, self.w.t(), use_reentrant=False)

    model, x = Handed(), torch.randn(5, 16)
    backend = Backend(plan_for(model, ["w"]))
    got = gradients(torch.compile(model, backend=backend, fullgraph=True), model, x)["w"].clone()
    kernels = [emulated(MIXED[each]) for each in ("fprop", "dgrad", "wgrad")]
    expected = gradients(lambda x: linear(x, model.w, None, *kernels), model, x)["w"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert backend.sites == ["w"]


def test_blocks_compiled_one_by_one_run_as_planned_in_one_graph() -> None:
    model, x = Stack(), torch.randn(5, 12)
    plan = plan_for(model, BODY)
    backend = Backend(plan)
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    expected = copy.deepcopy(model)
    for block in expected.blocks:
        block._compiled_call_impl = None
    torch.testing.assert_close(
        gradients(model, model, x), gradients(convert(expected, plan), expected, x), rtol=1e-4, atol=1e-5
    )
    assert backend.found == [("blocks.0.up", "blocks.0.down")]
    assert unreached(plan) == ()


def test_of_blocks_planned_apart_only_what_is_planned_alike_runs(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Stack(), torch.randn(5, 12)
    alike = [f"blocks.{i}.up" for i in range(3)]
    plan = plan_for(model, [*alike, "blocks.1.down"])
    backend = Backend(plan)
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    got = model(x)
    for block in model.blocks:
        block._compiled_call_impl = None
    torch.testing.assert_close(got, convert(model, plan_for(model, alike))(x), rtol=1e-4, atol=1e-5)
    assert backend.sites == ["blocks.0.up"]
    assert "a graph with down.weight is a part of Stack that" in caplog.text
    assert unreached(plan) == ("blocks.1.down",)


def test_a_submodule_that_is_compiled_alone_is_known_where_it_fits_one_place() -> None:
    model, x = Stack(), torch.randn(5, 12)
    plan = plan_for(model, ["up", "head"])
    backend = Backend(plan)
    expected = convert(copy.deepcopy(model), plan)(x)
    for name in ("up", "head"):
        setattr(model, name, torch.compile(getattr(model, name), backend=backend, fullgraph=True))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert backend.found == [("up",), ("head",)]


def test_modules_that_a_resumed_function_has_yet_to_call_are_known() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.block, self.head = nn.Linear(12, 16), Block(), nn.Linear(16, 4)

        @torch.compiler.disable
        def aside(self, x: Tensor) -> Tensor:
            return x.cos()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(self.aside(self.first(x))))

    model, x = Nested(), torch.randn(5, 12)
    plan = plan_for(model, ["first", "block.up", "block.down", "head"])
    backend = Backend(plan)
    assert_equals_conversion(torch.compile(model, backend=backend), model, plan, x)
    assert backend.found == [("first",), ("block.up", "block.down", "head")]


def test_sites_that_no_graph_has_are_named() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.aside = nn.Linear(12, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.compiler.disable(self.aside)(self.first(x))

    model, x = Aside(), torch.randn(5, 12)
    plan = plan_for(model, ["first", "aside"])
    assert unreached(plan) == ("aside", "first")
    torch.compile(model, backend=Backend(plan))(x)
    assert unreached(plan) == ("aside",)


def test_what_is_compiled_beside_the_planned_model_may_have_weights(caplog: pytest.LogCaptureFixture) -> None:
    model, centres, x = Stack(), nn.Linear(4, 7, bias=False), torch.randn(5, 12)
    plan = plan_for(model, ALL)
    backend = Backend(plan)

    def loss(x: Tensor) -> Tensor:
        out = model(x)
        torch._dynamo.graph_break()
        return centres(out).square().sum()

    got = torch.compile(loss, backend=backend)(x)
    torch.testing.assert_close(got, centres(convert(model, plan)(x)).square().sum(), rtol=1e-4, atol=1e-5)
    assert [len(found) for found in backend.found] == [len(ALL), 0]
    assert "a graph with weight has nothing of Stack" in caplog.text


class Codebook(nn.Module):
    """A table that no optimizer trains, behind a graph break, and before any planned product."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(12, 9))
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        nearest = (x @ self.table).argmax(-1)
        torch._dynamo.graph_break()
        return self.head(self.table.T[nearest])


def test_a_graph_with_a_table_that_is_no_parameter_is_no_other_model(caplog: pytest.LogCaptureFixture) -> None:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codebook, self.book = Codebook(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.book(self.codebook(x))

    model, x = Quantised(), torch.randn(12, 12)
    plan = plan_for(model, ["codebook.head", "book"])
    expected = convert(copy.deepcopy(model), plan)(x)
    got = torch.compile(model, backend=Backend(plan))(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert unreached(plan) == ()
    assert "has nothing of" not in caplog.text


class Scores(nn.Module):
    """Scores of all items against a history, by the table that the history is looked up in, with a break between."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(40, 32)
        self.up = nn.Linear(32, 32)

    def forward(self, history: Tensor) -> Tensor:
        h = self.up(self.items(history).mean(1))
        torch._dynamo.graph_break()
        return h @ self.items.weight.t()


def test_a_table_that_a_graph_only_takes_rows_of_is_no_product_that_stays(caplog: pytest.LogCaptureFixture) -> None:
    model, history = Scores(), torch.randint(40, (8, 5))
    plan = plan_for(model, ["items", "up"])
    expected = convert(copy.deepcopy(model), plan)(history)
    backend = Backend(plan)
    torch.testing.assert_close(torch.compile(model, backend=backend)(history), expected)
    assert backend.found == [("up",), ("items",)]
    assert "stays as written" not in caplog.text


def test_a_step_that_clips_gradients_is_compiled_whole() -> None:
    """Behind the backward pass graphs take gradients, which are no parameters."""
    model, x = Stack(), torch.randn(5, 12)
    plan = plan_for(model, ALL)
    expected = convert(copy.deepcopy(model), plan)

    def step(each: nn.Module) -> Tensor:
        loss = each(x).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(each.parameters(), 0.1)
        with torch.no_grad():
            for parameter in each.parameters():
                parameter -= 0.01 * parameter.grad
                parameter.grad = None
        return loss.detach()

    compiled = torch.compile(step, backend=Backend(plan))
    got = [float(compiled(model)) for _ in range(2)]
    assert got == pytest.approx([float(step(expected)) for _ in range(2)], rel=1e-5)
    assert unreached(plan) == ()


def test_a_layer_whose_weight_is_computed_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = Stack()
    nn.utils.parametrizations.weight_norm(model.head)
    plan = plan_for(model, ["up", "head"])
    backend = Backend(plan)
    torch.compile(model, backend=backend, fullgraph=True)(torch.randn(5, 12))
    assert backend.sites == ["up"]
    assert "head is planned in FP8, but" in caplog.text


def test_a_layer_that_its_module_sets_anew_is_known() -> None:
    """Routers of transformers cast their classifier so, after they have set an attribute: its source is another one."""

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.dtype = x.dtype
            self.classifier = self.classifier.to(torch.float32)
            return self.classifier(x).softmax(-1)

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = Router()

        def forward(self, x: Tensor) -> Tensor:
            return self.router(x)

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.experts = nn.Linear(12, 16), Experts()

        def forward(self, x: Tensor) -> Tensor:
            return self.experts(self.first(x))

    model, x = Routed(), torch.randn(5, 12)
    plan = plan_for(model, ["experts.router.classifier"])
    backend = Backend(plan)
    assert_equals_conversion(torch.compile(model, backend=backend), model, plan, x)
    torch.compile(model.experts, backend=backend)(torch.randn(5, 16))
    assert backend.sites == ["experts.router.classifier"] * 2


def test_a_plan_in_a_file_is_read_once_for_all_graphs_and_anew_when_it_changes(tmp_path, monkeypatch):
    reads = []
    load = Plan.load
    monkeypatch.setattr(Plan, "load", lambda path: reads.append(path) or load(path))
    path, model = tmp_path / "plan.json", nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    plan_for(model, {"0": MIXED}).save(path)
    assert _plan(path) is _plan(str(path))
    assert len(reads) == 1
    plan_for(model, {"0": MIXED, "2": MIXED}).save(path)
    assert {each.request.site for each in _plan(path).decisions} == {"0", "2"}
    assert len(reads) == 2


@pytest.mark.parametrize("given", [3, 0.5, object(), ["plan.json"]])
def test_what_is_neither_a_plan_nor_a_path_is_refused_in_words(given: object) -> None:
    with pytest.raises(ArgumentError, match="path of one"):
        _plan(given)  # type: ignore[arg-type]  # what a user may give all the same


def test_the_hash_of_a_plan_is_that_of_what_it_says_now():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    plan = plan_for(model, {"0": MIXED})
    assert plan.hash == plan.hash == copy.deepcopy(plan).hash
    changed = replace(plan, notes=("another",))
    assert changed.hash != plan.hash == replace(changed, notes=plan.notes).hash


def test_a_graph_that_torch_cannot_compile_reaches_nothing() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.scores = nn.Linear(12, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            x, longest = self.up(x), lengths.max()
            torch._dynamo.graph_break()
            return self.scores(x) * (torch.arange(longest) < lengths.unsqueeze(1))  # a size that only values tell

    model, x, lengths = Masked(), torch.randn(5, 12), torch.tensor([8, 2, 3, 1, 4])
    plan = plan_for(model, ["up", "scores"])
    converted = convert(
        copy.deepcopy(model), replace(plan, decisions=[d for d in plan.decisions if d.request.site == "up"])
    )
    with torch.no_grad():
        got = torch.compile(model, backend="loka", options={"plan": plan})(x, lengths)
        torch.testing.assert_close(got, converted(x, lengths))
    assert unreached(plan) == ("scores",)
