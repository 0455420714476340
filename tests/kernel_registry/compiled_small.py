"""What a process without Triton's interpreter does with small products: compile them for devices that are not here.

`found` gives, per configuration, its shared memory and how often it has each instruction, the Triton kernels that
tracing meets, forward and backward, for sizes that are fixed and that vary, and what a call on the CPU is told.
"""

import torch
import triton
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loka.errors import KernelError
from loka.kernel_registry.triton import launches, small
from loka.kernel_registry.triton.small_kernels import Row, multiply_products

INSTRUCTIONS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma", "add.f32", "add.rn.f32")
MOVES = ("ld.global.v4", "cp.async.cg.shared.global", "st.global.v4")
CASTS = {89: "rounded", 90: "direct", 100: "direct"}
# Where a pass reads a and b contiguously.
UNITS = {"fprop": ("k", "k"), "dgrad": ("k", "rows"), "wgrad": ("rows", "rows")}
LARGE = launches.SMALL[-1].launch
# pass, operands, blockwise, rows of b that share a scale, tile
CASES = (
    ("fprop", "*bf16", False, 1, LARGE),
    ("fprop", "*bf16", True, 128, LARGE),
    ("wgrad", "*bf16", True, 1, LARGE),
    ("dgrad", "*fp32", True, 128, LARGE),
    ("fprop", "*fp16", True, 128, launches.SMALL[0].launch),
)


def compiled(capability, product, dtype, blockwise, b_group, launch):
    a_unit, b_unit = UNITS[product]
    constants = {
        "ROWS": 32,
        "A_UNIT": a_unit,
        "B_UNIT": b_unit,
        "ALIGNED": (1 << len(Row._fields)) - 1,
        "BLOCKWISE": blockwise,
        "B_GROUP": b_group,
        "MAX": 448.0,
        "MANTISSA_BITS": 3,
        "MIN_EXPONENT": -6,
        "CAST": CASTS[capability],
        "INTERPRETED": False,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK_K": 128,
    }
    types = {"a_ptr": dtype, "b_ptr": dtype, "out_ptr": dtype, "table_ptr": "*i64", "rows": "i32"}
    names = multiply_products.arg_names
    source = ASTSource(
        fn=multiply_products,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if name.endswith("_ptr")},
    )
    options = {"num_warps": launch.num_warps, "num_stages": 1 if dtype == "*fp32" else launch.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


class Hopper:
    """The device that Triton compiles for, as far as tracing asks."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def operands(m=40):
    x, other = torch.randn(m, 48), torch.randn(m, 13)
    weights = [torch.randn(n, k) for n, k in ((24, 48), (16, 48), (8, 13))]
    return [one.requires_grad_() for one in (x, other, *weights)]


def towers(x, other, first, second, third):
    return small.many_linear([x, x, other], [first, second, third], "blockwise")


def sized(value):
    """Zeros of the shape that a tracer saw, sizes that vary being those of the call it traced."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.zeros([size if isinstance(size, int) else size.node.hint for size in value.shape], dtype=value.dtype)


def traced(leaves, cloned, *, varies):
    """How many kernels the forward graph has, and the backward graph, for a batch that varies or is fixed.

    `cloned` gathers the arguments that the kernels write to.
    """
    kernels = []

    def compiler(graph, inputs):
        launches = [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
        kernels.append(len(launches))
        cloned.update(*(node.kwargs["tensors_to_clone"] for node in launches))
        outputs = [node and node.meta["val"] for node in graph.graph.output_node().args[0]]
        return make_boxed_func(lambda *_: [sized(value) for value in outputs])

    if varies:
        for x in leaves[:2]:
            torch._dynamo.mark_dynamic(x, 0)  # raises where something fixes it
    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    sum(out.sum() for out in torch.compile(towers, backend=backend, fullgraph=True)(*leaves)).backward()
    torch._dynamo.reset()
    return kernels


def refusal():
    try:
        towers(*(one.detach() for one in operands()))
    except KernelError as error:
        return str(error)
    return "none"


def found():
    triton.runtime.driver.set_active(Hopper())
    rows = []
    for case in CASES:
        # Everything for Hopper, the usual pass for its neighbours, where a small tile has nothing to choose from.
        for capability in (89,) if case[-1] is not LARGE else (89, 90, 100) if case[0] == "fprop" else (90,):
            made = compiled(capability, *case)
            counts = {name: made.asm["ptx"].count(name) for name in INSTRUCTIONS + MOVES}
            rows.append([case[0], case[2], case[-1].block_m, capability, made.metadata.shared, counts])
    refused = refusal()
    small.check_device = lambda x: None
    small.fp8_cast = lambda device: "direct"
    cloned = set()
    graphs = [traced(operands(), cloned, varies=varies) for varies in (False, True)]
    return {"rows": rows, "refused": refused, "traced": graphs, "cloned": sorted(cloned)}
