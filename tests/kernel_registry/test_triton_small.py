"""Many small products in one launch against the numpy model and the definition; interpreted, or compiled on a GPU."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

from loka.errors import ArgumentError, KernelError
from loka.formats import PASS_OPERANDS, RECIPES
from loka.kernel_registry import emulated
from loka.kernel_registry.triton.launches import TUNABLES
from loka.quantize import quantize
from tests.cases import DRAWS, VALUES, heavy_tailed, normal
from tests.kernel_registry.made_devices import SHARED_KIB, TENSOR_CORES, needs_interpreter, triton_devices
from tests.kernel_registry.made_triton import assert_product, compiled_elsewhere, model

pytest.importorskip("triton")
small = pytest.importorskip("loka.kernel_registry.triton.small")

# numpy, which the interpreter computes with, warns of the NaN and Inf that some tests put in.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning:triton")
on_devices = pytest.mark.parametrize("device", triton_devices())
of_recipes = pytest.mark.parametrize("recipe", small.SMALL_RECIPES)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (m, n, k): plain; ragged against every group; one row; one column of a reduction; one result; beyond one 128 block.
SHAPES = [(32, 16, 64), (7, 13, 13), (1, 40, 140), (5, 3, 1), (6, 1, 33), (20, 131, 150)]


def assert_modelled(got, recipe, a, b, product):
    """Compare with the numpy model, within what an fp32 sum in any order may be off."""
    left, right = (model(x, recipe, role) for x, role in zip((a, b), PASS_OPERANDS[product], strict=True))
    assert_product(got, left, right, a.shape[1])


def drawn(shapes, draw=normal, device="cpu", dtype=torch.float32):
    """Inputs, weights and gradients of products of these (m, n, k), as leaves."""
    generator = torch.Generator().manual_seed(0)
    sides = [
        [draw(generator, shape).to(device, dtype) for shape in sizes]
        for sizes in zip(*(((m, k), (n, k), (m, n)) for m, n, k in shapes), strict=True)
    ]
    xs, weights, grads = sides
    return [x.requires_grad_() for x in xs], [weight.requires_grad_() for weight in weights], grads


# --- every product, in every pass ---


@on_devices
@of_recipes
@pytest.mark.parametrize("draw", DRAWS.values(), ids=list(DRAWS))
def test_products_and_gradients_equal_the_numpy_model(recipe, draw, device):
    xs, weights, grads = drawn(SHAPES if draw is normal else SHAPES[1:4], draw, device)
    results = small.many_linear(xs, weights, recipe)
    torch.autograd.backward(results, grads)
    for x, weight, grad, y in zip(xs, weights, grads, results, strict=True):
        assert y.dtype == x.dtype
        assert_modelled(y, recipe, x, weight, "fprop")
        assert_modelled(x.grad, recipe, grad, weight.t(), "dgrad")
        assert_modelled(weight.grad, recipe, grad.t(), x.t(), "wgrad")


@on_devices
@of_recipes
def test_values_near_the_ends_of_fp32_give_what_the_model_gives(recipe, device):
    generator = torch.Generator().manual_seed(0)
    draws = [pair for name, pair in VALUES.items() if name not in DRAWS]
    xs = [draw(generator, (3, 13)).to(device) for draw, _ in draws]
    weights = [draw(generator, (4, 13)).to(device) for _, draw in draws]
    for x, weight, y in zip(xs, weights, small.many_linear(xs, weights, recipe), strict=True):
        assert_modelled(y, recipe, x, weight, "fprop")


@on_devices
@of_recipes
@pytest.mark.parametrize("shape", [(2, 3, 13), (1, 1, 429)], ids=str)
def test_odd_reductions_and_single_results_will_do(recipe, shape, device):
    xs, weights, grads = drawn([shape], device=device, dtype=torch.bfloat16)
    (y,) = small.many_linear(xs, weights, recipe)
    y.backward(grads[0])
    assert_modelled(y, recipe, xs[0], weights[0], "fprop")
    assert_modelled(xs[0].grad, recipe, grads[0], weights[0].t(), "dgrad")
    assert_modelled(weights[0].grad, recipe, grads[0].t(), xs[0].t(), "wgrad")


@on_devices
@of_recipes
def test_a_long_odd_reduction_will_do_beside_a_short_one(recipe, device):
    xs, weights, _ = drawn([(2, 3, 10413), (2, 3, 13)], device=device)
    for x, weight, y in zip(xs, weights, small.many_linear(xs, weights, recipe), strict=True):
        assert_modelled(y, recipe, x, weight, "fprop")


@pytest.fixture
def launches(monkeypatch):
    """Count kernel launches."""
    made = []
    wrap = small.wrap_triton
    monkeypatch.setattr(small, "wrap_triton", lambda kernel: made.append(kernel) or wrap(kernel))
    return made


@on_devices
@of_recipes
def test_thirty_products_of_different_sizes_take_one_launch_per_pass(recipe, device, launches):
    shapes = [(1 + 7 * i % 11, 1 + 5 * i % 13, 8 + 3 * i) for i in range(30)]
    xs, weights, grads = drawn(shapes, device=device)
    results = small.many_linear(xs, weights, recipe)
    assert len(launches) == 1
    torch.autograd.backward(results, grads)
    assert len(launches) == 3
    define = getattr(emulated, recipe)
    tolerance = {"rtol": 1e-5, "atol": 1e-4 if device == "cpu" else 2.0**-12 * 200}
    for x, weight, grad, y in zip(xs, weights, grads, results, strict=True):
        wanted = (
            define(x, weight, product="fprop", out_dtype=y.dtype),
            define(grad, weight.t(), product="dgrad", out_dtype=y.dtype),
            define(grad.t(), x.t(), product="wgrad", out_dtype=y.dtype),
        )
        torch.testing.assert_close((y, x.grad, weight.grad), wanted, **tolerance)


@on_devices
@of_recipes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_and_scales_are_those_of_the_definition_bit_for_bit(recipe, dtype, device):
    """A unit matrix lets single codes through: its own are 448, whatever else is added is zero."""
    generator = torch.Generator().manual_seed(0)
    x = heavy_tailed(generator, (20, 150)).clamp(-6e4, 6e4).to(device, dtype)
    x[3] = torch.randn(150, generator=generator).to(device) * (1e-39 if dtype == torch.float32 else 1e-7)
    (y,) = small.many_linear([x.float()], [torch.eye(150, device=device)], recipe)
    codes, scale = quantize(x, RECIPES[recipe].operand("input"))
    _, unit = quantize(torch.eye(150, device=device), RECIPES[recipe].operand("weight"))
    along = torch.repeat_interleave(scale, 128, 1)[:, :150] if recipe == "blockwise" else scale
    assert torch.equal(y, codes.float() * 448 * (along * unit[0, 0]))


@on_devices
@of_recipes
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_results_are_rounded_once_to_16_bits(recipe, dtype, device):
    xs, weights, _ = drawn(SHAPES[1:4], device=device, dtype=dtype)
    exact = small.many_linear([x.float() for x in xs], [weight.float() for weight in weights], recipe)
    for got, wanted in zip(small.many_linear(xs, weights, recipe), exact, strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, wanted.to(dtype))


# --- operands that are shared, strided or not asked for ---


@on_devices
@of_recipes
def test_a_shared_input_is_read_where_it_lies_and_gets_all_its_gradients(recipe, device, monkeypatch):
    (x,), _, _ = drawn([(9, 1, 40)], device=device)
    _, weights, grads = drawn([(9, n, 40) for n in (24, 3, 17)], device=device)
    packed = []
    pack = small._packed
    monkeypatch.setattr(small, "_packed", lambda tensors: packed.append(pack(tensors)) or packed[-1])
    results = small.many_linear([x] * 3, weights, recipe)
    assert packed[0].buffer.data_ptr() == x.data_ptr()
    torch.autograd.backward(results, grads)
    define = getattr(emulated, recipe)
    each = [
        define(grad, weight.t(), product="dgrad", out_dtype=x.dtype)
        for grad, weight in zip(grads, weights, strict=True)
    ]
    torch.testing.assert_close(x.grad, sum(each), rtol=1e-5, atol=1e-4 if device == "cpu" else 2e-2)


@on_devices
@of_recipes
def test_what_is_used_several_times_is_copied_once(recipe, device):
    (x, other), (weight, third), _ = drawn([(9, 8, 40), (5, 8, 40)], device=device)
    results = small.many_linear([x, other, x], [weight, weight, third], recipe)
    assert small._packed(small._unique([x, other, x]).tensors).buffer.numel() == x.numel() + other.numel()
    for y, (a, b) in zip(results, ((x, weight), (other, weight), (x, third)), strict=True):
        assert_modelled(y, recipe, a, b, "fprop")


@on_devices
@of_recipes
def test_any_strides_give_the_same_bits(recipe, device):
    xs, weights, grads = drawn([(9, 24, 40), (5, 3, 40)], device=device)

    def run(view):
        leaves = [[one.detach().clone().requires_grad_() for one in side] for side in (xs, weights)]
        results = small.many_linear(*([view(one) for one in side] for side in leaves), recipe)
        torch.autograd.backward(results, [view(grad) for grad in grads])
        return [*results, *(leaf.grad for side in leaves for leaf in side)]

    plain = run(lambda one: one)
    for view in (lambda one: one.t().contiguous().t(), lambda one: torch.stack([one, one], -1)[..., 0]):
        for got, wanted in zip(run(view), plain, strict=True):
            assert torch.equal(got, wanted)


@on_devices
@of_recipes
def test_one_strided_operand_gives_the_same_bits(recipe, device):
    (x,), (weight,), _ = drawn([(9, 24, 40)], device=device)
    (wanted,) = small.many_linear([x], [weight], recipe)
    for view in (lambda one: one.t().contiguous().t(), lambda one: torch.stack([one, one], -1)[..., 0]):
        (got,) = small.many_linear([view(x)], [view(weight)], recipe)
        assert torch.equal(got, wanted)


@on_devices
def test_only_the_gradients_that_are_asked_for_are_computed(device, launches):
    xs, weights, _ = drawn([(9, 8, 16), (5, 8, 13)], device=device)
    fixed = xs[0].detach()
    sum(y.sum() for y in small.many_linear([fixed, xs[1]], [w.detach() for w in weights], "rowwise")).backward()
    assert len(launches) == 2  # no wgrad
    assert xs[1].grad is not None
    small.many_linear([fixed], [weights[0].detach()], "rowwise")
    assert len(launches) == 3


@on_devices
def test_changing_one_result_in_place_leaves_the_others_alone(device):
    xs, weights, grads = drawn([(9, 8, 16), (5, 8, 13)], device=device)
    first, second = small.many_linear(xs, weights, "rowwise")
    torch.autograd.backward([second**2, first.relu_()], grads[::-1])  # the square needs `second` for its gradient
    alone = small.many_linear(xs[:1], weights[:1], "rowwise")[0].relu()
    (wanted,) = torch.autograd.grad(alone, xs[:1], grads[:1])
    assert torch.equal(xs[0].grad, wanted)


@needs_interpreter
def test_a_second_derivative_is_refused():
    xs, weights, _ = drawn([(3, 4, 5)])
    (y,) = small.many_linear(xs, weights, "rowwise")
    (grad,) = torch.autograd.grad(y, xs, torch.ones_like(y).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# --- nothing, bad values, bad arguments ---


@on_devices
@of_recipes
def test_products_of_nothing_are_zeros_beside_others(recipe, device):
    xs, weights, grads = drawn([(0, 4, 5), (4, 0, 5), (4, 3, 0), (4, 3, 5)], device=device)
    results = small.many_linear(xs, weights, recipe)
    torch.autograd.backward(results, grads)
    assert [tuple(y.shape) for y in results] == [(0, 4), (4, 0), (4, 3), (4, 3)]
    assert not results[2].any()
    assert not weights[0].grad.any()
    assert not xs[1].grad.any()
    assert_modelled(results[3], recipe, xs[3], weights[3], "fprop")
    assert_modelled(weights[3].grad, recipe, grads[3].t(), xs[3].t(), "wgrad")


@on_devices
@of_recipes
def test_no_products_at_all_are_legal(recipe, device):
    assert small.many_linear([], [], recipe) == []
    (y,) = small.many_linear([torch.zeros(0, 4, device=device)], [torch.zeros(3, 4, device=device)], recipe)
    assert y.shape == (0, 3)


@on_devices
@of_recipes
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_bad_values_stay_in_their_rows(recipe, bad, device):
    xs, weights, grads = drawn([(9, 24, 200), (5, 3, 40)], device=device)
    clean = small.many_linear(xs, weights, recipe)
    spoilt = xs[0].detach().clone()
    spoilt[3, 150] = bad
    results = small.many_linear([spoilt, xs[1]], weights, recipe)
    torch.autograd.backward(results, grads)
    others = torch.arange(9, device=device) != 3
    assert results[0][3].isnan().all()
    assert torch.equal(results[0][others], clean[0][others])
    assert torch.equal(results[1], clean[1])
    nan = weights[0].grad.isnan()
    assert nan[:, 150].all()
    assert nan.sum() == 24


@pytest.mark.parametrize(
    ("xs", "weights", "said"),
    [
        ([torch.zeros(2, 3)], [], "as many"),
        ([torch.zeros(2, 3)], [torch.zeros(4, 5)], "transpose"),
        ([torch.zeros(2, 2, 3)], [torch.zeros(4, 3)], "reshape"),
        ([torch.zeros(2, 3)], [torch.zeros(4, 3, dtype=torch.bfloat16)], "cast"),
        ([torch.zeros(2, 3), torch.zeros(2, 3).half()], [torch.zeros(4, 3), torch.zeros(4, 3).half()], "one dtype"),
        ([torch.zeros(2, 3).double()], [torch.zeros(4, 3).double()], "float64"),
        ([torch.zeros(2, 3)], [torch.zeros(4, 3, device="meta")], "meta"),
    ],
)
def test_operands_that_do_not_fit_are_refused_in_words(xs, weights, said):
    with pytest.raises(KernelError, match=said):
        small.many_linear(xs, weights, "rowwise")


def test_a_recipe_for_other_products_is_refused():
    with pytest.raises(ArgumentError, match="rowwise, blockwise, not 'mxfp8'"):
        small.many_linear([torch.zeros(2, 3)], [torch.zeros(4, 3)], "mxfp8")


# --- traced, compiled and launched ---


@on_devices
@of_recipes
def test_one_graph_serves_all_batches(recipe, device):
    def step(x, other, weights):
        results = small.many_linear([x, x, other], weights, recipe)
        return [y.relu_() for y in results]

    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=graphs, dynamic=True)
    for m in (6, 10):
        (x, other), _, _ = drawn([(m, 1, 24), (m + 13, 1, 11)], device=device)
        _, weights, _ = drawn([(1, 16, 24), (1, 3, 24), (1, 4, 11)], device=device)
        found = []
        for run in (step, compiled):
            leaves = [one.detach().clone().requires_grad_() for one in (x, other, *weights)]
            results = run(leaves[0], leaves[1], leaves[2:])
            torch.autograd.backward(results, [torch.ones_like(y) for y in results])
            found.append([*results, *(leaf.grad for leaf in leaves)])
        for eager, traced in zip(*found, strict=True):
            torch.testing.assert_close(traced, eager)
    assert graphs.frame_count == 1


def test_a_table_that_varies_is_right_for_other_batches():
    def table(x, other):
        m, other_m = x.shape[0], other.shape[0]
        return small._on_device((3, m, 24 * m, 7 * m + 24 * other_m, m * other_m, 1), torch.device("cpu"))

    graph = make_fx(table, tracing_mode="symbolic")(torch.zeros(40), torch.zeros(5))
    for m, other_m in ((40, 5), (9, 11)):
        found = graph(torch.zeros(m), torch.zeros(other_m))
        assert found.tolist() == [3, m, 24 * m, 7 * m + 24 * other_m, m * other_m, 1]
        assert found.dtype == torch.int64


@pytest.mark.parametrize(
    ("sizes", "group", "tile"),
    [
        ([(1, 256), (16, 64)], 1, (16, 128)),
        ([(2048, 1), (64, 16)], 1, (128, 16)),
        ([(2048, 1), (64, 16)], 128, (128, 128)),  # whole groups of rows of a weight
        ([(512, 256), (64, 16)], 1, (64, 64)),
        ([(512, 256), (64, 16)], 128, (64, 128)),
        ([(2048, 256), (64, 16)], 1, (128, 128)),
    ],
)
def test_tiles_suit_the_largest_product_and_hold_whole_groups(sizes, group, tile):
    rows = [small.Row(1, m, n, 64, 0, 0, 0, 64, 1, 64, 1) for m, n in sizes]
    key = small._key(rows, "bfloat16", ("k", "k"), group > 1, group)
    launch = TUNABLES["small"].untuned(key, 1)
    assert (launch.block_m, launch.block_n) == tile


def test_alignment_is_claimed_where_every_product_has_it():
    aligned = small.Row(1, 13, 32, 48, 0, 0, 16, 48, 1, 48, 1)
    fields = dict(zip(small.Row._fields, range(13), strict=True))
    claims = {name: bool(small._aligned([aligned]) >> at & 1) for name, at in fields.items()}
    assert [name for name, claimed in claims.items() if not claimed] == ["products", "m", "stride_ak", "stride_bk"]
    assert not small._aligned([aligned, aligned._replace(k=47)]) >> fields["k"] & 1


def test_it_compiles_for_each_architecture_and_is_traced(tmp_path):
    found = compiled_elsewhere(tmp_path, "compiled_small")
    assert {capability for _, _, _, capability, _, _ in found["rows"]} == {89, 90, 100}
    for _, blockwise, block_m, capability, shared, counts in found["rows"]:
        assert shared <= SHARED_KIB[capability] * 1024
        assert counts["mma.sync" if block_m == 16 else TENSOR_CORES[capability]] > 0
        # 16 bytes at a time, as the table says that it can be.
        assert counts["st.global.v4"] > 0
        assert counts["ld.global.v4"] + counts["cp.async.cg.shared.global"] > 0
        if not blockwise and capability == 90:
            # 128 x 128 sums over 256 threads, promoted to fp32 every 128 elements of k.
            assert counts["add.f32"] + counts["add.rn.f32"] == 64
    # One kernel forward, two backward, and Inductor sees that they write to nothing but their results.
    assert found["traced"] == [[1, 2], [1, 2]]
    assert found["cloned"] == ["out_ptr"]
    assert "TRITON_INTERPRET=1" in found["refused"]
