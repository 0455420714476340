"""When a kept weight ends: with every change of its values, and where nothing may be kept at all."""

import copy
import gc
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from loka.dispatch.running import weights
from loka.dispatch.running.convert import convert, revert
from loka.formats import PASS_OPERANDS, RECIPES
from loka.kernel_registry.operands import quantize_operand
from loka.kernel_registry.registry import default_registry
from tests.dispatch.made_cached import (
    HALVES,
    HERE,
    SITES,
    accumulate,
    accumulate_gradients,
    assert_equal,
    batches,
    bf16_autocast,
    converted,
    kept_of,
    mlp,
    plan_of,
)
from tests.dispatch.made_conversion import plan_for
from tests.kernel_registry.made_devices import interprets_triton

pytestmark = pytest.mark.usefixtures("nothing_kept")


# --- when a weight changes ---


def edited(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight.mul_(1.5)


def one_element(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight[3, 5] = 7.0


def loaded(model: nn.Module) -> None:
    model.load_state_dict({key: 1.5 * value for key, value in model.state_dict().items()})


def assigned(model: nn.Module) -> None:
    model.load_state_dict({key: 1.5 * value for key, value in model.state_dict().items()}, assign=True)


def swapped(model: nn.Module) -> None:
    model[0].weight.data = 1.5 * model[0].weight.data


def replaced(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(1.5 * model[0].weight.detach())


def initialised(model: nn.Module) -> None:
    nn.init.ones_(model[0].weight)


def cast_twice(model: nn.Module) -> None:
    """The second cast may well get the memory that the first one gave back."""
    model.bfloat16().float()


def swapped_into_the_same_memory(model: nn.Module) -> None:
    weight = model[0].weight
    address, value = weight.data_ptr(), 1.5 * weight.detach()
    weight.data = torch.empty(0)
    tries = []
    while weight.data_ptr() != address and len(tries) < 100:
        tries.append(torch.empty_like(value))
        weight.data = tries[-1]
    weight.data.copy_(value)


class WritesThroughData(torch.optim.Optimizer):
    """An optimiser of the kind that no version counter sees."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, {})

    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(1.5)


def stepped_through_data(model: nn.Module) -> None:
    WritesThroughData(model.parameters()).step()


def evaluated_with_other_weights(model: nn.Module) -> None:
    """What evaluations with averaged weights do, and what they leave."""
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    with torch.no_grad():
        got = model(batches()[0])
        fresh = converted(cache_weights=False)
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(got, fresh(batches()[0]))
    for parameter, value in zip(model.parameters(), kept, strict=True):
        parameter.data.copy_(value)


CHANGES = [
    edited,
    one_element,
    loaded,
    assigned,
    swapped,
    replaced,
    initialised,
    cast_twice,
    swapped_into_the_same_memory,
    stepped_through_data,
]


@pytest.mark.parametrize("change", [*CHANGES, evaluated_with_other_weights], ids=lambda change: change.__name__)
def test_what_is_kept_goes_when_the_weight_changes(change: Callable[[nn.Module], None]) -> None:
    model, plain = converted(), converted(cache_weights=False)
    before = accumulate(model)
    assert weights.kept_bytes() > 0
    for each in (model, plain):
        change(each)
    after = accumulate(model)
    assert_equal(after, accumulate(plain))
    assert torch.equal(after[0], before[0]) == (change is evaluated_with_other_weights)


OPTIMIZERS = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in ("Optimizer", "SparseAdam")
)

FUSED = ("SGD", "Adam", "AdamW", "Adagrad")


ALL = [*((name, {}) for name in OPTIMIZERS), *((name, {"fused": True}) for name in FUSED)]


@pytest.mark.parametrize(("name", "how"), ALL, ids=str)
def test_every_optimizer_trains_to_the_same_weights(name: str, how: dict[str, bool]) -> None:
    trained = []
    for cache_weights in (True, False):
        model = converted(cache_weights=cache_weights)
        parameters = [p for p in model.parameters() if name != "Muon" or p.dim() == 2]
        optimizer = getattr(torch.optim, name)(parameters, lr=0.05, **how)

        def loss(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            values = [model(x).square().mean() for x in batches()]
            for value in values:
                value.backward()
            return torch.stack(values).sum()

        start = [p.detach().clone() for p in parameters]
        for _ in range(3):
            optimizer.step(loss)
        assert not any(torch.equal(a, b) for a, b in itertools.islice(zip(parameters, start, strict=True), 1))
        trained.append([p.detach() for p in model.parameters()])
    assert_equal(*trained)


@pytest.mark.parametrize("change", [edited, stepped_through_data], ids=lambda change: change.__name__)
def test_a_backward_after_a_step_reads_the_weight_of_its_forward(change: Callable[[nn.Module], None]) -> None:
    """Under autocast, whose casts survive an update: a pipeline may run so."""
    gradients = []
    for cache_weights in (True, False):
        model = converted(cache_weights=cache_weights)
        first, second = batches()[:2]
        with bf16_autocast():
            early = model(first)
        change(model)
        early.float().sum().backward()
        with bf16_autocast():
            late = model(second)
        late.float().sum().backward()
        gradients.append([first.grad, second.grad, *(p.grad for p in model.parameters())])
    assert_equal(*gradients)


# --- what it costs, and where it stays away ---


def test_one_copy_per_pass_is_kept_and_goes_with_a_step_or_the_model() -> None:
    model = converted()
    size = sum(kept_of(model[int(site)].weight) for site in SITES)
    for _ in range(3):
        accumulate(model)
        assert weights.kept_bytes() == size
    accumulate_gradients(model)
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert weights.kept_bytes() == 0
    accumulate(model)
    assert weights.kept_bytes() > 0
    del model
    gc.collect()
    assert weights.kept_bytes() == 0


def test_a_real_kernel_keeps_codes() -> None:
    model = converted("torch.scaled_mm.tensorwise")
    accumulate(model)
    elements = 2 * sum(model[int(site)].weight.numel() for site in SITES)
    assert elements <= weights.kept_bytes() <= elements + 2 * len(SITES) * 4


def test_views_of_changing_extent_do_not_grow() -> None:
    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(64, 16))

        def forward(self, x: Tensor, n: int) -> Tensor:
            return F.linear(x, self.w[:n])

    model = Sliced()
    convert(model, plan_for(model, ["w"]), cache_weights=True)
    for n in range(1, 65):
        model(torch.randn(3, 16, requires_grad=True), n).sum().backward()
        assert weights.kept_bytes() <= kept_of(model.w)


def test_nothing_is_kept_unless_asked_for_nor_after_the_conversion_is_undone() -> None:
    plain, model = converted(cache_weights=False), converted()
    accumulate(plain)
    assert weights.kept_bytes() == 0
    accumulate(model)
    assert weights.kept_bytes() > 0
    revert(model)
    assert weights.kept_bytes() == 0
    accumulate(model)
    assert weights.kept_bytes() == 0


def test_nothing_is_kept_where_autograd_does_not_record() -> None:
    model = converted()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            model(batches()[0])
    assert weights.kept_bytes() == 0


def test_nothing_is_kept_of_a_copy_nor_of_a_computed_weight() -> None:
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[0])
    convert(model, plan_of(model, ["0"], "emulated.linear.rowwise"), cache_weights=True)
    accumulate(model)
    accumulate(copy.deepcopy(converted()))
    assert weights.kept_bytes() == 0


class Seen(TorchDispatchMode):
    """Counts what a mode sees, such as one that makes a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_what_it_sees_without() -> None:
    model, plain = converted(), converted(cache_weights=False)
    accumulate(model)
    seen = []
    for each in (model, plain):
        with Seen() as mode:
            each(batches()[0])
        seen.append(mode.operators)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("first", ["eager", "compiled"])
def test_compiled_code_neither_reads_nor_keeps(first: str) -> None:
    model, plain = converted(), converted(cache_weights=False)
    if first == "eager":
        accumulate(model)
    kept = weights.kept_bytes()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        x = batches()[0]
        compiled(x).sum().backward()
        torch.testing.assert_close(x.grad, torch.autograd.grad(plain(y := batches()[0]).sum(), y)[0])
        edited(model)
        edited(plain)
    assert weights.kept_bytes() == kept


@pytest.mark.parametrize("name", HALVES)
def test_the_halves_of_a_kernel_are_the_kernel(name: str) -> None:
    if name not in HERE and not (name.startswith("triton.") and interprets_triton()):
        pytest.skip("needs a GPU")
    spec = default_registry().get(name)
    kernel, halves = spec.load(), spec.load_prepared()
    for product, (m, n, k) in itertools.product(spec.passes, [(9, 13, 40), (3, 130, 129), (0, 4, 8), (4, 3, 0)]):
        a, b = torch.randn(m, k), torch.randn(n, k)
        for out_dtype in (torch.float32, torch.bfloat16):
            how = {"product": product, "out_dtype": out_dtype}
            want = kernel(a, b, **how)
            assert torch.equal(halves.multiply(a, halves.prepare(b, **how), **how), want)
            if n * k:
                codes, scale, _ = quantize_operand(b, RECIPES[spec.recipe].operand(PASS_OPERANDS[product][1]))
                assert torch.equal(halves.multiply(a, halves.lay_out(codes, scale, **how), **how), want)
