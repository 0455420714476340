"""What a bug report needs: versions, devices and effective settings, as plain data."""

import os
import platform
from importlib import metadata
from typing import Final

import torch

from loka.hardware import current_device, device_info
from loka.version import VERSION

# Packages whose presence or version changes what LoKA can do.
_PACKAGES: Final[tuple[str, ...]] = (
    "triton",
    "numpy",
    "scipy",
    "sqlalchemy",
    "torchao",
    "transformer-engine",
    "fbgemm-gpu-genai",
    "deep-gemm",
    "mslk",
    "transformers",
)

# Variables of the environment that LoKA reads.
_SETTINGS: Final[tuple[str, ...]] = ("LOKA_TUNING", "XDG_CACHE_HOME", "TRITON_INTERPRET")


def environment_facts() -> dict[str, str]:
    """Return versions, devices and settings, by name, in the order they are shown."""
    facts = {"loka": VERSION, "python": platform.python_version(), "platform": platform.platform()}
    facts["torch"] = str(torch.__version__)  # with its build, which the packages of PyPI do not name
    for package in _PACKAGES:
        facts[package] = _version(package)
    facts["device"] = str(device_info(current_device()))
    facts["cuda"] = torch.version.cuda or "not in this build"
    facts["float32 matmul precision"] = torch.get_float32_matmul_precision()
    facts["torch threads"] = str(torch.get_num_threads())
    facts.update({name: os.environ.get(name, "not set") for name in _SETTINGS})
    return facts


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
