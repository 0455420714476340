"""Fully qualified names as users know them: without what wrappers put in between.

`torch.compile`, FSDP and activation-checkpoint wrappers insert their own attribute names into every FQN, and a
`DistributedDataParallel` root puts `module.` in front. A name must read the same before and after wrapping, so that a
plan made from one fits the other.
"""

from typing import Final

from torch import nn

_WRAPPER_PARTS: Final[frozenset[str]] = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def clean_fqn(name: str) -> str:
    """Return the FQN without the components that `torch.compile`, FSDP and checkpoint wrappers insert."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


# In a class that a conversion makes: the class that it was made of.
BASE_CLASS: Final[str] = "_loka_base"


def class_of(module: nn.Module) -> type:
    """Return a module's class, of a converted one the class that it had before."""
    made = type(module)
    base: type = vars(made).get(BASE_CLASS, made)
    return base


def class_name(module: nn.Module) -> str:
    """Return the name of `class_of`."""
    return class_of(module).__name__


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's own root module behind compile, DistributedDataParallel and DataParallel wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model
