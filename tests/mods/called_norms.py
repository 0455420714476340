"""Norms that are called, and norms of one's own, as libraries and users write them."""

import torch
import torch.nn.functional as F
from torch import nn


class OwnRms(nn.Module):
    def __init__(self, features, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.variance_epsilon = eps

    def forward(self, x):
        kept = x.dtype
        x = x.to(torch.float32)
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(kept)


class RmsAroundOne(OwnRms):
    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon) * (1 + self.weight)


class OwnLayerNorm(nn.Module):
    def __init__(self, features, eps=1e-3):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.eps = eps

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return self.gamma * centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + self.eps) + self.beta


class InFloat(nn.LayerNorm):
    def forward(self, input):
        return super().forward(input.float()).to(input.dtype)


class Scale(nn.Module):
    """A weight per feature, and no norm."""

    def __init__(self, features):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x):
        return x * self.weight


class EpsOutside(OwnRms):
    """Something near a norm that is none."""

    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True).sqrt() + 0.1) * self.weight


class OverTheBatch(OwnRms):
    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(0, keepdim=True) + self.variance_epsilon) * self.weight


class ChannelsFirst(nn.LayerNorm):
    """[..., features, positions]"""

    def forward(self, input):
        return F.layer_norm(input.mT, self.normalized_shape, self.weight, self.bias, self.eps).mT


class Called(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.fc = nn.Linear(features, features)
        self.scale, self.shift = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.used = nn.Parameter(torch.ones(features))

    def forward(self, x):
        x = F.layer_norm(self.fc(x), (x.shape[-1],), weight=self.scale, bias=self.shift, eps=1e-4)
        return F.silu(F.rms_norm(x, x.shape[-1:], self.used, 1e-3)) * self.used


class Bare(nn.Module):
    def forward(self, x):
        return F.rms_norm(x, (x.size(-1),))


class OverTwo(nn.Module):
    def forward(self, x):
        return F.layer_norm(x, x.shape[-2:])


class ToldInRunning(nn.Module):
    def forward(self, x, shape):
        return F.layer_norm(x, shape)
