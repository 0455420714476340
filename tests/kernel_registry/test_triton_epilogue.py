"""The fused epilogue against float64 and the unfused modules; interpreted on a CPU, as compiled code on a GPU."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from loka.errors import KernelError
from loka.formats import RECIPES
from loka.mods.block_norm import BlockRMSNorm, block_norm
from loka.quantize import dequantize, quantize
from tests.kernel_registry.made_devices import SHARED_KIB, TENSOR_CORES, needs_interpreter, triton_devices
from tests.kernel_registry.made_gemm import heavy_tailed, normal, with_zero_rows
from tests.kernel_registry.made_triton import coded, compiled_elsewhere, model, product_bound

pytest.importorskip("triton")
gemm = pytest.importorskip("loka.kernel_registry.triton.gemm")
epilogue = pytest.importorskip("loka.kernel_registry.triton.epilogue")

# numpy, which the interpreter computes with, warns of the NaN and Inf that some tests put in.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning:triton")
EPS = torch.finfo(torch.float32).eps
on_devices = pytest.mark.parametrize("device", triton_devices())
of_draws = pytest.mark.parametrize("draw", [normal, heavy_tailed, with_zero_rows])
of_recipes = pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise"])
of_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
# (m, n, k): one block; ragged last block; one short block; one row; one feature; many rows and several blocks.
SHAPES = [(9, 256, 64), (17, 300, 13), (5, 100, 429), (1, 513, 130), (3, 1, 8), (70, 640, 20)]
of_shapes = pytest.mark.parametrize("shape", SHAPES, ids=["x".join(map(str, shape)) for shape in SHAPES])


def made(draw, shape, device="cpu"):
    """x [m, k], weight [n, k], bias [n] and grad_out [m, n]."""
    m, n, k = shape
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(n, generator=generator)
    return tuple(
        t.to(device) for t in (draw(generator, (m, k)), draw(generator, (n, k)), bias, draw(generator, (m, n)))
    )


def composition(y, eps=EPS):
    return F.hardswish(block_norm(y, 256, eps))


def close(got, a, b, bias, eps=EPS):
    """Compare with the composition in float64, within what fp32 sums in any order may move it."""
    a, b = (np.asarray(t, dtype=np.float64) for t in (a, b))
    y = torch.from_numpy(a @ b.T)
    bound = product_bound(a, b, a.shape[1], got.to(torch.float32))
    if bias is not None:
        y = y + bias.detach().cpu().double()
        bound = bound + 2.0**-23 * y.abs().numpy()
    wanted, bound = composition(y, eps), torch.from_numpy(bound)
    largest = torch.cat([p.amax(1, keepdim=True).expand_as(p) for p in bound.split(256, 1)], 1)
    rms = torch.cat([p.square().mean(1, keepdim=True).add(eps).sqrt().expand_as(p) for p in y.split(256, 1)], 1)
    slack = 1.5 * (1 + block_norm(y, 256, eps).abs()) * largest / rms  # 1.5 is the largest slope of HardSwish
    slack = slack + torch.finfo(got.dtype).eps * wanted.abs() + 1e-5
    error = (got.detach().cpu().double() - wanted).abs()
    assert got.shape == wanted.shape
    assert (error <= slack).all(), (error - slack).max()


# --- forward ---


@on_devices
@of_dtypes
@of_draws
@of_shapes
def test_high_precision_operands_give_the_composition(device, dtype, draw, shape):
    x, weight, bias, _ = (t.clamp(-6e4, 6e4).to(dtype) for t in made(draw, shape, device))  # fp16 ends at 65504
    out = epilogue.linear_norm_swish(x, weight, bias)
    assert out.dtype == dtype
    close(out, x.double().cpu(), weight.double().cpu(), bias)


@on_devices
@of_recipes
@of_draws
@of_shapes
def test_codes_give_the_composition_of_what_they_stand_for(device, recipe, draw, shape):
    x, weight, bias, _ = made(draw, shape, device)
    codes, weight_codes, *scales = coded(recipe, x, weight)
    out, scale, saved = epilogue.gemm_norm_swish(codes, weight_codes, bias, *scales, out="float32")
    assert (scale.shape, saved.shape) == ((shape[0], 0), (0,))
    close(out, model(x, recipe, "input"), model(weight, recipe, "weight"), bias)


@on_devices
@pytest.mark.parametrize("scaling", ["rowwise", "blockwise"])
@of_draws
@of_shapes
def test_codes_for_the_next_product_are_those_of_the_definition(device, scaling, draw, shape):
    x, weight, bias, _ = made(draw, shape, device)
    plain = epilogue.gemm_norm_swish(x, weight, bias, out="float32")[0]
    codes, scale, _ = epilogue.gemm_norm_swish(x, weight, bias, out=scaling)
    wanted, wanted_scale = quantize(plain, RECIPES[scaling].operand("input"))
    torch.testing.assert_close(scale, wanted_scale, rtol=1e-6 if device == "cuda" else 0, atol=0)
    differing = (codes.float() != wanted.float()).sum()  # compiled twice, sums may differ in their last bit
    assert differing <= (1e-3 * codes.numel() if device == "cuda" else 0)


@on_devices
@of_dtypes
def test_it_is_what_the_unfused_modules_compute(device, dtype):
    modules = nn.Sequential(nn.Linear(40, 300), BlockRMSNorm(300), nn.Hardswish()).to(device, dtype)
    x = torch.randn(2, 7, 40, device=device, dtype=dtype)
    out = epilogue.linear_norm_swish(x, modules[0].weight, modules[0].bias)
    # The modules round y and n on the way, each to half an eps of values up to 16.
    tolerance = 4 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    torch.testing.assert_close(out, modules(x), rtol=2 * tolerance, atol=tolerance)


@on_devices
@pytest.mark.parametrize("eps", [None, 0.5])
def test_eps_is_that_of_the_norm(device, eps):
    x, weight, _, _ = made(normal, (4, 300, 8), device)
    small = 1e-3 * x
    unfused = nn.Sequential(BlockRMSNorm(300, eps=eps), nn.Hardswish())(small @ weight.t())
    torch.testing.assert_close(epilogue.linear_norm_swish(small, weight, eps=eps), unfused, rtol=1e-4, atol=1e-5)


@on_devices
@pytest.mark.parametrize("out", ["float32", "rowwise", "blockwise"])
def test_bad_values_stay_in_their_row(device, out):
    x, weight, bias, _ = made(normal, (12, 300, 20), device)
    clean, clean_scale, _ = epilogue.gemm_norm_swish(x, weight, bias, out=out)
    x[3, 1], x[7, 2], x[9, 0] = float("nan"), float("inf"), -float("inf")
    got, scale, _ = epilogue.gemm_norm_swish(x, weight, bias, out=out)
    bad = torch.zeros(12, dtype=torch.bool, device=device)
    bad[[3, 7, 9]] = True
    assert got[bad].float().isnan().all()
    assert torch.equal(got[~bad].float(), clean[~bad].float())
    assert torch.equal(scale[~bad], clean_scale[~bad])
    assert (scale[bad] == 1).all()  # scales are taken over finite values, of which there are none


@on_devices
@pytest.mark.parametrize("out", ["bfloat16", "rowwise", "blockwise"])
def test_zeros_give_zeros_and_scale_one(device, out):
    x, weight = torch.zeros(5, 16, device=device), torch.ones(300, 16, device=device)
    got, scale, _ = epilogue.gemm_norm_swish(x, weight, out=out)
    assert not got.float().any()
    assert (scale == 1).all()


@on_devices
@pytest.mark.parametrize("shape", [(0, 300, 8), (4, 0, 8), (4, 300, 0)])
def test_empty_operands_give_empty_or_the_biases(device, shape):
    x, weight, bias, _ = made(normal, shape, device)
    x.requires_grad_()
    out = epilogue.linear_norm_swish(x, weight, bias)
    out.sum().backward()
    assert x.grad.shape == x.shape
    torch.testing.assert_close(out, composition(bias.expand(shape[0], -1)) if shape[1] else out)


@on_devices
def test_any_strides_give_the_same_bits(device):
    x, weight, bias, grad = made(normal, (9, 300, 40), device)
    plain, _, saved = epilogue.gemm_norm_swish(x, weight, bias[:1].expand(300).contiguous(), out="float32", save=True)
    strided = epilogue.gemm_norm_swish(
        x.t().contiguous().t(), weight.t().contiguous().t(), bias[:1].expand(300), out="float32"
    )[0]
    assert torch.equal(plain, strided)
    backward = [
        epilogue.norm_swish_backward(g, saved, None, torch.float32, True)
        for g in (grad[:1].expand(9, -1), grad[:1].expand(9, -1).contiguous())
    ]
    assert all(torch.equal(a, b) for a, b in zip(*backward, strict=True))


# --- backward ---


def reference(leaves, grad, eps=EPS):
    """The composition and its gradients in float64."""
    doubles = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    out = composition(F.linear(*doubles), eps)
    out.backward(grad.cpu().double())
    return out.detach(), [leaf.grad for leaf in doubles]


def relative(got, wanted):
    return float((got.detach().cpu().double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


@on_devices
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("draw", [normal, heavy_tailed])
@pytest.mark.parametrize(
    "shape", [shape for shape in SHAPES if shape[1] > 1], ids=lambda shape: "x".join(map(str, shape))
)
def test_gradients_are_those_of_the_composition(device, biased, draw, shape):
    x, weight, bias, grad = made(draw, shape, device)
    leaves = [leaf.requires_grad_() for leaf in ((x, weight, bias) if biased else (x, weight))]
    epilogue.linear_norm_swish(*leaves).backward(grad)
    _, wanted = reference(leaves, grad)
    for leaf, gradient in zip(leaves, wanted, strict=True):
        assert relative(leaf.grad, gradient) < 1e-4, leaf.shape


@on_devices
def test_the_norm_of_one_feature_is_its_sign_and_has_no_gradient(device):
    leaves = [torch.ones(shape, device=device, requires_grad=True) for shape in ((3, 8), (1, 8), (1,))]
    out = epilogue.linear_norm_swish(*leaves)
    out.sum().backward()
    torch.testing.assert_close(out, torch.full_like(out, 4 / 6))
    assert all(leaf.grad.abs().max() < 1e-5 for leaf in leaves)


@on_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_16_bits_are_no_worse_than_those_of_the_unfused_modules(device, dtype):
    x, weight, bias, grad = (t.to(dtype) for t in made(normal, (40, 640, 64), device))
    errors = []
    for run in (epilogue.linear_norm_swish, lambda *operands: composition(F.linear(*operands))):
        leaves = [leaf.clone().requires_grad_() for leaf in (x, weight, bias)]
        run(*leaves).backward(grad)
        _, wanted = reference(leaves, grad)
        errors.append([relative(leaf.grad, gradient) for leaf, gradient in zip(leaves, wanted, strict=True)])
    for fused, unfused in zip(*errors, strict=True):
        assert fused <= 1.05 * unfused


@on_devices
@of_recipes
def test_codes_for_the_next_product_have_their_gradient_from_16_saved_bits(device, recipe):
    x, weight, bias, grad = made(normal, (20, 300, 64), device)
    codes, weight_codes, *scales = coded(recipe, x, weight)
    _, _, saved = epilogue.gemm_norm_swish(codes, weight_codes, bias, *scales, out="blockwise", save=True)
    assert saved.dtype == torch.bfloat16
    got, sums = epilogue.norm_swish_backward(grad, saved, None, torch.float32, True)
    y = saved.cpu().double().requires_grad_()
    composition(y).backward(grad.cpu().double())
    torch.testing.assert_close(got.cpu().double(), y.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sums.cpu().double(), y.grad.sum(0), rtol=1e-4, atol=1e-4)
    values = [dequantize(c, s, RECIPES[recipe].operand("input")) for c, s in ((codes, scales[0]),)]
    assert relative(saved, values[0].cpu().double() @ _values(recipe, weight).T + bias.cpu().double()) < 2.0**-8


def _values(recipe, weight):
    return torch.from_numpy(model(weight, recipe, "weight"))


@on_devices
def test_the_bias_of_codes_has_a_gradient(device):
    x, weight, bias, grad = made(normal, (20, 300, 64), device)
    codes, weight_codes, *scales = coded("rowwise", x, weight)
    bias.requires_grad_()
    out = epilogue.gemm_norm_swish(codes, weight_codes, bias, *scales, out="float32", save=True)[0]
    out.backward(grad)
    spec = RECIPES["rowwise"].operand("input")
    _, wanted = reference([dequantize(codes, scales[0], spec), dequantize(weight_codes, scales[1], spec), bias], grad)
    assert relative(bias.grad, wanted[2]) < 1e-4


@needs_interpreter
def test_a_gradient_without_what_was_saved_is_refused():
    x, weight, _, _ = made(normal, (4, 16, 8))
    out = epilogue.gemm_norm_swish(x.requires_grad_(), weight, out="float32")[0]
    with pytest.raises(KernelError, match="kept nothing for it"):
        out.sum().backward()


@needs_interpreter
def test_inference_keeps_nothing():
    x, weight, _, _ = made(normal, (4, 16, 8))
    weight.requires_grad_()
    with torch.no_grad():
        assert not epilogue.linear_norm_swish(x, weight).requires_grad
    assert epilogue.gemm_norm_swish(x, weight, out="float32")[2].numel() == 0


# --- misfits ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": "rowise"}, "'rowwise'"),
        ({"x": torch.zeros(4, 9)}, "reshape or move"),
        ({"x": torch.zeros(2, 4, 8)}, "reshape or move"),
        ({"bias": torch.zeros(15)}, "The bias of 16 features"),
        ({"x": torch.zeros(4, 8, dtype=torch.bfloat16)}, "cast or quantise both alike"),
        ({"x_scale": torch.ones(4, 1)}, "cast or quantise both alike"),
        ({"x_scale": torch.ones(4, 1), "weight_scale": torch.ones(16, 1)}, "quantise the operands"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change, message):
    given = {"x": torch.zeros(4, 8), "weight": torch.zeros(16, 8), "out": "float32"} | change
    with pytest.raises(KernelError, match=message):
        epilogue.gemm_norm_swish(**given)


def test_mx_scales_are_refused():
    operands = coded("mxfp8", torch.ones(4, 96), torch.ones(16, 96))
    with pytest.raises(KernelError, match="tensorwise, rowwise or blockwise"):
        epilogue.gemm_norm_swish(operands[0], operands[1], None, *operands[2:])


# --- compiled ---


@on_devices
def test_one_graph_serves_all_batches(device):
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(epilogue.linear_norm_swish, fullgraph=True, backend=graphs, dynamic=True)
    for m in (20, 7):
        x, weight, bias, grad = made(normal, (m, 300, 24), device)
        results = []
        for run in (epilogue.linear_norm_swish, compiled):
            leaves = [leaf.clone().requires_grad_() for leaf in (x, weight, bias)]
            out = run(*leaves)
            out.backward(grad)
            results.append([out, *(leaf.grad for leaf in leaves)])
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("out", ["float32", "rowwise", "blockwise"])
@needs_interpreter
def test_the_op_obeys_the_contract_of_custom_ops(out):
    x, weight, bias, _ = made(normal, (5, 300, 24))
    leaves = [leaf.requires_grad_(out == "float32") for leaf in (x, weight, bias)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(
        torch.ops.loka.gemm_norm_swish.default, (*leaves, None, None, out, None, True), test_utils=tests
    )


def test_it_compiles_for_each_architecture_and_is_traced(tmp_path):
    found = compiled_elsewhere(tmp_path, "compiled_fused", "epilogue")
    for name, capability, shared, counts in found["rows"]:
        assert shared <= SHARED_KIB[capability] * 1024
        if name in ("rowwise", "blockwise"):
            assert counts[TENSOR_CORES[capability]] > 0
        if name == "rowwise":
            # 64 x 256 sums over 256 threads, promoted to fp32 every 128 elements of k.
            assert counts["add.f32"] + counts["add.rn.f32"] >= 64
    # Inductor sees the kernels themselves, forward and backward, and that they write to nothing but their results.
    assert found["traced"] == [1, 1]
    assert "TRITON_INTERPRET=1" in found["refused"]
