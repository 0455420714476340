"""The scope in which products are seen: eager execution, no planned kernel, the stack of running modules, the mode."""

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from loka.probes.capturing.capture import Capture
from loka.stepping_aside import stepping_aside


@contextmanager
def capture_scope(capture: Capture) -> Iterator[None]:
    """Show the capture every product that this thread runs inside."""
    with ExitStack() as scope:
        if "torch._dynamo" in sys.modules:  # otherwise nothing has been compiled, and importing it would take seconds
            scope.enter_context(torch.compiler.set_stance("force_eager"))
            scope.enter_context(_without_hook_warnings(capture.sites.model))
        scope.enter_context(_module_stack(capture))
        scope.enter_context(_separate_attention())
        scope.enter_context(stepping_aside())
        if capture.sources is not None:
            scope.enter_context(capture.sources)
        scope.enter_context(capture)
        yield


@contextmanager
def _module_stack(capture: Capture) -> Iterator[None]:
    """Watch which module runs; global hooks, removed with the scope, so that no module is touched."""
    thread, sites = threading.get_ident(), capture.sites

    def enter(module: nn.Module, args: Any) -> None:
        if threading.get_ident() == thread:
            sites.enter(module)
            capture.entered(module, args)
            if capture.sources is not None:
                capture.sources.entered(module, args)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            sites.leave(module)
            capture.left(module, output)
            if capture.sources is not None:
                capture.sources.left(module, output, outermost=not sites.inside_module)

    handles = (
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave, always_call=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        sites.leave_all()
        if capture.sources is not None:
            capture.probe_s += capture.sources.owed_s()


@contextmanager
def _separate_attention() -> Iterator[None]:
    """Keep `nn.MultiheadAttention` from its fused inference path, which hides the projections."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _without_hook_warnings(model: nn.Module) -> Iterator[None]:
    """Compiled submodules warn of global hooks; ours are meant."""
    if not any(isinstance(getattr(module, "_orig_mod", None), nn.Module) for module in model.modules()):
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using `torch.compile\\(module\\)` when there are global hooks")
        yield
