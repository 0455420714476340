"""How a plan gets its times, and which sites it may change."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Self, TypedDict

import torch

from loka.dispatch.measuring.profile import DeviceProfile
from loka.hardware import DeviceInfo, chosen_device, device_info
from loka.timing import Progress

DEFAULT_BUDGET_S: Final[float] = 30.0

# Which sites may leave high precision: patterns (names, globs, `re:`), or a function of the site's name.
Filter = str | Iterable[str] | Callable[[str], bool]


class PlanArguments(TypedDict, total=False):
    """The keywords of `loka.plan` that everything which plans takes: where to, and how it gets its times. See there."""

    device: torch.device | str | None
    device_profile: str | os.PathLike[str] | DeviceProfile | None
    assume_speedup: float | None
    measure: bool
    budget_s: float
    on_progress: Progress | None
    filter: Filter | None
    by_rows: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """How a plan gets its times, and which sites may change."""

    device: torch.device
    profile: DeviceProfile | None = None
    assume_speedup: float | None = None
    measure: bool = True
    budget_s: float = DEFAULT_BUDGET_S
    on_progress: Progress | None = None
    filter: Filter | None = None
    by_rows: bool = True

    @classmethod
    def of(  # noqa: PLR0913 - one keyword per setting
        cls,
        *,
        device: torch.device | str | None = None,
        device_profile: str | os.PathLike[str] | DeviceProfile | None = None,
        assume_speedup: float | None = None,
        measure: bool = True,
        budget_s: float = DEFAULT_BUDGET_S,
        on_progress: Progress | None = None,
        filter: Filter | None = None,
        by_rows: bool = True,
    ) -> Self:
        """Return the options that these arguments stand for; raise PlanError for a file that is no profile."""
        profile = device_profile
        if profile is not None and not isinstance(profile, DeviceProfile):
            profile = DeviceProfile.load(profile)
        return cls(
            device=chosen_device(device if profile is None else None),  # a profile is of a device elsewhere
            profile=profile,
            assume_speedup=assume_speedup,
            measure=measure,
            budget_s=budget_s,
            on_progress=on_progress,
            filter=filter,
            by_rows=by_rows,
        )

    @property
    def info(self) -> DeviceInfo:
        """The device planned for."""
        return self.profile.device if self.profile is not None else device_info(self.device)

    @property
    def measures(self) -> bool:
        """Whether missing times are measured: not for another device, and not where speed is assumed anyway."""
        return self.measure and self.profile is None and self.assume_speedup is None
