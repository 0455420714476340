"""Modules that call their activation instead of holding it, in the ways that people write that."""

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import functional
from torch.nn.functional import silu


def swish(x):
    return x * torch.sigmoid(x)


def logged(method):
    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        self.calls = getattr(self, "calls", 0) + 1
        return method(self, *args, **kwargs)

    return wrapper


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.gate = nn.Sigmoid()


class Called(Base):
    def forward(self, x):
        return F.silu(self.fc(x))


class ByFullName(Base):
    def forward(self, x):
        return torch.nn.functional.silu(input=self.fc(x), inplace=False)


class ByOwnName(Base):
    def forward(self, x):
        return silu(functional.silu(self.fc(x)))


class InLambda(Base):
    def forward(self, x):
        return (lambda value: F.silu(value))(self.fc(x))


class InOtherMethod(Base):
    def forward(self, x):
        return self.inner(self.fc(x))

    @staticmethod
    def inner(x):
        return F.silu(x)


class OfTheUser(Base):
    def forward(self, x):
        return swish(self.fc(x))


class Decorated(Base):
    @logged
    def forward(self, x):
        """A text of its own."""
        return F.silu(self.fc(x))


class Product(Base):
    def forward(self, x):
        x = self.fc(x)
        return x * torch.sigmoid(x)


class Reversed(Base):
    def forward(self, x):
        x = self.fc(x)
        return x.sigmoid() * x


class WithFunction(Base):
    def forward(self, x):
        x = self.fc(x)
        return torch.mul(self.gate(x), x)


class InPlace(Base):
    def forward(self, x):
        x = self.fc(x)
        y = x + 0
        y *= torch.sigmoid(y)
        return y


class WithVariable(Base):
    def forward(self, x):
        x = self.fc(x)
        gate = torch.sigmoid(x)
        return gate * x


SWISHES = (
    *(Called, ByFullName, InLambda, InOtherMethod, OfTheUser, Decorated),
    *(Product, Reversed, WithFunction, WithVariable, InPlace),
)


class NormGate(Base):
    def forward(self, x):
        x = self.fc(x)
        return x * torch.sigmoid(self.norm(x))


class NormGateInSteps(Base):
    def forward(self, x):
        x = self.fc(x)
        normal = self.norm(x)
        gate = self.gate(normal)
        return gate * x


class GatedLinear(Base):
    """A sigmoid that gates something else."""

    def forward(self, x):
        return self.fc(x) * torch.sigmoid(self.norm(x))


class GateUsedTwice(Base):
    def forward(self, x):
        x = self.fc(x)
        gate = torch.sigmoid(x)
        return x * gate + gate


class GateOfTheOldValue(Base):
    """What the gate was made of is not what it multiplies any more."""

    def forward(self, x):
        gate = torch.sigmoid(x)
        x = self.fc(x)
        return x * gate


class GateFromALoop(Base):
    def forward(self, x):
        gate = torch.sigmoid(x)
        for _ in range(2):
            y = x * gate
            x = self.fc(x)
        return y


class LearnedSlope(Base):
    def forward(self, x):
        return x * torch.sigmoid(self.norm.weight[0] * x)


class CallsAModule(nn.Module):
    """`self.silu(x)` is a module, not F.silu."""

    def __init__(self):
        super().__init__()
        self.silu = nn.Identity()

    def forward(self, x):
        return self.silu(x)


class LocalName(nn.Module):
    """`silu` is a variable here, not the function of the same name."""

    def forward(self, x, silu=torch.tanh):
        return silu(x)


OTHERS = (GatedLinear, GateUsedTwice, GateOfTheOldValue, GateFromALoop, LearnedSlope, CallsAModule, LocalName)


class DataDependent(Base):
    def forward(self, x, scale=None):
        x = self.fc(x)
        if x.sum() > 0 and scale is None:
            return F.silu(x)
        return F.silu(x) * (2 if self.training else 3)


class Derived(Called):
    def forward(self, x):
        return super().forward(x) + 1


class Replacing(Called):
    """Hides what it inherits and never goes back to it."""

    def forward(self, x):
        return F.silu(self.fc(x)) + 1


class Relus(Base):
    def forward(self, x):
        a, b = self.fc(x), self.fc(-x)
        c = F.relu(a, inplace=True)
        d = torch.relu(b) + b.relu()
        return a + c + d


class ReluSquares(Base):
    """Squares of ReLU already, in four ways; one ReLU is not."""

    def forward(self, x):
        x = self.fc(x)
        y = F.relu(x)
        return F.relu(x) ** 2 + torch.relu(x).square() + torch.square(x.relu()) + y * y + F.relu(x)
