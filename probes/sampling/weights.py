"""Whether the weights moved: only while they stand still are the steps of a run exchangeable.

A parameter counts its in-place writes. Writes through `.data` escape the counter, so the numbers of every weight
operand that was a whole parameter are compared as well.
"""

import math
from collections.abc import Mapping

from torch import Tensor, nn

from loka.formats import Pass
from loka.probes.records import ProductRecord, StepRecord


class WeightWatch:
    """Compares a model's parameters between sampled steps; `changed` stays true once they differed."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.changed = False
        self._elements = {name: math.prod(shape) for name, shape in shapes.items()}
        self._versions: dict[str, int] = {}
        self._numbers: dict[tuple[str, Pass, str], tuple[float, float]] = {}

    def begin(self, model: nn.Module) -> None:
        """Read the write counters as a sampled step begins."""
        for name, parameter in model.named_parameters():
            version = _version(parameter)
            self.changed |= self._versions.setdefault(name, version) != version

    def saw(self, step: StepRecord) -> None:
        """Compare the weight operands that the step has measured."""
        for product in step.products:
            for operand in product.operands:
                if operand.role == "weight" and self._is_whole(product, operand.elements):
                    key = (product.parameter, product.product, product.dtype)
                    numbers = (operand.amax, operand.rms)
                    self.changed |= self._numbers.setdefault(key, numbers) != numbers

    def _is_whole(self, product: ProductRecord, elements: int) -> bool:
        """Whether the operand was the whole parameter: parts of one, such as its experts, differ from each other."""
        return self._elements.get(product.parameter) == elements


def _version(parameter: Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version
