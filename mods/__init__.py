"""Mods: model rewrites that widen what is safe and fast in FP8."""

if __name__ != "loka.mods":
    raise ImportError("this folder is the package loka.mods: write 'import loka.mods' instead of 'import mods'")

from loka.mods.block_norm import BlockNorm
from loka.mods.hard_swish import HardSwish
from loka.mods.no_bias import NoBias
from loka.mods.rewrite import Applied, Replacement, apply
from loka.mods.squared_relu import SquaredReLU

__all__ = ["Applied", "BlockNorm", "HardSwish", "NoBias", "Replacement", "SquaredReLU", "apply"]
