"""What a process without Triton's interpreter does: compile the product for devices that are not here, and trace it.

`found` gives, per configuration, its shared memory and how often it has each instruction, the latter also where the
depth is no multiple of anything, and per recipe what its graph calls.
"""

import torch
import triton
from torch._functorch.aot_autograd import aot_function
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loka.kernel_registry.triton import gemm, launches, scaled

TYPES = {"e4m3": "*fp8e4nv", "e5m2": "*fp8e5"}
INSTRUCTIONS = (
    *("mma.sync", "wgmma.mma_async", "tcgen05.mma", "cp.async.bulk.tensor", "add.f32", "add.rn.f32"),
    "ld.global.b8",
)


def compiled(capability, launch, group_k, formats, depth_is_odd=False):
    kernel = gemm._multiply_tiles
    constants = {
        "stride_ak": 1,
        "stride_bk": 1,
        "A_GROUP": 1,
        "B_GROUP": 1,
        "GROUP_K": group_k,
        "A_FORMAT": formats[0],
        "B_FORMAT": formats[1],
        "TMA": capability >= 90,
        "INTERPRETED": False,
        "PROGRAMS": 132,
        "SPLITS": 1,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK_K": launches.TILE_K,
        "GROUP_M": launch.group_m,
    }
    types = {
        "a_ptr": TYPES[formats[0]],
        "b_ptr": TYPES[formats[1]],
        "out_ptr": "*bf16",
        "a_scale_ptr": "*fp32",
        "b_scale_ptr": "*fp32",
    }
    names = kernel.arg_names
    # Rows begin at whole lines whatever the depth is; without TMA it has been filled up to one.
    aligned = {*types, "stride_am", "stride_bn"} | ({"k"} if capability < 90 or not depth_is_odd else set())
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if name in aligned},
    )
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compilations():
    e4m3, mixed = ("e4m3", "e4m3"), ("e5m2", "e4m3")
    large, mx = launches.GEMM[-1].launch, launches.GEMM_MX[-1].launch
    for capability in (89, 90, 100):
        cases = [(large, 0, e4m3), (large, 128, e4m3), (mx, 32, e4m3)]
        if capability == 90:
            cases += [(large, 0, mixed), (launches.GEMM[0].launch, 0, e4m3)]
        for launch, group_k, formats in cases:
            made = compiled(capability, launch, group_k, formats)
            yield capability, launch.block_m, group_k, made.metadata.shared, instructions(made)


def instructions(made):
    return {name: made.asm["ptx"].count(name) for name in INSTRUCTIONS}


def of_odd_depth():
    large, e4m3 = launches.GEMM[-1].launch, ("e4m3", "e4m3")
    for capability in (90, 100):
        for group_k in (0, 128):
            yield instructions(compiled(capability, large, group_k, e4m3, depth_is_odd=True))


class Hopper:
    """The device that Triton compiles for, as far as tracing asks."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def traced(recipe):
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return lambda *arguments: [torch.zeros(40, 24)]

    def product(a, b):
        return getattr(scaled, recipe)(a, b, product="fprop", out_dtype=torch.float32)

    aot_function(product, fw_compiler=compiler)(torch.randn(40, 144), torch.randn(24, 144))
    return [str(node.target) for node in graphs[0].graph.nodes if "triton" in str(node.target)]


def found():
    triton.runtime.driver.set_active(Hopper())
    calls = [traced(recipe) for recipe in ("rowwise", "blockwise", "mxfp8")]
    return {"rows": list(compilations()), "odd": list(of_odd_depth()), "traced": calls}
