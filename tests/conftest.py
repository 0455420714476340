"""What every test shares: seeds, one thread, and a check that nothing is left behind in torch's global state."""

import gc
import importlib.util
import os
import random
import sys
from collections.abc import Iterator
from importlib import metadata

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch.utils import _python_dispatch

CI = bool(os.environ.get("CI"))
GLOBAL_HOOKS = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
)


# The interpreters that CUDA builds of torch 2.11 to 2.13 bring, 3.6 and 3.7, know no numpy 2.4, or no dot_scaled.
OLDEST_INTERPRETER = (3, 9)


def _can_interpret() -> bool:
    try:
        major, minor, *_ = metadata.version("triton").split(".")
    except metadata.PackageNotFoundError:
        return False
    return (int(major), int(minor)) >= OLDEST_INTERPRETER


def _interpret_triton() -> None:
    """Without a GPU, have our Triton kernels run by Triton's interpreter.

    Triton wants that said before it is imported, so it is imported here. It remembers; the environment is left as a
    user's is, and so the registry offers these kernels on a CPU to a test no more than to a user.
    """
    if "TRITON_INTERPRET" in os.environ or torch.cuda.is_available() or not _can_interpret():
        return
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("triton.language")
    importlib.import_module("triton.knobs").runtime.interpret = True
    del os.environ["TRITON_INTERPRET"]


_interpret_triton()

settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("dev", deadline=None)
settings.load_profile("ci" if CI else "dev")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Keep what is imported and collected, a million objects that all stay, out of every search for garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # extension modules that end with objects alive complain


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        needed = [name for mark in item.iter_markers("third_party") for name in mark.args]
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        # CI installs all of them: there a missing one has to fail, or the test would be lost without a word.
        if missing and not CI:
            item.add_marker(pytest.mark.skip(reason=f"{', '.join(missing)} not installed: see requirements/"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests measured (`record_property`), so that a number can be watched long before it fails."""
    reports = [report for report in terminalreporter.getreports("passed") if report.user_properties]
    for report in reports:
        for name, value in report.user_properties:
            terminalreporter.write_line(f"MEASURED {name}: {value}")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if "loka.dispatch.running.routing" in sys.modules:  # every test is told decisions anew, as every process is
        sys.modules["loka.dispatch.running.routing"]._told.clear()


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves torch's global state changed, and restore it, so that only that test fails."""
    autograd = {name: getattr(torch.autograd, name) for name in ("backward", "grad")}
    function_modes = torch._C._len_torch_function_stack()
    yield
    left = []
    while torch._C._len_torch_dispatch_stack():
        left.append(f"the dispatch mode {_python_dispatch._pop_mode()!r} is on the stack")
    if torch._C._len_torch_function_stack() != function_modes:
        left.append("a function mode, or a default device, is set")
        torch.set_default_device(None)
    for name, original in autograd.items():
        if getattr(torch.autograd, name) is not original:
            left.append(f"torch.autograd.{name} is patched")
            setattr(torch.autograd, name, original)
    for name in GLOBAL_HOOKS:
        hooks = getattr(torch.nn.modules.module, name)
        if hooks:
            left.append(f"{name} is not empty")
            hooks.clear()
    left += _left_in_dynamo()
    assert not left, "; ".join(left)


def _left_in_dynamo() -> list[str]:
    """Say whether the compile stance is changed; forget compiled code, whose recompile limit is shared by all tests."""
    if "torch._dynamo.eval_frame" not in sys.modules:
        return []
    stance = sys.modules["torch._dynamo.eval_frame"]._stance.stance
    torch.compiler.set_stance("default")
    torch._dynamo.reset()
    return [] if stance == "default" else [f"the compile stance is {stance!r}"]
