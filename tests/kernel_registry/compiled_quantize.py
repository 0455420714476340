"""What a process without Triton's interpreter does: compile the quantise kernels for devices that are not here.

`found` gives, per compilation, its shared memory and how often it has each instruction, the latter also of an operand
with an odd number of columns, what the ops' graphs call, and the error that a CPU operand raises.
"""

import re
from collections import Counter

import torch
import triton
from torch._functorch.aot_autograd import aot_function
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loka.errors import KernelError
from loka.formats import RECIPES
from loka.kernel_registry.triton import quantize as kernels
from loka.kernel_registry.triton import quantize_kernels

TYPES = {"x_ptr": "*bf16", "data_ptr": "*u8", "data_t_ptr": "*u8", "amax_ptr": "*i32", "amax_t_ptr": "*i32"}
POINTERS = {**TYPES, "scale_ptr": "*fp32", "scale_t_ptr": "*fp32"}
INSTRUCTIONS = r"\b(?:ld\.global|st\.global|cvt\.rn|div)[.\w]*|\.ftz"
CASTS = {89: "rounded", 90: "direct", 100: "direct"}
# kernel, recipe, role, both copies, block of a norm; tile and groups are those of a call.
CASES = (
    ("quantize_groups", "rowwise", "input", False, 0),
    ("quantize_groups", "blockwise", "input", True, 0),
    ("quantize_groups", "blockwise", "weight", True, 0),
    ("quantize_groups", "mxfp8", "input", False, 0),
    ("quantize_groups", "rowwise", "input", False, 256),
    ("quantize_groups", "blockwise", "input", True, 256),
    ("find_amax", "tensorwise", "grad_output", True, 0),
    ("find_amax", "rowwise", "input", True, 256),
    ("cast_by_amax", "tensorwise", "grad_output", True, 0),
    ("cast_by_amax", "rowwise", "input", True, 256),
    ("cast_by_amax", "rowwise", "input", True, 0),
)


# What is a multiple of nothing where x has an odd number of columns; the rows of its codes begin at whole lines.
ODD = ("k", "stride_m")


def compiled(capability, name, recipe, role, both, block, unaligned=()):
    kernel, spec = getattr(quantize_kernels, name), RECIPES[recipe].operand(role)
    groups = spec.group_rows, spec.group_k
    norm = (1, block) if block else (0, 0)
    launch, sides = kernels.chosen(torch.empty((4096, 8192), device="meta"), both, groups, norm)
    arithmetic = kernels._Arithmetic(spec.format.name, spec.scale_rule, "hardswish" if block else "none", norm)
    assert (name == "quantize_groups") == (sides is not None)
    constants = {
        **arithmetic.constants(),
        **arithmetic.reading(),
        **dict(zip(("GROUP_M", "GROUP_K", "GROUP_M_T", "GROUP_K_T"), sides or (0,) * 4, strict=True)),
        "TRANSPOSED": both,
        "PER_TENSOR": spec.per_tensor,
        "CAST": CASTS[capability],
        "TILE_M": launch.block_m,
        "TILE_K": launch.block_n,
        "stride_k": 1,
    }
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={arg: "constexpr" if arg in constants else POINTERS.get(arg, "i32") for arg in names},
        constexprs={(names.index(arg),): value for arg, value in constants.items() if arg in names},
        attrs={(at,): [["tt.divisibility", 16]] for at, arg in enumerate(names) if arg not in (*constants, *unaligned)},
    )
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": launch.num_warps})
    return [capability, name, built.metadata.shared, Counter(re.findall(INSTRUCTIONS, built.asm["ptx"]))]


class Hopper:
    """The device that Triton compiles for, as far as tracing asks."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def traced(recipe):
    """Names of the kernel calls in the graph of an operand that is taken for one on a GPU."""
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return lambda *arguments: list(kernels.quantize_both_op._abstract_fn(*arguments, *operator_arguments))

    spec = RECIPES[recipe].operand("input")
    operator_arguments = spec.format.name, spec.group_rows, spec.group_k, spec.scale_rule, "none"
    aot_function(lambda x: kernels.quantize_both(x, spec), fw_compiler=compiler)(torch.randn(256, 512))
    return [str(node.target) for node in graphs[0].graph.nodes if "triton" in str(node.target)]


def refusal():
    try:
        kernels.quantize(torch.zeros(2, 2), RECIPES["rowwise"].operand("input"))
    except KernelError as error:
        return str(error)
    return ""


def found():
    assert not kernels.INTERPRETED
    refused = refusal()
    # Everything for Hopper, the widest case for its neighbours.
    pairs = [(90, case) for case in CASES] + [(capability, case) for capability in (89, 100) for case in CASES[-1:]]
    rows = [compiled(capability, *case) for capability, case in pairs]
    triton.runtime.driver.set_active(Hopper())
    kernels.fp8_cast = lambda device: "direct"
    kernels._check_device = lambda device: None
    return {
        "refusal": refused,
        "rows": rows,
        "odd": [compiled(90, *case, ODD)[-1] for case in CASES if case[0] != "find_amax"],
        "traced": {recipe: traced(recipe) for recipe in ("tensorwise", "blockwise")},
    }
