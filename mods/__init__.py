"""Mods: model rewrites that widen what is safe and fast in FP8."""

if __name__ != "loka.mods":
    raise ImportError("this folder is the package loka.mods: write 'import loka.mods' instead of 'import mods'")

from loka.mods.block_norm import BlockNorm
from loka.mods.edits import Replacement
from loka.mods.fold_norm import FoldNorm
from loka.mods.fuse import FuseParallelLinears
from loka.mods.fuse_epilogue import FuseEpilogue
from loka.mods.fused_linear import FusedLinearNormAct, linear_norm_act
from loka.mods.hadamard import Hadamard
from loka.mods.hard_swish import HardSwish
from loka.mods.keep_rows import KeepRowsHigh
from loka.mods.keep_share import KeepShareHigh
from loka.mods.no_bias import NoBias
from loka.mods.pad import PadToAlignment
from loka.mods.rewrite import Applied, apply
from loka.mods.smooth import Smooth
from loka.mods.squared_relu import SquaredReLU
from loka.mods.trial.equivalent import EquivalentMod, Refusal

SplitOutlierRows = KeepRowsHigh  # the name others give it

__all__ = [
    "Applied",
    "BlockNorm",
    "EquivalentMod",
    "FoldNorm",
    "FuseEpilogue",
    "FuseParallelLinears",
    "FusedLinearNormAct",
    "Hadamard",
    "HardSwish",
    "KeepRowsHigh",
    "KeepShareHigh",
    "NoBias",
    "PadToAlignment",
    "Refusal",
    "Replacement",
    "Smooth",
    "SplitOutlierRows",
    "SquaredReLU",
    "apply",
    "linear_norm_act",
]
