"""The experts of transformers' models, in the one form that a plan reaches in each of its families.

    model.set_experts_implementation(loka.register_experts())

transformers runs the experts of a layer as its configuration says: as a grouped product, as batched products of the
weights gathered for every token, as a loop. A plan decides on grouped products, and "grouped_mm" makes them of every
family, transposed, biased and interleaved ones included. "loka" is that, under a name that says what it is there for.
"""

import importlib
from typing import Any, Final

from torch import Tensor, nn

from loka.errors import ArgumentError

NAME: Final[str] = "loka"
_GROUPED: Final[str] = "grouped_mm"


def register_experts() -> str:
    """Register "loka" with transformers' experts interface; returns the name, to be handed to the model.

    Give it to `model.set_experts_implementation` or `from_pretrained(experts_implementation=...)` before the model is
    probed. The numbers are those of "grouped_mm"; what `convert` or `backend="loka"` then runs is the plan's. Calling
    it again changes nothing. Raises ArgumentError where transformers has no such interface.
    """
    functions = _interface()
    grouped = functions[_GROUPED]

    def experts(self: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Run hidden [tokens, features] through the experts index [tokens, k], weighed by weights [tokens, k]."""
        out: Tensor = grouped(self, hidden, index, weights)
        return out

    if NAME not in functions:
        functions.register(NAME, experts)
    return NAME


def _interface() -> Any:
    try:
        functions = importlib.import_module("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS
    except (ImportError, AttributeError) as error:
        raise ArgumentError(
            f"loka.register_experts() needs the experts interface of transformers, which is not here ({error}). "
            "Install transformers 5 or newer. Models of older ones keep a module per expert: a plan reaches those as "
            "they are."
        ) from error
    if _GROUPED not in functions:
        raise ArgumentError(
            f"transformers has no experts implementation {_GROUPED!r}, only {', '.join(sorted(functions))}. Install "
            "transformers 5 or newer."
        )
    return functions
