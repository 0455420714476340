"""Facts about the device: what it is called, what it can do. Nothing here touches CUDA until it is asked."""

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from loka.errors import ArgumentError

# Compute capabilities from which on a device has what is named. Sources: PTX ISA (`mma` and `cvt.rn.satfinite` with
# e4m3 and e5m2: 8.9; `cvt` of both from fp32 without a way through fp16, and `cp.async.bulk.tensor`: 9.0; `tcgen05.mma`
# with one E8M0 scale per 32 elements: 10.0), and what torch._scaled_mm checks.
FP8_CAPABILITY: Final[tuple[int, int]] = (8, 9)  # Ada: tensor cores that multiply FP8
HOPPER_CAPABILITY: Final[tuple[int, int]] = (9, 0)  # TMA, wgmma, and the cast from fp32 to FP8 in one instruction
BLACKWELL_CAPABILITY: Final[tuple[int, int]] = (10, 0)  # MX scales in hardware
# Shared memory that one program can have, in KiB. Source: CUDA C++ Programming Guide, technical specifications per
# compute capability, "Maximum amount of shared memory per thread block".
_SHARED_KIB: Final[dict[tuple[int, int], int]] = {
    (8, 0): 163,
    (8, 6): 99,
    (8, 7): 163,
    (8, 9): 99,
    (9, 0): 227,
    (10, 0): 227,
    (10, 3): 227,
    (11, 0): 227,
    (12, 0): 99,
    (12, 1): 99,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceInfo:
    """One device, as far as kernels and plans need to know it."""

    type: str  # "cpu" or "cuda"
    name: str
    capability: tuple[int, int] | None = None  # CUDA compute capability; None on a CPU and on ROCm

    def __str__(self) -> str:
        """Return e.g. `cpu (AMD EPYC 9R14)` or `cuda (NVIDIA H200, sm_90)`."""
        detail = f", sm_{self.capability[0]}{self.capability[1]}" if self.capability else ""
        return f"{self.type} ({self.name}{detail})"


def device_info(device: torch.device | str = "cpu") -> DeviceInfo:
    """Describe a torch device."""
    device = torch.device(device)
    if device.type == "cuda":
        # ROCm calls itself cuda, and its gfx version looks like a compute capability: gfx942 reads (9, 4).
        capability = torch.cuda.get_device_capability(device) if torch.version.hip is None else None
        return DeviceInfo(type="cuda", name=torch.cuda.get_device_name(device), capability=capability)
    return DeviceInfo(type=device.type, name=_cpu_name())


def has_capability(device: torch.device | str, least: tuple[int, int]) -> bool:
    """Whether a device has this CUDA compute capability or a later one; not a CPU, and not ROCm."""
    return (device_info(device).capability or (0, 0)) >= least


def shared_bytes(info: DeviceInfo) -> int:
    """Return the shared memory that one program can have; where that is not known, what every device with FP8 has."""
    least = min(_SHARED_KIB.values())
    return 1024 * (_SHARED_KIB.get(info.capability, least) if info.capability else least)


def current_device() -> torch.device:
    """Return where a model would run by default: the current CUDA device, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def chosen_device(device: torch.device | str | None) -> torch.device:
    """Return the device that somebody names, by default the current one; raise ArgumentError where it is not here."""
    if device is None:
        return current_device()
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # the second where torch has no CUDA
        reason = str(error).strip().splitlines()[0]
        raise ArgumentError(
            f"The device {str(device)!r} cannot be used here: {reason}. Name one that this machine has, such as cpu or "
            "cuda:0; a plan for a device elsewhere takes its times from a device profile."
        ) from error
    return found


def multiplies_bf16(device_type: str) -> bool:
    """Whether products of bf16 matrices have units of their own there and are summed in fp32 throughout.

    On a CPU that is AVX-512-BF16 or AMX, through oneDNN. CUDA is not meant: it may add partial sums in bf16
    (`torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction`).
    """
    available = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]  # torch does not annotate it
    return device_type == "cpu" and available and torch.cpu._is_avx512_bf16_supported()


def cache_bytes(device: torch.device | str = "cpu") -> int:
    """Return the size of the last cache before memory, in bytes: what inputs have to exceed to be read cold."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return max(_cpu_cache_sizes(), default=_UNKNOWN_CACHE)


# Where the system does not say: as large as the caches that common servers give to one core complex.
_UNKNOWN_CACHE: Final[int] = 32 * 2**20
_SUFFIXES: Final[dict[str, int]] = {"K": 2**10, "M": 2**20, "G": 2**30}


def _cpu_cache_sizes(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> list[int]:
    """Return the sizes of one core's caches, as Linux states them (e.g. `32768K`)."""
    sizes = []
    for entry in root.glob("index*/size"):
        try:
            text = entry.read_text(encoding="ascii").strip()
            sizes.append(int(text.rstrip("KMG")) * _SUFFIXES.get(text[-1:], 1))
        except (OSError, ValueError):
            continue  # one unreadable level; the others still say something
    return sizes


def _cpu_name() -> str:
    """Return the processor's model name, as Linux states it, else what Python knows."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
