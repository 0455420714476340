"""Launches of our kernels: which are legal, and that what is computed is the definition under every one of them."""

import math
from dataclasses import replace

import pytest
import torch

from loka.dispatch.measuring.draws import Source, draw_operands
from loka.dispatch.measuring.verify import Verification, allowed_share, compare, parts_of
from loka.errors import PlanError
from loka.formats import BLOCK, RECIPES
from loka.hardware import FP8_CAPABILITY, DeviceInfo, device_info, has_capability, shared_bytes
from loka.kernel_registry.builtin import KERNELS
from loka.kernel_registry.spec import GemmRequest
from loka.quantize import quantize
from tests.kernel_registry.made_devices import SHARED_KIB, triton_devices
from tests.kernel_registry.made_gemm import heavy_tailed

pytest.importorskip("triton")
launch = pytest.importorskip("loka.kernel_registry.triton.launch")
launches = pytest.importorskip("loka.kernel_registry.triton.launches")
tuned = pytest.importorskip("loka.kernel_registry.triton.tuned")
kernels = pytest.importorskip("loka.kernel_registry.triton.quantize")
CODES, Key, Launch, TUNABLES = launch.CODES, launch.Key, launch.Launch, launches.TUNABLES

on_devices = pytest.mark.parametrize("device", triton_devices())
SPECS = {spec.name: spec for spec in KERNELS}
ROWS = {
    "gemm": "gemm",
    "grouped": "grouped",
    "grouped_wgrad": "grouped",
    "epilogue": "linear_norm_act",
    "small": "small",
}
# A key per kernel and inner loop: ragged against every tile, more than one block of k.
PRODUCTS = [
    Key("gemm", "rowwise", "fprop", CODES, 37, 45, 300),
    Key("gemm", "blockwise", "fprop", CODES, 37, 45, 300),
    Key("gemm", "mxfp8", "fprop", CODES, 37, 45, 300),
    Key("grouped", "rowwise", "fprop", CODES, 37, 45, 140, 3),
    Key("grouped", "blockwise", "fprop", CODES, 37, 45, 140, 3),
    Key("grouped_wgrad", "rowwise", "wgrad", CODES, 37, 45, 140, 3),
    Key("grouped_wgrad", "blockwise", "wgrad", CODES, 37, 45, 140, 3),
    Key("epilogue", "rowwise", "fprop", CODES, 37, 300, 140),
    Key("epilogue", "blockwise", "fprop", CODES, 37, 300, 140),
    Key("small", "rowwise", "dgrad", "float32", 37, 45, 140, 2),
    Key("small", "blockwise", "fprop", "float32", 37, 45, 140, 2, launches.BLOCKS_OF_B),
    Key("small", "blockwise", "wgrad", "bfloat16", 37, 45, 140, 2),
]
GROUPS = [(None, None), (1, None), (1, 128), (128, 128), (1, 32)]
CASTS = [launches.quantize_key(groups, layout, "float32", 37, 300) for groups in GROUPS for layout in launches.QUANTIZE]
ALL = PRODUCTS + CASTS


def words(key):
    return "-".join(part for part in (key.kernel, key.recipe, key.product, key.variant) if part).replace(" ", "_")


def legal(key, kib=SHARED_KIB[90]):
    """Every legal launch that differs from the untuned one in what is varied together."""
    kernel = TUNABLES[key.kernel]
    untuned = kernel.untuned(key, 1)
    return [each for at in range(len(kernel.rounds)) for each in kernel.tried(key, untuned, at, 1024 * kib)]


def spread(found):
    """Three of them: the smallest tile, the largest, and one between. Warps and stages change no value."""
    order = sorted(found, key=lambda each: (each.block_m * each.block_n, each.block_m, each.splits, each.group_m))
    shapes = list({(each.block_m, each.block_n, each.splits, each.group_m): each for each in order}.values())
    order = shapes if len(shapes) > 2 else order
    return [order[0], order[len(order) // 2], order[-1]]


class Loud(Source):
    """Operands whose rows differ in loudness by orders of magnitude: a scale of the wrong row shows."""

    def draw(self, role, rows, features, generator):
        return heavy_tailed(torch.Generator().manual_seed(len(role)), (rows, features)).to(generator.device), False


@on_devices
@pytest.mark.parametrize("key", PRODUCTS, ids=words)
def test_a_product_is_the_defined_one_under_every_launch(key, device):
    op = SPECS[f"triton.{ROWS[key.kernel]}.{key.recipe}"].op
    sizes = {"m": key.m, "n": key.n, "k": key.k, "batch": key.batch}
    dtype = "float32" if key.dtype == CODES else key.dtype
    request = GemmRequest(site="", product=key.product, op=op, dtype=dtype, **sizes)
    drawn = draw_operands(request, getattr(torch, dtype), torch.device(device), Loud(tokens=uneven(key)))
    blank = Verification(
        kernel=key.kernel,
        recipe=key.recipe,
        request=request,
        values="loud",
        worst=math.nan,
        allowed=allowed_share(key.k, device_info(device)),
        row=-1,
        column=-1,
    )
    call = drawn.call(SPECS[f"triton.{ROWS[key.kernel]}.{key.recipe}"], key.product, torch.float32)
    parts = parts_of(request, drawn)
    found = spread(legal(key))
    assert len(found) >= 2
    for each in found:
        with tuned.forced(key.kernel, each) as state:
            got = call(0)
        assert state.keys == {launches.rounded(key)}
        compared = compare(blank, got.reshape(-1, key.n), parts)
        assert compared.holds, (str(each), compared.reason)


def uneven(key):
    """Tokens of each expert: most at one, none at another, some at none."""
    tokens = key.k if key.kernel == "grouped_wgrad" else key.m
    return (5, 0, tokens - 7) if key.kernel.startswith("grouped") else ()


@on_devices
@pytest.mark.parametrize("key", CASTS, ids=words)
def test_codes_and_scales_are_the_same_bits_under_every_launch(key, device):
    (rows, columns), layout = launches.groups_of(key)
    spec = replace(RECIPES[key.recipe].operand("input"), group_rows=rows, group_k=columns)
    x = heavy_tailed(torch.Generator().manual_seed(0), (key.m, key.k)).to(device)
    x = x.t().contiguous().t() if layout == "columns" else x
    wanted = [*quantize(x, spec), *(quantize(x.t(), spec) if layout == "both" else ())]
    found = spread(legal(key))
    assert len(found) >= 2
    for each in found:
        with tuned.forced("quantize", each) as state:
            got = (kernels.quantize_both if layout == "both" else kernels.quantize)(x, spec)
        assert state.keys == {launches.rounded(key)}
        for one, other in zip(got, wanted, strict=True):
            same = one.view(torch.uint8), other.contiguous().view(torch.uint8)
            assert torch.equal(*same), str(each)


def test_a_norm_in_front_of_a_cast_takes_no_measured_launch():
    x = heavy_tailed(torch.Generator().manual_seed(0), (8, 256))
    with tuned.forced("quantize", Launch(block_m=1, block_n=256, num_warps=1)) as state:
        kernels.chosen(x, False, (1, None), (1, 256))
    assert not state.keys


# --- legal ---


@pytest.mark.parametrize("capability", SHARED_KIB)
def test_every_untuned_launch_is_legal_on_every_device(capability):
    info = DeviceInfo(type="cuda", name="", capability=divmod(capability, 10))
    for key in ALL:
        for m, k in ((1, key.k), (40, 128), (300, 1000), (5000, 20000)):
            for n in (1, 16, 600):
                one = key._replace(m=m, k=k, n=n if key.n > 1 else 1)
                untuned = TUNABLES[key.kernel].untuned(one, 132)
                assert not TUNABLES[key.kernel].illegal(one, untuned, shared_bytes(info)), one


def test_less_shared_memory_leaves_fewer_launches():
    for key in PRODUCTS:
        key = key._replace(m=4096, n=4096, k=4096)
        little, much = (legal(key, SHARED_KIB[at]) for at in (89, 90))
        assert len(little) < len(much)
        assert all(TUNABLES[key.kernel].bytes(key, each) <= 99 * 1024 for each in little)


@pytest.mark.parametrize(
    ("key", "change", "said"),
    [
        (PRODUCTS[0], {"block_m": 24}, "power of two"),
        (PRODUCTS[0], {"block_n": 8}, "between 16 and 512"),
        (PRODUCTS[0], {"num_stages": 0}, "num_stages is from 1"),
        (PRODUCTS[0], {"num_stages": 16, "block_m": 128}, "bytes of shared memory"),
        (PRODUCTS[3], {"splits": 2}, "grouped has splits = 1"),
        (PRODUCTS[7], {"block_n": 128}, "epilogue has block_n = 256"),
        (PRODUCTS[10], {"block_n": 64}, "128 rows of b share a scale"),
        (CASTS[3], {"block_n": 256}, "cuts groups of 1 x 512"),
        (CASTS[-1], {"block_m": 16}, "cuts groups of 32 x 32"),
    ],
    ids=lambda value: words(value) if isinstance(value, tuple) else None,
)
def test_what_the_definition_or_the_device_forbids_is_refused_in_words(key, change, said):
    kernel = TUNABLES[key.kernel]
    wrong = replace(kernel.untuned(key, 1), **change)
    assert said in kernel.illegal(key, wrong, 1024 * SHARED_KIB[90])


@pytest.mark.parametrize(
    "change",
    [
        {"kernel": "nothing"},
        {"recipe": "nothing"},
        {"dtype": "float64"},
        {"variant": "nothing"},
        {"m": 0},
        {"m": 48},
    ],
    ids=str,
)
def test_a_launch_is_kept_for_no_key_that_calls_do_not_have(change):
    times = {"median_us": 1.0, "spread_us": 0.1, "default_us": 1.0}
    some = TUNABLES["gemm"].untuned(PRODUCTS[0], 1)
    fields = launches.rounded(PRODUCTS[0])._asdict()
    tuned.TunedLaunch(**fields, launch=some, **times)
    with pytest.raises(PlanError):
        tuned.TunedLaunch(**{**fields, **change}, launch=some, **times)


def test_a_device_that_is_not_listed_is_taken_for_the_least_of_all():
    known = {info: shared_bytes(DeviceInfo(type="cuda", name="", capability=info)) for info in ((8, 9), (9, 0))}
    assert known == {(8, 9): 99 * 1024, (9, 0): 227 * 1024}
    assert shared_bytes(DeviceInfo(type="cuda", name="", capability=(99, 0))) == 99 * 1024
    assert shared_bytes(DeviceInfo(type="cpu", name="")) == 99 * 1024
    assert not has_capability("cpu", FP8_CAPABILITY)


def test_a_step_along_k_is_one_block_of_scales():
    assert launches.TILE_K == BLOCK == RECIPES["blockwise"].operand("weight").group_k
