"""placement.json: where every expert goes under each method, how requests find their device, and where it came from.

A placement is untrusted input: loading checks every number, and that each expert of each layer is on some device,
before anything uses it. The same trace and settings make the same bytes but for `created`.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from loka import document
from loka.dispatch.placement.eplb import ExpertMaps, from_maps, to_maps
from loka.dispatch.placement.signature import Signature
from loka.errors import ArgumentError, PlanError, nearest

SCHEMA: Final[int] = 1
KIND: Final[str] = "loka-placement"
METHODS: Final[tuple[str, ...]] = ("linear", "eplb", "paper", "loka")
_MOST_CELLS: Final[int] = 2**28  # layers x devices x experts, one byte each when in use

Physical = tuple[tuple[tuple[int, ...], ...], ...]  # [layer][device] -> experts


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodPlacement:
    """One method's placement; without a signature, requests go to devices in turn."""

    physical_to_logical: Physical
    signature: Signature | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Placements of one model's experts by several methods. Raises PlanError for what cannot be one."""

    created: str
    devices: int
    nodes: int
    experts: int
    layers: tuple[int, ...]
    slack: float
    methods: Mapping[str, MethodPlacement]
    provenance: Mapping[str, str]  # trace (SHA-256), requests, model, loka
    settings: Mapping[str, float]
    hidden_size: int | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        if problem := self._problem():
            raise PlanError(f"The placement cannot be: {problem}.")

    def _problem(self) -> str | None:
        if self.devices < 1 or self.nodes < 1 or self.devices % self.nodes:
            return f"{self.devices} devices do not divide into {self.nodes} nodes"
        if len(self.layers) * self.devices * self.experts > _MOST_CELLS:
            return f"{len(self.layers)} layers, {self.devices} devices and {self.experts} experts are more than fit"
        if len(set(self.layers)) != len(self.layers) or not self.layers:
            return "its layers are none, or one appears twice"
        if self.slack > 1:
            return f"the slack of group sizes is {self.slack}, more than 1"
        if set(self.methods) != set(METHODS):
            return f"its methods are {', '.join(sorted(self.methods)) or 'none'}, not {', '.join(METHODS)}"
        for name, method in self.methods.items():
            if problem := self._method_problem(method):
                return f"{name}: {problem}"
        return None

    def _method_problem(self, method: MethodPlacement) -> str | None:
        physical = method.physical_to_logical
        if len(physical) != len(self.layers) or any(len(layer) != self.devices for layer in physical):
            return f"physical_to_logical is not [{len(self.layers)} layers][{self.devices} devices]"
        every = set(range(self.experts))
        for layer, held in zip(self.layers, physical, strict=True):
            if any(len(set(experts)) != len(experts) for experts in held):
                return f"a device of layer {layer} holds an expert twice"
            if set().union(*held) != every:
                wrong = sorted(set().union(*held) ^ every)[:3]
                return f"layer {layer} does not place the experts 0 to {self.experts - 1} ({wrong} differ)"
        return None if method.signature is None else self._signature_problem(method.signature)

    def _signature_problem(self, signature: Signature) -> str | None:
        layers, experts = len(self.layers), self.experts
        wanted = {
            "typical": (1, layers, experts),
            "share": (self.devices, layers, experts),
            "root": (self.devices, layers, experts),
            "constant": (1, 1, self.devices),
        }
        for name, shape in wanted.items():
            codes = getattr(signature, name)
            if codes is not None and codes.shape != shape:
                return f"{name} of its signature is {list(codes.shape)}, not {list(shape)}"
        if (signature.typical.values() < 0).any():
            return "a typical share of its signature is negative"
        return None

    def method(self, name: str) -> MethodPlacement:
        """Return one method's placement; raise ArgumentError when there is none of this name."""
        if name not in self.methods:
            raise ArgumentError(
                f"There is no placement by {name!r}; there is {', '.join(METHODS)}.{nearest(name, METHODS)}"
            )
        return self.methods[name]

    def hosts(self, name: str) -> np.ndarray:
        """Return which device holds which expert under a method, bool [layer, device, expert]."""
        hosts = np.zeros((len(self.layers), self.devices, self.experts), dtype=bool)
        for layer, held in enumerate(self.method(name).physical_to_logical):
            for device, experts in enumerate(held):
                hosts[layer, device, list(experts)] = True
        return hosts

    def maps(self, name: str) -> ExpertMaps:
        """Return a method's placement in EPLB's argument form."""
        return to_maps(self.hosts(name))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the placement as JSON; a reader never sees half of it."""
        head = {"kind": KIND, "schema": SCHEMA}
        document.write_atomically(path, document.compact(head | document.encode(self)) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Placement":
        """Read a placement; raise PlanError for anything that is not one."""
        return document.decode(cls, document.read(path, kind=KIND, schema=SCHEMA), str(path))


def physical_of(hosts: np.ndarray) -> Physical:
    """Return `hosts` [layer, device, expert] as experts per layer and device."""
    return tuple(tuple(tuple(np.flatnonzero(row).tolist()) for row in layer) for layer in hosts)


def physical_of_maps(physical_to_logical: np.ndarray, devices: int, experts: int) -> Physical:
    """Return EPLB's physical_to_logical [layer, slot] as experts per layer and device."""
    return physical_of(from_maps(physical_to_logical, devices, experts))
