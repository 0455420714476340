"""What there is to tune for the shapes of a run: the keys of our kernels that they go through, and a call of each.

A key alone says what to draw, so a tuning that was stopped knows what is missing without looking at the run again.
Operands come as the kernel gets them: codes are made before, once, so that what is timed is the kernel itself.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Final

import torch
from torch import Tensor

from loka.dispatch.measuring.draws import TURNED, draw_operands
from loka.dispatch.measuring.shapes import Shape
from loka.formats import BLOCK, MX_GROUP, PASS_OPERANDS, RECIPES, Role
from loka.hardware import BLACKWELL_CAPABILITY, DeviceInfo
from loka.kernel_registry.grouped_tokens import quantize_experts, quantize_tokens
from loka.kernel_registry.operands import quantize_operand, quantize_operands
from loka.kernel_registry.spec import BATCHED, GemmRequest, Op
from loka.kernel_registry.triton import small
from loka.kernel_registry.triton.epilogue import gemm_norm_swish
from loka.kernel_registry.triton.gemm import scaled_gemm
from loka.kernel_registry.triton.grouped import grouped_gemm, grouped_wgrad
from loka.kernel_registry.triton.launch import CODES, DTYPES, Key
from loka.kernel_registry.triton.launches import BLOCKS_OF_B, TUNABLES, groups_of, quantize_key, rounded
from loka.kernel_registry.triton.quantize import quantize, quantize_both

# What the products are tuned into, and what operands are drawn in that a kernel sees as codes alone.
_OUT: Final[torch.dtype] = torch.bfloat16
_DTYPES: Final[dict[str, torch.dtype]] = {name: dtype for dtype, name in DTYPES.items()} | {CODES: _OUT}
_OP_OF_KERNEL: Final[dict[str, Op]] = {
    "gemm": "linear",
    "grouped": "grouped_linear",
    "grouped_wgrad": "grouped_linear",
    "epilogue": "linear_norm_act",
    "small": "bmm",
    "quantize": "linear",
}
# Up to so many elements of k there is one group of them, whose scales have the shape of rowwise ones.
_ONE_GROUP: Final[dict[tuple[str, str], int]] = {
    ("gemm", "blockwise"): BLOCK,
    ("gemm", "mxfp8"): MX_GROUP,
    ("epilogue", "blockwise"): BLOCK,
    ("grouped_wgrad", "blockwise"): BLOCK // 2,  # tokens, which are rounded up to a power of two
}
Call = Callable[[], object]


def keys_of(shapes: Iterable[Shape], info: DeviceInfo) -> list[Key]:
    """Return the keys that the products of some shapes go through, each once: products first, then their casts."""
    requests = [shape.request for shape in shapes]
    # Before compute capability 10.0 MX products run at the speed of bf16 (see `gemm`): nothing is tuned for that.
    has_mx = (info.capability or (0, 0)) >= BLACKWELL_CAPABILITY
    found = [
        *(key for each in requests for key in _products(each)),
        *(key for each in requests for key in _casts(each)),
    ]
    return list(dict.fromkeys(rounded(key) for key in found if has_mx or key.recipe != "mxfp8"))


def _products(request: GemmRequest) -> Iterator[Key]:
    """Yield the keys of a product itself under every recipe."""
    m, n, k, batch = request.m, request.n, request.k, request.batch
    if request.op in BATCHED and request.dtype in _DTYPES:
        for recipe in small.SMALL_RECIPES:
            group = RECIPES[recipe].operand(PASS_OPERANDS[request.product][1]).group_rows or 1
            variant = BLOCKS_OF_B if group > 1 else ""
            yield Key("small", recipe, request.product, request.dtype, m, n, k, batch, variant)
        return
    kernel = "grouped_wgrad" if request.op == "grouped_linear" and request.product == "wgrad" else None
    kernel = kernel or {"linear": "gemm", "grouped_linear": "grouped", "linear_norm_act": "epilogue"}.get(request.op)
    if kernel is not None:
        for recipe, _ in sorted(TUNABLES[kernel].served, reverse=True):
            if k <= _ONE_GROUP.get((kernel, recipe), 0):
                continue  # its only scale spans all of k, and it runs as rowwise does
            yield Key(kernel, recipe, "wgrad" if kernel == "grouped_wgrad" else "fprop", CODES, m, n, k, batch)


def _casts(request: GemmRequest) -> Iterator[Key]:
    """Yield the keys of the casts of a product's operands, and of those that a layer makes along both sides at once."""
    if request.op not in ("linear", "grouped_linear", "linear_norm_act") or request.dtype not in _DTYPES:
        return
    by_token = request.op == "grouped_linear"
    if by_token and request.product == "wgrad":
        return  # scales along the tokens of an expert are made in torch
    rows = request.m, request.n * (request.batch if by_token else 1)
    turned = (False, False) if by_token else TURNED[request.product]
    for number, role in enumerate(PASS_OPERANDS[request.product]):
        # A layer casts its input and its weight in fprop, and the gradient in dgrad, along both sides.
        both = request.op == "linear" and not turned[number] and (request.product == "fprop" or role == "grad_output")
        layouts = ["columns" if turned[number] else "rows", *(["both"] if both else [])]
        for groups in _groups_of_role(role):
            for layout in layouts:
                if layout != "both" or groups[0] != groups[1]:  # else the transpose has the same codes
                    key = quantize_key(groups, layout, request.dtype, rows[number], request.k)
                    if key is not None:
                        yield key


def _groups_of_role(role: Role) -> list[tuple[int | None, int | None]]:
    specs = (RECIPES[recipe].operand(role) for recipe, _ in sorted(TUNABLES["quantize"].served))
    return list(dict.fromkeys((spec.group_rows, spec.group_k) for spec in specs))


# --- calls ---


def calls_of(key: Key, device: torch.device) -> list[Call]:
    """Draw the operands of a key, as many as leave the cache cold, and return a call of its kernel on each."""
    request = GemmRequest(
        site="",
        product=key.product,
        op=_OP_OF_KERNEL[key.kernel],
        m=key.m,
        n=key.n,
        k=key.k,
        dtype=str(_DTYPES[key.dtype]).removeprefix("torch."),
        batch=key.batch,
    )
    drawn = draw_operands(request, _DTYPES[key.dtype], device)
    make = _CALLS[key.kernel]
    return [make(key, a, b, drawn.offsets) for a, b in drawn.pairs]


def _gemm(key: Key, a: Tensor, b: Tensor, offsets: Tensor | None) -> Call:
    left, right = quantize_operands(RECIPES[key.recipe], a, b, "fprop")
    return partial(scaled_gemm, left.data, right.data, left.scale, right.scale, out_dtype=_OUT)


def _grouped(key: Key, a: Tensor, b: Tensor, offsets: Tensor | None) -> Call:
    left = quantize_operand(a, RECIPES[key.recipe].operand("input"))
    codes, scale = quantize_experts(b, RECIPES[key.recipe].operand("weight"))
    return partial(grouped_gemm, left.data, codes, _there(offsets), left.scale, scale, out_dtype=_OUT)


def _grouped_wgrad(key: Key, a: Tensor, b: Tensor, offsets: Tensor | None) -> Call:
    spec = RECIPES[key.recipe].operand("grad_output")
    (left, left_scale), (right, right_scale) = (quantize_tokens(x, _there(offsets), spec) for x in (a, b))
    return partial(grouped_wgrad, left, right, _there(offsets), left_scale, right_scale, out_dtype=_OUT)


def _epilogue(key: Key, a: Tensor, b: Tensor, offsets: Tensor | None) -> Call:
    left, right = quantize_operands(RECIPES[key.recipe], a, b, "fprop")
    return partial(gemm_norm_swish, left.data, right.data, None, left.scale, right.scale)


def _small(key: Key, a: Tensor, b: Tensor, offsets: Tensor | None) -> Call:
    return partial(getattr(small, key.recipe), a, b, product=key.product, out_dtype=a.dtype)


def _quantize(key: Key, a: Tensor, b: Tensor, offsets: Tensor | None) -> Call:
    groups, layout = groups_of(key)
    spec = replace(RECIPES[key.recipe].operand("input"), group_rows=groups[0], group_k=groups[1])
    if layout == "both":
        return partial(quantize_both, a, spec)
    return partial(quantize, a.t().contiguous().t() if layout == "columns" else a, spec)


def _there(offsets: Tensor | None) -> Tensor:
    assert offsets is not None  # `draw_operands` has them for a grouped product
    return offsets


_CALLS: Final[dict[str, Callable[[Key, Tensor, Tensor, Tensor | None], Call]]] = {
    "gemm": _gemm,
    "grouped": _grouped,
    "grouped_wgrad": _grouped_wgrad,
    "epilogue": _epilogue,
    "small": _small,
    "quantize": _quantize,
}
