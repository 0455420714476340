"""A norm in front of our Triton quantise kernels, against the plain norm and the definition of the cast.

The mean square is added up in another order than torch's, so a normalised value may be a few numbers off, and its code
the neighbouring one where a tie between two lies that near: such codes are told from wrong ones.
"""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from loka.errors import KernelError
from loka.formats import FORMATS, RECIPES
from loka.kernel_registry.norm_act import block_norm
from loka.kernel_registry.triton import launches
from loka.kernel_registry.triton.launch import MAX_TILE
from loka.quantize import cast, quantize
from tests.kernel_registry.made_devices import triton_devices

pytest.importorskip("triton")
kernels = pytest.importorskip("loka.kernel_registry.triton.quantize")

# numpy, which the interpreter computes with, warns of the NaN and Inf that some tests put in.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning:triton")
on_devices = pytest.mark.parametrize("device", triton_devices())
SPECS = {
    "tensorwise": RECIPES["tensorwise"].operand("input"),
    "rowwise": RECIPES["rowwise"].operand("input"),
    "blockwise": RECIPES["blockwise"].operand("input"),
    "blockwise_weight": RECIPES["blockwise"].operand("weight"),
    "mxfp8": RECIPES["mxfp8"].operand("input"),
}
of_specs = pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
ACTIVATIONS = {
    "none": lambda x: x,
    "relu": torch.relu,
    "hardswish": lambda x: x * (x + 3).clamp(0, 6) * (1 / 6),
}
# How many numbers a normalised value may be off: most of it is half of what the order of a sum of 256 squares changes
# (the interpreter adds along rows one by one), the rest the rounding of quotient, root, reciprocal and product.
ULPS = 5


def correlated(m, k):
    """Rows of unequal loudness, with a block of the features louder than the others: without a norm, other codes."""
    x = torch.randn(m, k) * torch.exp(2 * torch.randn(m, 1))
    x[:, k // 2 :] *= 30
    return x


def exact_norm(x, block, eps=None):
    """The plain norm in float64, rounded once."""
    features = x.shape[-1]
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    parts = [x[:, at : min(at + block, features)].double() for at in range(0, features, block)]
    return torch.cat([part / (part.square().mean(1, keepdim=True) + eps).sqrt() for part in parts], 1).float()


def moved(x, ulps):
    """The number so many numbers further from zero."""
    towards = torch.copysign(torch.full_like(x, float("inf")), x) if ulps > 0 else torch.zeros_like(x)
    for _ in range(abs(ulps)):
        x = torch.nextafter(x, towards)
    return x


def spread(scale, spec, shape):
    """One scale per element."""
    rows, depth = (group or extent for group, extent in zip((spec.group_rows, spec.group_k), shape, strict=True))
    return scale.repeat_interleave(rows, 0).repeat_interleave(depth, 1)[: shape[0], : shape[1]]


def order(codes):
    """Integers that order as the values of the codes do; steps between neighbours are 1, and both zeros are one."""
    bits = codes.cpu().view(torch.uint8).int()
    return torch.where(bits >= 128, 128 - bits, bits)


def assert_quantised(got, normal, activation, spec):
    """Compare codes and scales with those of fp32 values that may be `ULPS` numbers off before the activation."""
    data, scale = (x.cpu() for x in got)
    variants = [ACTIVATIONS[activation](moved(normal, ulps)) for ulps in range(-ULPS, ULPS + 1)]
    scales = torch.stack([quantize(values, spec)[1] for values in variants])
    assert scale.shape == scales.shape[1:]
    assert (scale >= scales.amin(0)).all()
    assert (scale <= scales.amax(0)).all()
    inverse = spread(scale, spec, normal.shape).reciprocal()
    allowed = torch.stack([order(cast(values * inverse, spec.format)) for values in variants])
    low, high, found = allowed.amin(0), allowed.amax(0), order(data)
    assert (high - low).amax() <= 1  # a rule that allows more than a neighbour would test nothing
    assert ((found >= low) & (found <= high)).all()
    assert (low == high).float().mean() > 0.95


@on_devices
@pytest.mark.parametrize("activation", ACTIVATIONS)
@of_specs
def test_codes_are_those_of_the_normalised_values(spec, activation, device):
    x = correlated(20, 600)  # two blocks of 256, and one of 88
    got = kernels.quantize_both(x.to(device), spec, activation=activation, norm_block=256)
    normal = exact_norm(x, 256)
    assert_quantised(got[:2], normal, activation, spec)
    assert_quantised(got[2:], normal.t(), activation, spec)


@on_devices
@pytest.mark.parametrize("shape", [(1, 1), (3, 13), (5, 256), (130, 257)], ids=str)
@of_specs
def test_any_extent_will_do(spec, shape, device):
    x = correlated(*shape)
    normal = exact_norm(x, 256)
    x = x.to(device)
    assert_quantised(kernels.quantize(x, spec, norm_block=256), normal, "none", spec)
    assert_quantised(kernels.quantize(x, spec, transposed=True, norm_block=256), normal.t(), "none", spec)
    strided = x.t().contiguous().t()
    assert_quantised(kernels.quantize(strided, spec, norm_block=256), normal, "none", spec)
    assert_quantised(kernels.quantize(strided, spec, transposed=True, norm_block=256), normal.t(), "none", spec)


@on_devices
@pytest.mark.parametrize("block", [1, 2, 32, 128])
@of_specs
def test_blocks_are_powers_of_two(spec, block, device):
    x = correlated(9, 150)
    got = kernels.quantize_both(x.to(device), spec, norm_block=block)
    assert_quantised(got[:2], exact_norm(x, block), "none", spec)
    assert_quantised(got[2:], exact_norm(x, block).t(), "none", spec)


@on_devices
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("spec", [SPECS["tensorwise"], SPECS["rowwise"]], ids=["tensorwise", "rowwise"])
def test_two_passes_give_what_one_gives(spec, activation, device, monkeypatch):
    x = correlated(20, 600)
    normal = exact_norm(x, 256)
    x = x.to(device)
    monkeypatch.setattr(launches, "sides_of", lambda *_: None)
    assert kernels.chosen(x, True, (spec.group_rows, spec.group_k), (1, 256))[1] is None
    options = {"activation": activation, "norm_block": 256}
    got = kernels.quantize_both(x, spec, **options)
    assert_quantised(got[:2], normal, activation, spec)
    assert_quantised(got[2:], normal.t(), activation, spec)
    assert_quantised(kernels.quantize(x, spec, transposed=True, **options), normal.t(), activation, spec)


@on_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_operands_of_16_bits_are_normalised_in_fp32(dtype, device):
    x = torch.randn(9, 300).to(dtype)
    got = kernels.quantize(x.to(device), SPECS["rowwise"], norm_block=256)
    assert_quantised(got, exact_norm(x.float(), 256), "none", SPECS["rowwise"])


@on_devices
def test_the_formula_is_that_of_the_mod_with_its_eps(device):
    x = 1e-3 * torch.randn(9, 300)
    for eps in (None, 1e-5, 0.5):
        normal = exact_norm(x, 256, eps)
        torch.testing.assert_close(normal, block_norm(x, 256, eps), rtol=1e-6, atol=0)
        got = kernels.quantize(x.to(device), SPECS["blockwise"], norm_block=256, norm_eps=eps)
        assert_quantised(got, normal, "none", SPECS["blockwise"])


@on_devices
@of_specs
def test_zeros_stay_zeros_and_change_no_scale(spec, device):
    x = torch.zeros(9, 300).to(device)
    data, scale, data_t, scale_t = kernels.quantize_both(x, spec, norm_block=256)
    assert not data.float().any()
    assert not data_t.float().any()
    assert torch.equal(scale, torch.ones_like(scale))
    assert torch.equal(scale_t, torch.ones_like(scale_t))


@on_devices
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_a_bad_value_spoils_its_block_of_one_row(bad, device):
    x = torch.randn(9, 300).to(device)
    spec = SPECS["blockwise"]
    clean, _ = kernels.quantize(x, spec, norm_block=256)
    x[3, 7] = bad
    data, scale = kernels.quantize(x, spec, norm_block=256)
    values, plain = data.float(), block_norm(x.float(), 256)
    assert torch.equal(values.isnan(), plain.isnan())
    assert scale.isfinite().all()
    assert torch.equal(values[3, 256:], clean.float()[3, 256:])
    others = torch.arange(9, device=device) != 3
    assert torch.equal(values[others], clean.float()[others])


@on_devices
def test_no_norm_leaves_every_bit_as_it_was(device):
    x = torch.randn(9, 300).to(device)
    for one, other in zip(
        kernels.quantize_both(x, SPECS["rowwise"], norm_block=0),
        kernels.quantize_both(x, SPECS["rowwise"]),
        strict=True,
    ):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"norm_block": 48}, "not 48"),
        ({"norm_block": 512}, "up to 256"),
        ({"norm_block": -2}, "not -2"),
        ({"norm_block": 256, "norm_eps": -1.0}, "eps of 0 or more"),
        ({"norm_block": 256, "norm_eps": float("nan")}, "nan"),
    ],
)
def test_norms_that_they_do_not_serve_are_refused_in_words(options, said):
    for function in (kernels.quantize, kernels.quantize_both):
        with pytest.raises(KernelError, match=said):
            function(torch.zeros(2, 3), SPECS["rowwise"], **options)


@pytest.mark.parametrize("norm", [(1, 256), (256, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("both", [False, True])
@of_specs
def test_every_tile_holds_whole_groups_and_whole_blocks(spec, both, norm):
    for shape in ((64, 256), (4096, 10413), (3, 70000), (70000, 3)):
        for x in (torch.empty(shape, device="meta"), torch.empty(shape[::-1], device="meta").t()):
            launch, sides = kernels.chosen(x, both, (spec.group_rows, spec.group_k), norm)
            assert launch.block_m % norm[0] == 0
            assert launch.block_n % norm[1] == 0
            assert launch.block_m * launch.block_n <= (2 * MAX_TILE if spec.group_k else MAX_TILE)
            if sides is not None:
                assert launch.block_m % sides[0] == launch.block_m % sides[2] == 0
                assert launch.block_n % sides[1] == launch.block_n % sides[3] == 0
            else:
                assert spec.group_k is None


@on_devices
@of_specs
def test_the_ops_pass_torchs_own_checks_and_are_traced_once_for_all_batches(spec, device):
    arguments = spec.format.name, spec.group_rows, spec.group_k, spec.scale_rule, "hardswish", 1, 32, 1e-5
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for op in (torch.ops.loka.quantize.default, torch.ops.loka.quantize_both.default):
        torch.library.opcheck(op, (torch.randn(9, 70, device=device), *arguments), test_utils=checks)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True, dynamic=True)
    def run(x):
        return kernels.quantize(x, spec, norm_block=32, transposed=True)

    for m in (3, 9):
        x = correlated(m, 70)
        assert_quantised(run(x.to(device)), exact_norm(x, 32).t(), "none", spec)
    assert len(graphs) == 1


def test_fake_operands_give_the_shapes_of_real_ones():
    with FakeTensorMode():
        x = torch.empty((9, 300), device="cuda", dtype=torch.bfloat16)
        data, scale = kernels.quantize(x, SPECS["blockwise"], transposed=True, norm_block=256)
    assert (data.shape, data.dtype, scale.shape) == ((300, 9), FORMATS["e4m3"].dtype, (300, 1))
