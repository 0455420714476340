"""What a kernel is: one frozen row of facts, answering two questions in words.

`unavailable(device)` says why a kernel cannot run on a device at all, `cannot(request)` why it cannot serve one product
there; None means it can. A kernel's implementation is a lazy "module:function" with one signature for every pass:

    def kernel(a, b, *, product, out_dtype) -> Tensor

    a [m, k], b [n, k]  the operands in high precision, possibly strided views; never modified
    product             "fprop", "dgrad" or "wgrad"; names the roles of a and b (formats.PASS_OPERANDS)
    out_dtype           dtype of the result, out[m, n] = sum_k a[m, k] * b[n, k]

Kernels of the ops `bmm` and `many_linear` take a [batch, m, k] and b [batch, n, k], and return [batch, m, n]: of the
one, a batch as it lies in memory; of the other, one matrix per layer, each a tensor of its own where a model has it, so
that a kernel which needs them in one place has to put them there. Those of `grouped_linear` follow `GroupedKernel`.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from loka.errors import KernelError
from loka.formats import PASSES, RECIPES, Pass
from loka.hardware import DeviceInfo
from loka.torch_release import release

if TYPE_CHECKING:
    from loka.kernel_registry.layers import Layer
    from loka.kernel_registry.norm_act import FusedLayer
    from loka.kernel_registry.operands import Operand

# What Triton takes for yes in an environment variable (triton/knobs.py).
_TRUE: Final[tuple[str, ...]] = ("1", "true", "yes", "on", "y")

# "linear_norm_act" is a linear layer, BlockNorm and HardSwish in one; "linear_layer" all passes of a linear layer, with
# the casts that they share. "other" is any product that has no name here; only `torch.native.other` serves it.
Op = Literal[
    "linear", "bmm", "many_linear", "grouped_linear", "linear_norm_act", "linear_layer", "convolution", "other"
]
# The ops of which `batch` products of one size are one call.
BATCHED: Final[tuple[Op, ...]] = ("bmm", "many_linear")


class Kernel(Protocol):
    """A GEMM: out[m, n] = sum_k a[m, k] * b[n, k]."""

    def __call__(self, a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
        """Compute the product."""


class GroupedKernel(Protocol):
    """One GEMM per expert, over rows that are sorted by expert; offsets int32 [experts]: where each one's rows end.

    fprop, dgrad    a [tokens, k], b [experts, n, k]: out [tokens, n], zero in rows after the last offset
    wgrad           a [tokens, n], b [tokens, k]: out [experts, n, k], summed over each expert's tokens
    """

    def __call__(self, a: Tensor, b: Tensor, offsets: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
        """Compute the products."""


class Prepared(NamedTuple):
    """Operand b [n, k] of a product, quantised and laid out as one kernel reads it."""

    tensors: tuple[Tensor, ...]
    n: int


class PreparedKernel(Protocol):
    """A GEMM in two halves, for a b that serves many a: made once, multiplied often.

    The numbers are those of the kernel itself: kernel(a, b) equals multiply(a, prepare(b)), and that equals
    multiply(a, lay_out(codes, scale)) with what `loka.quantize.quantize` makes of b, bit for bit.
    """

    def prepare(self, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Prepared:
        """Quantise b [n, k]; the result serves products of this pass into this dtype."""

    def lay_out(self, codes: Tensor, scale: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Prepared:
        """Do the same for a b that is there as codes [n, k] and fp32 scales [groups of n, groups of k]."""

    def multiply(self, a: Tensor, b: Prepared, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
        """Compute out[m, n] = sum_k a[m, k] * b[n, k]."""

    def multiply_codes(self, a: "Operand", b: Prepared, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
        """Do the same for an a that is quantised already, as `operands.quantize_operand` does it."""


class StoredGroupedKernel(Protocol):
    """The products of a grouped kernel with weights that are there as codes and scales, each expert's its own.

    The numbers are those of the kernel itself on what `loka.quantize.quantize` made them of, bit for bit.
    """

    def __call__(
        self, a: Tensor, codes: Tensor, scale: Tensor, offsets: Tensor, *, out_dtype: torch.dtype, product: Pass = ...
    ) -> Tensor:
        """Compute fprop or dgrad; codes [experts, n, k], fp32 scale [experts, groups of n, groups of k].

        One that takes no `product` computes fprop.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class GemmRequest:
    """One product to be served: out[m, n] = sum_k a[m, k] * b[n, k], `batch` times, with operands of `dtype`."""

    site: str
    product: Pass
    op: Op
    m: int
    n: int
    k: int
    dtype: str  # "float32", "bfloat16", ...
    batch: int = 1

    @property
    def flops(self) -> float:
        """Multiplications and additions; the experts of a grouped product share its rows, or its reduction."""
        products = {"grouped_linear": 1, "linear_layer": len(PASSES)}.get(self.op, self.batch)
        return 2.0 * self.m * self.n * self.k * products

    @property
    def moved_bytes(self) -> float:
        """What any implementation has to move: both operands read, the result written, once, in the model's dtype."""
        a, b, out = self.m * self.k, self.n * self.k, self.m * self.n
        if self.op == "grouped_linear":  # one operand, or the result, is there for every expert
            elements = a + b + self.batch * out if self.product == "wgrad" else a + self.batch * b + out
        else:
            elements = self.batch * (a + b + out)
        if self.op == "linear_layer":  # backward reads two of them again, and the gradient; and writes two gradients
            elements += a + b + out + a + b
        return float(elements * torch.empty((), dtype=getattr(torch, self.dtype)).element_size())

    def __str__(self) -> str:
        """Return e.g. `up.fprop linear 2048x256x768 bfloat16` (m x k x n)."""
        batch = f"{self.batch}x" if self.batch > 1 else ""
        return f"{self.site}.{self.product} {self.op} {batch}{self.m}x{self.k}x{self.n} {self.dtype}"


# Of a kernel in plain torch: it runs where a model runs.
ANYWHERE: Final[tuple[str, ...]] = ("any",)


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelSpec:
    """One implementation of one op under one recipe by one library, named `library.op.recipe`.

    `recipe` is None for a high-precision kernel, which is its site's baseline. `device_types` lists where it can run;
    on CUDA, compute capabilities from `min_capability` on and below `below_capability`, and on a CPU torch from
    `min_torch_on_cpu` on. `alignment` divides k and n
    (0: no demand); `pads_to` is what the kernel itself fills them up to with zeros, once the scales are known; `layout`
    says how the library wants operands and scales. `prepared` is the lazy "module:object" of its two halves, a
    `PreparedKernel`, where it has them; `layer` that of a `layers.Layer`, whose passes `implementation` computes one by
    one; `fused` that of a `norm_act.FusedLayer`, without which a kernel of the op `linear_norm_act` can be timed and
    not planned; `stored`, of a grouped kernel, that of a `StoredGroupedKernel`. No `dtypes` means any; `module` must be
    importable; `requires` is a lazy "module:function" that is called without arguments and returns what else is
    missing, or None; `source` says where each constant comes from. `defect` is why nothing can be done with this row at
    all: it stands for a plugin that failed to load.
    """

    name: str
    op: Op
    recipe: str | None
    implementation: str  # "module:function"
    prepared: str = ""  # "module:object"
    layer: str = ""  # "module:object"
    fused: str = ""  # "module:object"
    stored: str = ""  # "module:object"
    passes: tuple[Pass, ...] = PASSES
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    device_types: tuple[str, ...] = ("cpu", "cuda")  # or ANYWHERE
    min_capability: tuple[int, int] | None = None
    below_capability: tuple[int, int] | None = None
    min_torch_on_cpu: tuple[int, int] | None = None
    alignment: int = 0
    pads_to: int = 0
    layout: str = ""
    module: str = ""
    requires: str = ""
    interpreter: str = ""
    traceable: bool = True  # plain aten and triton ops, which Inductor can fuse with their neighbours
    source: str = ""
    defect: str = ""

    def __post_init__(self) -> None:
        """Check the name against the fields, so that a row cannot say two things."""
        parts = self.name.split(".")
        if len(parts) < 2 or ":" not in self.implementation:
            raise KernelError(
                f"Kernel {self.name!r} needs a name 'library.op[.recipe]' and an implementation 'module:function', "
                f"not {self.implementation!r}."
            )
        if self.recipe is not None and self.recipe not in RECIPES:
            raise KernelError(f"Kernel {self.name!r} names the recipe {self.recipe!r}; known: {', '.join(RECIPES)}.")

    @property
    def library(self) -> str:
        """The library that implements it: the first part of the name."""
        return self.name.split(".", 1)[0]

    @property
    def is_baseline(self) -> bool:
        """Whether it computes in high precision."""
        return self.recipe is None and not self.defect

    def unavailable(self, device: DeviceInfo) -> str | None:
        """Return why this kernel cannot run on `device`, or None."""
        if self.defect:
            return self.defect
        if self.device_types != ANYWHERE and device.type not in self.device_types:
            return f"needs {' or '.join(self.device_types)}, this device is {device.type}"
        if device.type == "cpu" and self.interpreter and os.environ.get(self.interpreter, "").lower() not in _TRUE:
            return f"needs cuda (a cpu interprets it, for tests, under {self.interpreter}=1)"
        if device.type == "cpu" and self.min_torch_on_cpu is not None and release() < self.min_torch_on_cpu:
            return f"needs torch {_dotted(self.min_torch_on_cpu)} or newer on a cpu, this is {torch.__version__}"
        if device.type == "cuda" and not self._suits(device.capability or (0, 0)):
            have = _dotted(device.capability) if device.capability else "none"
            return f"needs CUDA compute capability {self._capabilities()}, this device has {have}"
        if self.module and importlib.util.find_spec(self.module.split(".")[0]) is None:
            return f"the package {self.module.split('.')[0]!r} is not installed"
        return self._missing() if self.requires else None

    def _missing(self) -> str | None:
        """Ask `requires` what is missing."""
        try:
            return cast(Callable[[], str | None], self._import(self.requires))()
        except KernelError as error:
            return str(error)

    def _suits(self, capability: tuple[int, int]) -> bool:
        above = self.min_capability is None or capability >= self.min_capability
        return above and (self.below_capability is None or capability < self.below_capability)

    def _capabilities(self) -> str:
        """Return e.g. `8.9`, or `9.0 or above, below 10.0`."""
        need = _dotted(self.min_capability) if self.min_capability else "any"
        return f"{need} or above, below {_dotted(self.below_capability)}" if self.below_capability else need

    def cannot(self, request: GemmRequest) -> str | None:
        """Return why this kernel cannot serve `request`, or None."""
        if request.op != self.op and (request.op, self.op) != ("linear", "linear_layer"):
            return f"computes {self.op}, not {request.op}"
        if request.product not in self.passes:
            return f"serves {', '.join(self.passes)}, not {request.product}"
        if request.op == "linear" and request.batch != 1:
            return f"computes one product per call, not a batch of {request.batch}"
        if self.dtypes and request.dtype not in self.dtypes:
            return f"takes {', '.join(self.dtypes)}, not {request.dtype}"
        if self.alignment and (request.k % self.alignment or request.n % self.alignment):
            return f"k and n must be multiples of {self.alignment}, they are {request.k} and {request.n}"
        return None

    def load(self) -> Kernel:
        """Import and return the implementation; raise KernelError with the reason when that fails."""
        return cast(Kernel, self._import(self.implementation))

    def load_grouped(self) -> GroupedKernel:
        """Do the same for a kernel of the op `grouped_linear`."""
        return cast(GroupedKernel, self._import(self.implementation))

    def load_prepared(self) -> PreparedKernel | None:
        """Return the two halves of a kernel, None where it has none; raise KernelError as `load` does."""
        return cast(PreparedKernel, self._import(self.prepared)) if self.prepared else None

    def load_stored(self) -> StoredGroupedKernel | None:
        """Return the product of a grouped kernel with stored weights, None where it has none; raises as `load`."""
        return cast(StoredGroupedKernel, self._import(self.stored)) if self.stored else None

    def load_layer(self) -> "Layer | None":
        """Return all passes of a linear layer together, None where this is no such kernel."""
        return cast("Layer", self._import(self.layer)) if self.layer else None

    def load_fused(self) -> "FusedLayer | None":
        """Return a linear layer with its norm and activation as layers run it, None where this is no such kernel."""
        return cast("FusedLayer", self._import(self.fused)) if self.fused else None

    def _import(self, path: str) -> Callable[..., object]:
        module, _, function = path.partition(":")
        try:
            loaded: Callable[..., object] = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise KernelError(
                f"Kernel {self.name} could not be loaded from {path!r}: {error}. "
                "Install its library or leave this kernel out of the plan."
            ) from error
        return loaded


def _dotted(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))
