"""Third-party libraries, imported when they are needed; a missing one is an error that names what to install."""

import importlib
from typing import Any

from loka.errors import LokaError


def library(module: str, extra: str, who: str) -> Any:
    """Return a module of a library; raise LokaError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = (error.name or module).partition(".")[0]
        raise LokaError(
            f"{who} needs {module.partition('.')[0]}, which cannot be imported here (missing: {missing}). Install it "
            f"with LoKA's extra {extra!r}, `pip install '.[{extra}]'` in its checkout."
        ) from error
