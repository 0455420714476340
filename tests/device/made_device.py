"""A simulated accelerator: built from `simulated.cpp` once, made known to torch in a process of its own.

Its tensors refuse operands on the CPU, and it counts what makes the CPU wait for values. torch can have one such device
per process and never forgets it, so only what runs in processes of a test may `load` it.
"""

import fcntl
import hashlib
import subprocess
import types
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

NAME = "simulated"
_SOURCE = Path(__file__).with_name("simulated.cpp")


def build(folder: Path) -> Path:
    """Compile the device, unless another process has; return the library's path."""
    made_of = hashlib.sha256(_SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = folder / f"{NAME}-{made_of}.so"
    with library.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            made = library.with_suffix(".made")
            include = [f"-isystem{path}" for path in cpp_extension.include_paths()]
            link = [f"-L{path}" for path in cpp_extension.library_paths()]
            options = ["-std=c++20", "-O0", "-fPIC", "-shared", *include, *link, "-lc10", "-ltorch_cpu", "-ltorch"]
            command = [cpp_extension.get_cxx_compiler(), str(_SOURCE), *options, "-o", str(made)]
            subprocess.run(command, check=True)
            made.rename(library)
    return library


def load(library: Path) -> None:
    """Make the device known to torch as "simulated"."""
    torch.ops.load_library(library)
    torch.utils.rename_privateuse1_backend(NAME)
    module: Any = types.ModuleType(f"torch.{NAME}")
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module._lazy_init = lambda: None
    module.synchronize = module.manual_seed_all = lambda *_: None
    module.get_rng_state = lambda *_: torch.get_rng_state()
    module.set_rng_state = lambda state, *_: torch.set_rng_state(state)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    torch._register_device_module(NAME, module)
    waits()


def waits() -> Counter[str]:
    """Return what made the CPU wait for the device since this was asked last."""
    return Counter(torch.ops.simulated.take_waits())
