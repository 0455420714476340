"""An invertible change of the reduction's basis: what it is, how it is computed, and which one is best.

    x W^T = (x T) (W T^-T)^T

FP8 rounds every element relative to itself, so a product's squared error is proportional to

    sum over k of E[x_k^2] |w_k|^2

over |y|^2 (the alignment of a probe, turned over). A rotation that mixes all features makes every term the mean of
x_k^2 times the mean of |w_k|^2. That is less only where loud features meet loud columns; otherwise it is more. Scaling
first, by s_k = (|w_k|^2 / E[x_k^2])^(1/4), makes it the square of the mean of |x_k| |w_k|, which is never more. The
best T diagonalises both second moments at once, to the same values sigma (a balanced basis), and mixes afterwards: then
the error follows (sum sigma)^2 / (k sum sigma^2), the share of the basis that the product really uses. Directions with
a large sigma that are kept out of FP8 leave the first sum, and few of them make most of it.

The mixing is a Walsh-Hadamard transform by additions alone, for the largest power of two that divides k, times a
Hartley matrix for the odd rest: both are orthogonal and all of their entries nearly alike, and so there is one for
every k.
"""

import math
from typing import Final, Literal

import torch
from torch import Tensor, nn

from loka.errors import ArgumentError
from loka.mods.trial.equivalent import exact

Balance = Literal["none", "channel", "full"]
BALANCES: Final[tuple[Balance, ...]] = ("none", "channel", "full")
# Share of the mean variance that is added to every feature's, so that rare directions are not blown up.
_RIDGE: Final[float] = 1e-2
# Channel scales stay within 2^-12 and 2^12, far from where fp16 ends.
_REACH: Final[float] = 12.0


def hadamard(x: Tensor) -> Tensor:
    """Return x H over the last dimension, a power of two, H of Sylvester with entries 1 and -1."""
    width = x.shape[-1]
    shape = x.shape
    half = 1
    while half < width:
        pairs = x.reshape(*shape[:-1], width // (2 * half), 2, half)
        left, right = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((left + right, left - right), dim=-2)
        half *= 2
    return x.reshape(shape)


def hartley(width: int) -> Tensor:
    """Return the orthogonal, symmetric matrix (cos + sin)(2 pi j k / n) / sqrt(n) in fp64."""
    steps = torch.arange(width, dtype=torch.float64, device="cpu")
    angle = 2 * math.pi * (steps.unsqueeze(1) * steps % width) / width
    return (angle.cos() + angle.sin()) / math.sqrt(width)


class Mixing(nn.Module):
    """An orthogonal rotation of blocks of features; the last block is shorter where the width is no multiple."""

    def __init__(self, width: int, block: int | None = None) -> None:
        super().__init__()
        if block is not None and (not isinstance(block, int) or isinstance(block, bool) or block < 1):
            raise ArgumentError(f"block={block!r}: a block is a positive number of features, e.g. 64, or None for all.")
        self.width = width
        self.block = min(block or width, width)
        # Computed again wherever the module is made, and so no part of a checkpoint.
        for name, size in (("odd", self.block), ("odd_of_tail", width % self.block)):
            rest = size // _power_of_two_in(size)
            self.register_buffer(name, hartley(rest).float() if rest > 1 else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate [..., width]; computed in fp32 at least, returned in the dtype of `x`."""
        body = self.width - self.width % self.block
        wide = x if x.dtype == torch.float64 else x.float()
        blocks = wide[..., :body].reshape(*x.shape[:-1], body // self.block, self.block)
        turned = _turn(blocks, self.odd).reshape(*x.shape[:-1], body)
        if body < self.width:
            turned = torch.cat([turned, _turn(wide[..., body:], self.odd_of_tail)], dim=-1)
        return turned.to(x.dtype)

    odd: Tensor | None
    odd_of_tail: Tensor | None


def _power_of_two_in(width: int) -> int:
    return max(width & -width, 1)


def _turn(x: Tensor, odd: Tensor | None) -> Tensor:
    """Rotate the last dimension by a Hartley matrix for its odd part and a Hadamard matrix for the rest."""
    width = x.shape[-1]
    power = _power_of_two_in(width)
    x = hadamard(x.reshape(*x.shape[:-1], width // power, power)) * power**-0.5
    if odd is not None:
        x = (x.transpose(-1, -2) @ odd.to(x.dtype)).transpose(-1, -2)
    return x.reshape(*x.shape[:-2], width)


class Rotation(nn.Module):
    """Features to features: scaled channel by channel, or balanced by a matrix that mixes as well, or mixed alone.

    `scale` [k] and `basis` [k, k] were fitted to inputs and belong into a checkpoint.
    """

    scale: Tensor | None
    basis: Tensor | None

    def __init__(self, mixing: Mixing, *, scale: Tensor | None = None, basis: Tensor | None = None) -> None:
        super().__init__()
        self.mixing = mixing
        self.register_buffer("scale", scale)
        self.register_buffer("basis", basis)

    def forward(self, x: Tensor) -> Tensor:
        """Turn inputs [..., k]."""
        if self.basis is not None:
            return torch.matmul(x, self.basis.to(x.dtype))
        turned: Tensor = self.mixing(x if self.scale is None else x * self.scale.to(x.dtype))
        return turned

    @torch.no_grad()
    def of_weight(self, weight: Tensor) -> Tensor:
        """Turn a weight [n, k] the other way, in fp64, so that products stay what they are."""
        wide = exact(weight)
        if self.basis is not None:
            solved: Tensor = torch.linalg.solve(exact(self.basis), wide.t())
            return solved.t()
        turned: Tensor = self.mixing(wide if self.scale is None else wide / exact(self.scale))
        return turned

    def matrix(self, like: Tensor) -> Tensor:
        """Return T [k, k] in fp64."""
        if self.basis is not None:
            return exact(self.basis)
        turned: Tensor = self.forward(torch.eye(self.mixing.width, dtype=torch.float64, device=like.device))
        return turned


@torch.no_grad()
def channel_scale(energy: Tensor, weight: Tensor) -> Tensor:
    """Return the powers of two nearest to (|w_k|^2 / E[x_k^2])^(1/4), to multiply features by; 1 where unknown."""
    columns = weight.float().square().sum(0)
    wanted = (columns / energy).log2() / 4
    usable = (energy > 0) & (columns > 0) & wanted.isfinite()
    if not bool(usable.any()):
        return torch.ones_like(energy)
    middle = wanted[usable].median()
    return torch.exp2(torch.where(usable, (wanted - middle).round().clamp(-_REACH, _REACH), 0.0))


@torch.no_grad()
def balanced_basis(covariance: Tensor, weight: Tensor, mixing: Mixing) -> Tensor | None:
    """Return T [k, k] in fp64 that makes both second moments the same diagonal, and mixes; None where that fails.

    `mixing` may be narrower than k: the directions with the largest sigma are then left as they are, at the end.
    """
    inputs, columns = exact(covariance), exact(weight).t() @ exact(weight)
    for moments in (inputs, columns):
        level = moments.diagonal().mean()
        if not bool(level > 0) or not bool(level.isfinite()):
            return None
        moments.diagonal().add_(_RIDGE * level)
    lower, failed = torch.linalg.cholesky_ex(inputs)
    if bool(failed):
        return None
    squares, vectors = torch.linalg.eigh(lower.t() @ columns @ lower)
    sigma = squares.clamp_min(squares[-1] * 1e-12).sqrt()
    basis = torch.linalg.solve_triangular(lower.t(), vectors, upper=True) * sigma.sqrt()
    mixed = torch.cat([mixing(basis[:, : mixing.width]), basis[:, mixing.width :]], dim=1)
    return mixed if bool(mixed.isfinite().all()) else None
