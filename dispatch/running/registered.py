"""A module that is registered in two places has two names: a plan knows it by the first, Dynamo by the one it came by.

Which names are of one parameter is in no graph. While a backend is called Dynamo still holds what its sources start
from, and the module behind one tells.
"""

import re
from typing import Any, Final

from torch import nn

from loka.naming import clean_fqn

# A local or a global variable; of what else a source may start from, nothing is known.
_VARIABLE: Final = re.compile(r"([LG])\['([^']+)'\]")


def first_names(root: str, prefix: str) -> dict[str, str]:
    """Return, by each name that a parameter has below a source, the first that it has below `prefix` there.

    Nothing where no code is being compiled, or the source is no variable that holds a module.
    """
    module = _module(root)
    if module is None:
        return {}
    modules = {clean_fqn(name): each for name, each in module.named_modules(remove_duplicate=False)}
    planned = modules.get(prefix)
    if planned is None:
        return {}
    first = {id(value): clean_fqn(name) for name, value in planned.named_parameters()}
    every = module.named_parameters(remove_duplicate=False)
    return {clean_fqn(name): first[id(value)] for name, value in every if id(value) in first}


def _module(source: str) -> nn.Module | None:
    """Return the module that a variable of the code that is being compiled holds."""
    from torch._dynamo.symbolic_convert import tls  # only where something is compiled: importing it takes seconds

    found = _VARIABLE.fullmatch(source)
    compiling: Any = getattr(tls, "current_tx", None)
    if found is None or compiling is None:
        return None
    scope = compiling.output.local_scope if found[1] == "L" else compiling.output.global_scope
    value = scope.get(found[2])
    return value if isinstance(value, nn.Module) else None
