"""The registry: which kernels exist, in one instance that tests can build their own of.

Nothing registers itself by being imported. `default_registry()` is the built-in table (`builtin.py`) plus what
third parties declare under the entry-point group `loka.kernels`: a callable without arguments, or an iterable, that
yields `KernelSpec`s. A plugin that fails to load does not stop anybody: it becomes a row with its reason.
"""

import functools
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib import metadata
from typing import Final, cast

from loka.errors import KernelError, nearest
from loka.hardware import DeviceInfo
from loka.kernel_registry.builtin import KERNELS
from loka.kernel_registry.spec import GemmRequest, KernelSpec, Op

logger = logging.getLogger("loka.kernel_registry")

ENTRY_POINT_GROUP: Final[str] = "loka.kernels"


class Registry:
    """Kernels by name, each with the owner who added it."""

    def __init__(self) -> None:
        self._specs: dict[str, KernelSpec] = {}
        self._owners: dict[str, str] = {}
        self._candidates: dict[Op, tuple[KernelSpec, ...]] = {}
        self._unavailable: dict[tuple[str, DeviceInfo], str | None] = {}
        self._failed: dict[tuple[str, DeviceInfo, GemmRequest], str] = {}

    def add(self, spec: KernelSpec, *, owner: str) -> None:
        """Add one kernel; raise KernelError when the name is taken."""
        if spec.name in self._specs:
            raise KernelError(
                f"{owner} adds the kernel {spec.name!r}, which {self._owners[spec.name]} has added already. "
                "Kernel names are unique: give one of the two another name."
            )
        self._specs[spec.name] = spec
        self._owners[spec.name] = owner
        self._candidates.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._specs

    def __len__(self) -> int:
        return len(self._specs)

    def names(self) -> tuple[str, ...]:
        """Return every kernel's name, sorted."""
        return tuple(sorted(self._specs))

    def get(self, name: str) -> KernelSpec:
        """Return the kernel of this name; raise KernelError naming the nearest known ones."""
        if name not in self._specs:
            raise KernelError(
                f"There is no kernel {name!r} among the {len(self._specs)} known.{nearest(name, self._specs)} "
                "`loka kernels` lists all of them."
            )
        return self._specs[name]

    def owner(self, name: str) -> str:
        """Return who added a kernel."""
        return self._owners[self.get(name).name]

    def candidates(self, op: Op) -> tuple[KernelSpec, ...]:
        """Return the low-precision kernels of an op, by name: an order that does not depend on who was added first."""
        if op not in self._candidates:
            found = (spec for spec in self._specs.values() if spec.op == op and spec.recipe is not None)
            self._candidates[op] = tuple(sorted(found, key=lambda spec: spec.name))
        return self._candidates[op]

    def low_precision(self) -> tuple[KernelSpec, ...]:
        """Return the low-precision kernels of all ops, by name."""
        return tuple(self._specs[name] for name in self.names() if self._specs[name].recipe is not None)

    def baseline(self, request: GemmRequest) -> KernelSpec:
        """Return the high-precision kernel of a product: the first one added that can serve it.

        A baseline computes what the model computes without LoKA, so a third party's comes after the built-in ones.
        Raises KernelError when no kernel serves the product at all.
        """
        for spec in self._specs.values():
            if spec.is_baseline and spec.cannot(request) is None:
                return spec
        raise KernelError(
            f"No high-precision kernel serves {request}. Every product needs one to fall back to: "
            f"register a kernel for {request.op} with recipe None."
        )

    def rivals(self, request: GemmRequest, device: DeviceInfo) -> tuple[KernelSpec, ...]:
        """Return the baselines that run a layer in one kernel on `device`, beside the first one: it may be slower."""
        first = self.baseline(request)
        return tuple(
            spec
            for spec in self._specs.values()
            if spec.is_baseline and spec.fused and spec is not first
            if self.cannot(spec, request, device) is None and self.unavailable(spec, device) is None
        )

    def unavailable(self, spec: KernelSpec, device: DeviceInfo) -> str | None:
        """Return why a kernel cannot run on `device`, or None; asked once per kernel and device, then remembered."""
        key = (spec.name, device)
        if key not in self._unavailable:
            self._unavailable[key] = spec.unavailable(device)
        return self._unavailable[key]

    def cannot(self, spec: KernelSpec, request: GemmRequest, device: DeviceInfo) -> str | None:
        """Return why a kernel cannot serve a product on `device`: its row says so, or it was tried and failed."""
        failed = self._failed.get((spec.name, device, _nameless(request))) if self._failed else None
        return failed or spec.cannot(request)

    def servable(self, request: GemmRequest, device: DeviceInfo, *, op: Op | None = None) -> tuple[KernelSpec, ...]:
        """Return the low-precision kernels that serve a product on `device`; of another `op` where one is given."""
        return tuple(
            spec
            for spec in self.candidates(op or request.op)
            if self.unavailable(spec, device) is None and self.cannot(spec, request, device) is None
        )

    def failed(self, name: str, request: GemmRequest, device: DeviceInfo, error: BaseException) -> None:
        """Remember that a kernel raised on a product of this shape, so that nothing chooses it there again."""
        reason = f"failed on this shape when it was tried: {_in_words(error)}"
        self._failed[self.get(name).name, device, _nameless(request)] = reason

    def quarantine(self, name: str, device: DeviceInfo, error: BaseException) -> None:
        """Take a kernel that raised in the middle of a step out of use on `device`, for the rest of this process."""
        self._unavailable[self.get(name).name, device] = f"quarantined, it failed in use: {_in_words(error)}"

    def listing(self, device: DeviceInfo) -> tuple[tuple[KernelSpec, str | None], ...]:
        """Return every kernel by name, with why it cannot run on `device`, or None where it can."""
        return tuple((self._specs[name], self.unavailable(self._specs[name], device)) for name in self.names())

    def load_plugins(self) -> None:
        """Add the kernels of every installed entry point of the group `loka.kernels`."""
        points = metadata.entry_points(group=ENTRY_POINT_GROUP)
        for point in sorted(points, key=lambda point: (point.name, point.value)):
            self._load_plugin(point)

    def _load_plugin(self, point: metadata.EntryPoint) -> None:
        owner = f"plugin {point.name!r} ({point.value})"
        try:
            # The one place where any exception is caught: this is foreign code, and its failure is a row, not a crash.
            for spec in self._checked(point.load(), owner):
                self.add(spec, owner=owner)
        except Exception as error:  # noqa: BLE001 - foreign code may fail in any way; its row says how
            reason = f"{owner} failed to load: {type(error).__name__}: {error}"
            logger.warning("%s", reason)
            self._add_defect(point.name, reason, owner)

    def _checked(self, loaded: object, owner: str) -> list[KernelSpec]:
        """Return a plugin's specs, all of them or, by raising, none."""
        made = cast(Callable[[], object], loaded)() if callable(loaded) else loaded
        specs = list(cast(Iterable[object], made))
        for spec in specs:
            if not isinstance(spec, KernelSpec):
                raise KernelError(f"it yields a {type(spec).__name__}; an entry point of the group yields KernelSpecs")
            if spec.name in self._specs:
                raise KernelError(f"the kernel {spec.name!r} is already there, from {self._owners[spec.name]}")
        names = [spec.name for spec in specs if isinstance(spec, KernelSpec)]
        if len(set(names)) < len(names):
            raise KernelError(f"it yields a kernel twice: {', '.join(sorted(names))}")
        return [spec for spec in specs if isinstance(spec, KernelSpec)]

    def _add_defect(self, plugin: str, reason: str, owner: str) -> None:
        name = f"plugin.{plugin}"
        while name in self._specs:
            name += "+"
        row = KernelSpec(name=name, op="other", recipe=None, implementation="none:none", defect=reason)
        self.add(row, owner=owner)


def _nameless(request: GemmRequest) -> GemmRequest:
    """Return the same product of no site in particular: a failure belongs to a shape."""
    return replace(request, site="")


def _in_words(error: BaseException) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


@functools.cache
def default_registry() -> Registry:
    """Return the registry of this process: the built-in kernels and every installed plugin's."""
    registry = Registry()
    for spec in KERNELS:
        registry.add(spec, owner="loka")
    registry.load_plugins()
    return registry
