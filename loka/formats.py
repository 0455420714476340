"""FP8 facts: element formats, scaling granularities and the named recipes, each stated once, as tables.

A recipe says how the two operands of a product become FP8: an element format per operand role, a scaling granularity
and a rule for the scales. It says nothing of who computes the product; that is a kernel (`loka.kernel_registry`).

    format    torch dtype           max     smallest normal   smallest subnormal   Inf
    e4m3      float8_e4m3fn         448     2^-6              2^-9                 no (NaN)
    e5m2      float8_e5m2           57344   2^-14             2^-16                yes

Sources: Micikevicius et al. 2022 (arXiv 2209.05433) for e4m3 and e5m2; OCP Microscaling Formats v1.0 for the 1x32
groups and E8M0; DeepSeek-V3 (arXiv 2412.19437, section 3.3) for 1x128 and 128x128 blocks; DeepGEMM (`ceil_to_ue8m0` in
deep_gemm/utils/math.py) for their power-of-two scales; torchao's float8 recipes for the choice of e5m2 for tensorwise
`grad_output`.
"""

from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch

from loka.errors import ArgumentError, nearest

Pass = Literal["fprop", "dgrad", "wgrad"]
Role = Literal["input", "weight", "grad_output"]
Scaling = Literal["tensorwise", "rowwise", "blockwise", "mxfp8"]
ScaleRule = Literal["fp32", "pow2_up", "pow2_floor"]
Accumulation = Literal["fp32", "reduced"]

PASSES: Final[tuple[Pass, ...]] = get_args(Pass)
ROLES: Final[tuple[Role, ...]] = get_args(Role)

# Every product is written out[m, n] = sum_k a[m, k] * b[n, k]; this names the operand behind a and b.
#   fprop  Y[M,N]  = X . W        dgrad  dX[M,K] = dY . W^T        wgrad  dW[N,K] = dY^T . X^T
PASS_OPERANDS: Final[dict[Pass, tuple[Role, Role]]] = {
    "fprop": ("input", "weight"),
    "dgrad": ("grad_output", "weight"),
    "wgrad": ("grad_output", "input"),
}

# torchao's names for the same three products.
PASS_SYNONYMS: Final[dict[str, Pass]] = {"output": "fprop", "grad_input": "dgrad", "grad_weight": "wgrad"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """One 8-bit floating-point element format.

    All of it is integers: under `torch.compile(dynamic=True)` Dynamo makes an input of a number of floating point that
    it finds anywhere but in code, and of one that two layers read it fails (torch 2.13, an assertion of
    `lift_tracked_freevar_to_input`).
    """

    name: str
    dtype: torch.dtype
    mantissa_bits: int
    min_exponent: int  # of the smallest normal number
    largest: int  # finite value
    has_infinity: bool

    @property
    def max(self) -> float:
        """The largest finite value."""
        return float(self.largest)

    @property
    def min_subnormal(self) -> float:
        """The smallest positive value."""
        return float(2.0 ** (self.min_exponent - self.mantissa_bits))


FORMATS: Final[dict[str, Format]] = {
    fmt.name: fmt
    for fmt in (
        Format(
            name="e4m3", dtype=torch.float8_e4m3fn, mantissa_bits=3, min_exponent=-6, largest=448, has_infinity=False
        ),
        Format(
            name="e5m2", dtype=torch.float8_e5m2, mantissa_bits=2, min_exponent=-14, largest=57344, has_infinity=True
        ),
        # AMD MI300: one more exponent step at the bottom, no negative zero, NaN as 0x80.
        Format(
            name="e4m3fnuz",
            dtype=torch.float8_e4m3fnuz,
            mantissa_bits=3,
            min_exponent=-7,
            largest=240,
            has_infinity=False,
        ),
        Format(
            name="e5m2fnuz",
            dtype=torch.float8_e5m2fnuz,
            mantissa_bits=2,
            min_exponent=-15,
            largest=57344,
            has_infinity=False,
        ),
    )
}


@dataclass(frozen=True, kw_only=True, slots=True)
class OperandSpec:
    """How one operand [rows, k] is quantised: element format, group of elements sharing a scale, rule for the scale.

    `group_rows` and `group_k` are the extent of a group along the rows and along the reduction; None is all of it.
    """

    format: Format
    group_rows: int | None
    group_k: int | None
    scale_rule: ScaleRule = "fp32"

    @property
    def per_tensor(self) -> bool:
        """Whether one scale serves the whole operand."""
        return self.group_rows is None and self.group_k is None


# Elements along k that share a scale under `blockwise`, and rows of a weight; and the group of MX.
BLOCK: Final[int] = 128
MX_GROUP: Final[int] = 32
# (group_rows, group_k); a weight block is square so that its transpose, which dgrad reads, has the same scales.
_GROUPS: Final[dict[Scaling, tuple[int | None, int | None]]] = {
    "tensorwise": (None, None),
    "rowwise": (1, None),
    "blockwise": (1, BLOCK),
    "mxfp8": (1, MX_GROUP),
}
_WEIGHT_GROUPS: Final[dict[Scaling, tuple[int | None, int | None]]] = {**_GROUPS, "blockwise": (BLOCK, BLOCK)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How the operands of a product become FP8, and how the product is added up (`loka.accumulation`)."""

    name: str
    scaling: Scaling
    scale_rule: ScaleRule = "fp32"
    input: str = "e4m3"
    weight: str = "e4m3"
    grad_output: str = "e4m3"
    # A saturating recipe clips finite values by design; closed forms of its error do not hold.
    saturating: bool = False
    accumulation: Accumulation = "fp32"

    @property
    def has_closed_form(self) -> bool:
        """Whether its error follows from how its operands are rounded alone."""
        return not self.saturating and self.accumulation == "fp32"

    def format_of(self, role: Role) -> Format:
        """Return the element format of one operand role."""
        return FORMATS[{"input": self.input, "weight": self.weight, "grad_output": self.grad_output}[role]]

    def operand(self, role: Role) -> OperandSpec:
        """Return how the operand in this role is quantised."""
        rows, k = (_WEIGHT_GROUPS if role == "weight" else _GROUPS)[self.scaling]
        return OperandSpec(format=self.format_of(role), group_rows=rows, group_k=k, scale_rule=self.scale_rule)

    def formats_of_pass(self, product: Pass) -> str:
        """Return the formats of the two operands of a pass, e.g. `e4m3` or `e5m2/e4m3`."""
        a, b = (self.format_of(role).name for role in PASS_OPERANDS[product])
        return a if a == b else f"{a}/{b}"


RECIPES: Final[dict[str, Recipe]] = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="tensorwise", scaling="tensorwise", grad_output="e5m2"),
        Recipe(name="rowwise", scaling="rowwise"),
        Recipe(name="blockwise", scaling="blockwise"),
        # Scales are E8M0 rounded up, so the largest element never saturates.
        Recipe(name="mxfp8", scaling="mxfp8", scale_rule="pow2_up"),
        # Blocks with E8M0 scales rounded up: what DeepGEMM runs from sm_100 on (UE8M0), where Hopper has fp32 scales.
        Recipe(name="blockwise_pow2", scaling="blockwise", scale_rule="pow2_up"),
        # The OCP floor rule: amax maps into [256, 512), so mantissas above 1.75 saturate at 448.
        Recipe(name="mxfp8_floor", scaling="mxfp8", scale_rule="pow2_floor", saturating=True),
        # What `use_fast_accum` trades on Hopper; those above promise fp32 accumulation.
        Recipe(name="tensorwise_fast_accum", scaling="tensorwise", grad_output="e5m2", accumulation="reduced"),
        Recipe(name="rowwise_fast_accum", scaling="rowwise", accumulation="reduced"),
    )
}

# What a probe measures unless told otherwise.
DEFAULT_RECIPES: Final[tuple[str, ...]] = ("tensorwise", "rowwise", "blockwise", "mxfp8")


def recipe(name: str) -> Recipe:
    """Return the recipe of this name; raise ArgumentError naming the known ones."""
    if name not in RECIPES:
        known = ", ".join(RECIPES)
        raise ArgumentError(f"There is no recipe {name!r}. Known recipes: {known}.{nearest(name, RECIPES)}")
    return RECIPES[name]


def pass_name(name: str) -> Pass:
    """Return the pass behind `fprop`, `dgrad`, `wgrad` or torchao's synonyms; raise ArgumentError otherwise."""
    resolved = PASS_SYNONYMS.get(name, name)
    for product in PASSES:
        if product == resolved:
            return product
    known = ", ".join((*PASSES, *PASS_SYNONYMS))
    raise ArgumentError(f"There is no pass {name!r}. Passes: {known}.{nearest(name, (*PASSES, *PASS_SYNONYMS))}")
