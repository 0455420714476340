"""What a process without Triton's interpreter does with the grouped product or the fused epilogue: compile and trace.

`found` gives, for "grouped" or "epilogue": per kernel and capability its shared memory and how often it has each
instruction, the Triton kernels that tracing meets, forward and backward, and what a call on the CPU is told.
"""

from unittest import mock

import torch
import triton
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loka.errors import KernelError
from loka.kernel_registry.triton import epilogue, grouped, grouped_linear, launches, unrouted
from loka.kernel_registry.triton.epilogue_kernels import backward_tiles, fused_tiles

INSTRUCTIONS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma", ".shared.global", "add.f32", "add.rn.f32")
POINTERS = {
    "x_scale_ptr": "*fp32",
    "w_scale_ptr": "*fp32",
    "y_scale_ptr": "*fp32",
    "bias_ptr": "*fp32",
    "scale_ptr": "*fp32",
    "sums_ptr": "*fp32",
    "offsets_ptr": "*i32",
    "saved_ptr": "*bf16",
    "grad_ptr": "*bf16",
    "out_ptr": "*bf16",
    "eps": "fp32",
}
ALIGNED = {
    "x_ptr",
    "w_ptr",
    "y_ptr",
    "out_ptr",
    "n",
    "k",
    "stride_xm",
    "stride_xt",
    "stride_yt",
    "stride_we",
    "stride_wn",
}
UNIT = ("stride_xk", "stride_wk", "stride_yn", "stride_sxk", "stride_swk", "stride_bias", "stride_gn")


class Hopper:
    """The device that Triton compiles for, as far as tracing asks."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def compiled(kernel, capability, types, launch, constants):
    names = kernel.arg_names
    constants = {name: 1 for name in UNIT if name in names} | {"INTERPRETED": False} | constants
    constants = {name: value for name, value in constants.items() if name in names}
    types = POINTERS | types
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if name in ALIGNED - {*constants}},
    )
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def grouped_cases():
    codes = {"x_ptr": "*fp8e4nv", "w_ptr": "*fp8e4nv", "y_ptr": "*fp8e4nv"}
    few, many = launches.GROUPED[0].launch, launches.GROUPED[-1].launch
    for name, kernel, launch, blockwise in (
        ("few tokens, blockwise", grouped._multiply_groups, few, True),
        ("rowwise", grouped._multiply_groups, many, False),
        ("blockwise", grouped._multiply_groups, many, True),
        ("wgrad, rowwise", grouped._reduce_groups, launches.GROUPED_WGRAD, False),
        ("wgrad, blockwise", grouped._reduce_groups, launches.GROUPED_WGRAD, True),
    ):
        sizes = {"BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n, "BLOCK_K": 128, "PROGRAMS": 132}
        scales = {"BLOCKWISE": blockwise, "W_GROUP": 128 if blockwise else 1}
        yield name, kernel, codes, launch, sizes | scales
    yield "few: rows of nobody", unrouted.zero_tail, {}, few, {"ROWS": unrouted.ROWS, "COLUMNS": unrouted.COLUMNS}


def handed(name, capability, types, launch, constants):
    """What a weight gradient on a device of this capability is handed: its codes may be bytes."""
    if "wgrad" not in name:
        return types, launch, constants
    with mock.patch.object(
        grouped, "has_capability", lambda device, least: (capability // 10, capability % 10) >= least
    ):
        as_bytes = grouped._as_bytes.__wrapped__(torch.device("cuda"))
    types = dict.fromkeys(types, "*u8") if as_bytes else types
    return types, launch, constants | {"BYTES": as_bytes}


def epilogue_cases():
    few, many = (row.launch for row in launches.EPILOGUE)
    for name, operand, launch, blockwise, out in (
        ("few rows, rowwise", "*fp8e4nv", few, False, "rowwise"),
        ("rowwise", "*fp8e4nv", many, False, "bfloat16"),
        ("blockwise", "*fp8e4nv", many, True, "blockwise"),
        ("bf16", "*bf16", many, False, "bfloat16"),
    ):
        types = {"x_ptr": operand, "w_ptr": operand} | ({"out_ptr": "*u8"} if out != "bfloat16" else {})
        coded = operand == "*fp8e4nv"
        flags = {"FP8": coded, "BLOCKWISE": blockwise, "X_GROUP": 1, "W_GROUP": 128 if blockwise else 1}
        sizes = {"BLOCK_M": launch.block_m, "BLOCK_N": 256, "BLOCK_K": 128 if coded else 64}
        rest = {"HAS_BIAS": True, "SAVE": True, "SWEEPS": 1 + (out == "rowwise"), "PRECISION": "ieee"}
        rest |= {"MAX": 448.0, "MANTISSA_BITS": 3, "MIN_EXPONENT": -6, "CAST": "rounded" if "few" in name else "direct"}
        rest |= {"OUT": out, "ROUND": "bfloat16" if out == "blockwise" else "float32"}
        yield name, fused_tiles, types, launch, flags | sizes | rest
    yield "backward", backward_tiles, {}, few, {"SUMS": True, "BLOCK_M": epilogue.BACKWARD_ROWS, "BLOCK_N": 256}


def traced(run, *leaves):
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        outputs = [node and node.meta["val"] for node in graph.graph.output_node().args[0]]
        outputs = [value if value is None else (tuple(value.shape), value.dtype) for value in outputs]
        return make_boxed_func(lambda *_: [value and torch.zeros(value[0], dtype=value[1]) for value in outputs])

    aot_function(run, fw_compiler=compiler, bw_compiler=compiler)(*leaves).sum().backward()
    return [sum("triton" in str(node.target) for node in graph.graph.nodes) for graph in graphs]


def refusal(run, *operands):
    try:
        run(*operands)
    except KernelError as error:
        return str(error)
    return "none"


def traced_grouped():
    offsets = torch.tensor([3, 7], dtype=torch.int32)
    x, weight = torch.randn(7, 24, requires_grad=True), torch.randn(2, 16, 24, requires_grad=True)
    return traced(lambda *leaves: grouped_linear.grouped_linear(*leaves, "blockwise"), x, weight, offsets)


def traced_epilogue():
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((7, 24), (300, 24), (300,)))
    return traced(epilogue.linear_norm_swish, x, weight, bias)


def found(which):
    triton.runtime.driver.set_active(Hopper())
    cases, trace = {"grouped": (grouped_cases, traced_grouped), "epilogue": (epilogue_cases, traced_epilogue)}[which]
    rows = []
    for name, kernel, types, launch, constants in cases():
        # A small tile has nothing to choose from: one device shows that it is legal.
        for capability in (89,) if "few" in name else (89, 90, 100):
            made = compiled(kernel, capability, *handed(name, capability, types, launch, constants))
            counts = {instruction: made.asm["ptx"].count(instruction) for instruction in INSTRUCTIONS}
            rows.append([name, capability, made.metadata.shared, counts])
    refused = refusal(epilogue.linear_norm_swish, torch.ones(4, 8), torch.ones(4, 8))
    return {"rows": rows, "traced": trace(), "refused": refused}
