"""Does a kernel in use still compute what it should, on the very operands of a monitored step?

A result that is not finite where the exact product is means a kernel out of order. Now and then the result is also
compared, element by element, with the definition of the recipe, as `verify` does before a plan is made. Emulated
kernels are that definition, and are not looked at.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

import torch
from torch import Tensor, nn

from loka.dispatch.deciding.by_rows import kernel_for
from loka.dispatch.measuring.verify import Part, Verification, allowed_share, compare
from loka.dispatch.monitoring.ladder import Ladder, Rung
from loka.dispatch.running.linear import HIGH_PRECISION, load
from loka.hardware import device_info
from loka.kernel_registry.norm_act import norm_act
from loka.kernel_registry.registry import default_registry
from loka.kernel_registry.torch_mm import matmul
from loka.numerics import product_error
from loka.probes.capturing.products import Gemm
from loka.probes.sampling.measure import exact_arithmetic, is_plain_product

# One check in so many, the first among them, compares every element with the definition.
_COMPARE_EVERY: Final[int] = 8
# Rows whose error against the exact product is taken where a kernel differs from its definition.
_ROWS: Final[int] = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Something about a kernel. `fatal`: it must not go on."""

    kernel: str
    words: str
    fatal: bool


@dataclass(slots=True)
class KernelCheck:
    """Checks the kernels of a plan while they are in use."""

    _checks: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def look(self, ladder: Ladder, rung: Rung, gemm: Gemm) -> Finding | None:
        """Run a rung's kernel on a product's operands; return what is wrong with it, None where nothing is."""
        request = ladder.request
        if request.op not in ("linear", "linear_norm_act") or not is_plain_product(gemm):
            return None
        if gemm.unmeasured or not gemm.a.numel() or not gemm.b.numel():
            return None
        name = kernel_for(rung.kernel, gemm.a.shape[-2:-1])
        spec = default_registry().get(name) if name != HIGH_PRECISION else None
        if spec is None or spec.library == "emulated":
            return None
        if name != rung.kernel:  # that of the rows of this call
            rung = replace(rung, kernel=name, recipes=(str(spec.recipe),))
        kernel = load(rung.kernel)
        if kernel is None:  # it has failed, and high precision runs in its place
            return None
        a, b = gemm.a[0], gemm.b[0]
        key = request.site, request.product, rung.kernel
        self._checks[key] += 1
        try:
            out = kernel(a, b, product=request.product, out_dtype=a.dtype)
        except torch.OutOfMemoryError:
            return None
        except Exception as error:  # noqa: BLE001 - a kernel of any library may fail in any way
            words = f"{rung.kernel} raised {type(error).__name__}: {error}"
            return Finding(kernel=rung.kernel, words=words, fatal=True)
        exact = norm_act if spec.op == "linear_norm_act" else nn.Identity()
        if not bool(out.isfinite().all()) and bool(exact(matmul(a, b)).isfinite().all()):
            wrong = int((~out.isfinite()).sum())
            words = f"{rung.kernel} gave {wrong} of {out.numel()} elements that are not finite, from finite operands"
            return Finding(kernel=rung.kernel, words=words, fatal=True)
        return self._compare(ladder, rung, kernel, (a, b)) if self._checks[key] % _COMPARE_EVERY == 1 else None

    def _compare(
        self, ladder: Ladder, rung: Rung, kernel: Callable[..., Tensor], operands: tuple[Tensor, Tensor]
    ) -> Finding | None:
        a, b = operands
        # Of a layer with norm and activation, a kernel may compute the product alone: its row says what it is.
        fused = default_registry().get(rung.kernel).op == "linear_norm_act"
        request, info = replace(ladder.request, op="linear_norm_act" if fused else "linear"), device_info(a.device)
        blank = Verification(
            kernel=rung.kernel,
            recipe=str(rung.recipe),
            request=replace(request, m=a.shape[0], n=b.shape[0], k=a.shape[1]),
            values="live",
            worst=math.nan,
            allowed=allowed_share(a.shape[1], info),
            row=-1,
            column=-1,
        )
        with exact_arithmetic():
            actual = kernel(a, b, product=request.product, out_dtype=torch.float32)
            found = compare(blank, actual, [Part(a=a, b=b, first=0)])
            if found.holds:
                return None
            rows = slice(0, _ROWS)
            exact = matmul(a[rows].float(), b.float())
            error = product_error(actual[rows], norm_act(exact) if fused else exact).gated(ladder.gate)
        fatal = not error <= rung.limit
        words = f"{rung.kernel} does not compute what {rung.recipe} defines: {found.reason}"
        words += f"; its {ladder.gate} is {error:.3g}, limit {rung.limit:.3g}"
        return Finding(kernel=rung.kernel, words=words, fatal=fatal)
