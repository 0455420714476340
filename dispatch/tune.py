"""Find the fastest launch of our GEMM for the shapes of a run, by measuring: `loka bench --tune`.

One thing at a time is varied, the tile first, then warps and stages, then how k is split, then the order of tiles; a
launch replaces the one before it only where it is faster by more than the spread of both. Every product that is done
is saved at once, so that a run that is stopped is taken up where it was. A launch that does not compile or does not
fit the device is left out.

With a process group, rank 0 measures, and all ranks get what it found, byte for byte.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from loka import document
from loka.dispatch.draws import draw_operands
from loka.dispatch.shapes import Shape
from loka.errors import ArgumentError, KernelError, PlanError
from loka.formats import PASS_OPERANDS, RECIPES
from loka.kernel_registry.spec import GemmRequest
from loka.kernel_registry.triton import gemm
from loka.kernel_registry.triton.tuned import (
    Provenance,
    TunedLaunch,
    Tuning,
    bucket,
    launches_here,
    read_tuning,
    tuning_path,
)
from loka.probes.distributions.gather import gather_bytes
from loka.quantize import quantize
from loka.timing import Candidate, Measurement, Progress, faster, in_turns, measure

logger = logging.getLogger("loka.dispatch")

# A recipe for each way in which the inner loop of the kernel differs: scales over all of k, over 128, over 32 of it.
_RECIPE_OF_GROUP: Final[dict[int, str]] = {0: "rowwise", 128: "blockwise", 32: "mxfp8"}
# Before compute capability 10.0 MX products run at the speed of bf16 (see `gemm`): nothing is tuned for that.
_MX_CAPABILITY: Final[tuple[int, int]] = (10, 0)
# What is varied, in this order.
_TILES: Final[tuple[tuple[int, int], ...]] = tuple(
    (m, n) for m in (16, 32, 64, 128) for n in (16, 32, 64, 128, 256) if m * n <= 128 * 256
)
_PIPELINES: Final[tuple[tuple[int, int], ...]] = tuple(
    (warps, stages) for warps in (4, 8) for stages in (2, 3, 4, 5, 6)
)
_SPLITS: Final[tuple[int, ...]] = (1, 2, 4, 8, 16)
_GROUPS_OF_ROWS: Final[tuple[int, ...]] = (1, 4, 8, 16)
# Shared memory that a program can have where the device does not say: that of compute capability 9.0.
_SHARED_BYTES: Final[int] = 227 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class _Setting:
    """One way to launch the kernel."""

    launch: gemm.Launch
    splits: int

    def __str__(self) -> str:
        each = self.launch
        return f"{each.block_m}x{each.block_n} {each.num_warps}w {each.num_stages}s /{self.splits} g{each.group_m}"


@dataclass(frozen=True, slots=True)
class _Product:
    """What is tuned: a kind of scales, and a shape whose m is at the end of its bucket."""

    group_k: int
    request: GemmRequest

    def __str__(self) -> str:
        return f"{_RECIPE_OF_GROUP[self.group_k]} {self.request}"

    @property
    def key(self) -> tuple[int, int, int, int]:
        return self.group_k, self.request.m, self.request.n, self.request.k


def tune(
    shapes: Iterable[Shape],
    device: torch.device | str,
    *,
    budget_s: float,
    path: Path | None = None,
    on_progress: Progress | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tuning:
    """Measure launches for every shape that has none yet, within about `budget_s` seconds; return all there are.

    They are saved at `path`, by default where the kernels of this device look for them. A file there that is damaged
    or of another device, version or source raises PlanError: it is never overwritten. In a process group all ranks
    have to call this; what rank 0 found is returned on all of them.
    """
    device = torch.device(device)
    path = path or tuning_path(device)
    if path is None:
        raise ArgumentError("Tuning is switched off by LOKA_TUNING=off. Unset it, or name a file to tune into.")
    if group is None:
        found = _tune(list(shapes), device, budget_s, path, on_progress)
    else:
        found = _tune_together(list(shapes), device, budget_s, path, on_progress, group)
    launches_here.cache_clear()
    return found


def _tune(
    shapes: list[Shape], device: torch.device, budget_s: float, path: Path, on_progress: Progress | None
) -> Tuning:
    present = Provenance.here(device)
    tuning = _resumed(path, present)
    done = {launch.key for launch in tuning.launches}
    wanted = [product for product in _products(shapes, present) if product.key not in done]
    for turn in in_turns(wanted, budget_s, "products left untuned", str, on_progress):
        launch = _fastest(turn.item, device, turn.share_s)
        if launch is not None:
            tuning = tuning.with_launch(launch)
            tuning.save(path)
    return tuning


def _resumed(path: Path, present: Provenance) -> Tuning:
    """Return the tuning that is there already, else an empty one; raise PlanError rather than replace a foreign one."""
    if not path.is_file():
        return Tuning(provenance=present, created=datetime.now(UTC).isoformat(timespec="seconds"), launches=())
    found = read_tuning(path, present)
    if found is None:
        there = Tuning.load(path)  # damaged files raise here, with what is wrong
        raise PlanError(
            f"{path} holds a tuning that does not hold here: {there.provenance.differs(present)}. Move it away, or "
            "name another file with LOKA_TUNING."
        )
    return found


def _products(shapes: Iterable[Shape], present: Provenance) -> Iterator[_Product]:
    """Yield what to tune, each once: the linear products, m rounded up to its bucket, under every kind of scales."""
    groups = [0, 128]
    if (present.device.capability or (0, 0)) >= _MX_CAPABILITY:
        groups.append(32)
    seen = set()
    for shape in shapes:
        if shape.request.op != "linear":
            continue
        request = replace(shape.request, m=bucket(shape.request.m), product="fprop", site="")
        for group_k in groups:
            product = _Product(group_k, request)
            if product.key not in seen:
                seen.add(product.key)
                yield product


def _fastest(product: _Product, device: torch.device, budget_s: float) -> TunedLaunch | None:
    """Measure one product; None, and a line in the log, where not even the untuned launch runs."""
    request = product.request
    operands = _codes(product, device)
    launch, splits = gemm.choose(request.m, request.n, request.k, product.group_k, device)
    best = default = _Setting(launch=launch, splits=splits)
    times: dict[str, Measurement] = {}
    rounds = _rounds(product, device)
    for vary in rounds:
        contest = _runnable([best, *vary(best)], operands)
        if str(best) not in contest:
            logger.warning("%s left untuned: its untuned launch does not run", request)
            return None
        times = measure(contest, device=device, budget_s=budget_s / len(rounds), inputs=len(operands))
        best = _winner(best, vary(best), times)
    if best == default:
        default_us = times[str(best)].median_us
    else:
        final = _runnable([default, best], operands)
        times = measure(final, device=device, budget_s=budget_s / len(rounds), inputs=len(operands))
        default_us = times[str(default)].median_us
        if not faster(times[str(best)], times[str(default)]):
            best = default  # small steps, each within the noise of the last, must not add up to a wrong turn
    return TunedLaunch(
        group_k=product.group_k,
        m=request.m,
        n=request.n,
        k=request.k,
        block_m=best.launch.block_m,
        block_n=best.launch.block_n,
        group_m=best.launch.group_m,
        num_warps=best.launch.num_warps,
        num_stages=best.launch.num_stages,
        splits=best.splits,
        median_us=times[str(best)].median_us,
        spread_us=times[str(best)].spread_us,
        default_us=default_us,
    )


_Vary = Callable[[_Setting], list[_Setting]]


def _rounds(product: _Product, device: torch.device) -> list[_Vary]:
    """Return what to vary, one after the other: from a setting to those that differ from it in one respect."""
    m, k = product.request.m, product.request.k
    blocks = -(-k // gemm.TILE_K)

    def vary(of: Callable[[_Setting], list[_Setting]]) -> _Vary:
        return lambda best: [each for each in of(best) if each != best and _fits(each, product, device)]

    def tiles(best: _Setting) -> list[_Setting]:
        sizes = [(bm, bn) for bm, bn in _TILES if bm <= max(16, m)]
        return [replace(best, launch=replace(best.launch, block_m=bm, block_n=bn)) for bm, bn in sizes]

    def pipelines(best: _Setting) -> list[_Setting]:
        return [replace(best, launch=replace(best.launch, num_warps=w, num_stages=s)) for w, s in _PIPELINES]

    def splits(best: _Setting) -> list[_Setting]:
        return [replace(best, splits=parts) for parts in _SPLITS if parts <= blocks]

    def orders(best: _Setting) -> list[_Setting]:
        return [replace(best, launch=replace(best.launch, group_m=rows)) for rows in _GROUPS_OF_ROWS]

    return [vary(tiles), vary(pipelines), vary(splits), vary(orders)]


def _fits(setting: _Setting, product: _Product, device: torch.device) -> bool:
    """Whether a tile's operands, as often as there are stages, fit the device's shared memory."""
    launch = setting.launch
    one = (launch.block_m + launch.block_n) * gemm.TILE_K * (3 if product.group_k == 32 else 1)  # MX: once more in bf16
    return launch.num_stages * one <= _shared_bytes(device)


def _shared_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return _SHARED_BYTES
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", _SHARED_BYTES))


_Codes = tuple[Tensor, Tensor, Tensor, Tensor]


def _codes(product: _Product, device: torch.device) -> list[_Codes]:
    """Draw operands and quantise them, as many as leave the cache cold."""
    recipe = RECIPES[_RECIPE_OF_GROUP[product.group_k]]
    roles = PASS_OPERANDS["fprop"]
    result = []
    for pair in draw_operands(product.request, torch.bfloat16, device).pairs:
        (a, a_scale), (b, b_scale) = (quantize(x, recipe.operand(role)) for x, role in zip(pair, roles, strict=True))
        result.append((a, b, a_scale, b_scale))
    return result


def _runnable(settings: list[_Setting], operands: list[_Codes]) -> dict[str, Candidate]:
    """Return the settings that run, compiled and ready to be timed."""
    found: dict[str, Candidate] = {}
    for setting in settings:
        call = partial(_call, setting, operands)
        try:
            call(0)
            if operands[0][0].is_cuda:
                torch.cuda.synchronize()
        except KernelError:
            raise
        except Exception as error:  # noqa: BLE001 - a launch that does not compile or fit fails in Triton's own ways
            logger.info("launch %s left out: %s: %s", setting, type(error).__name__, error)
            continue
        found[str(setting)] = call
    return found


def _call(setting: _Setting, operands: list[_Codes], index: int) -> Tensor:
    out: Tensor = gemm.launched(*operands[index], torch.bfloat16, setting.launch, setting.splits)
    return out


def _winner(best: _Setting, others: list[_Setting], times: dict[str, Measurement]) -> _Setting:
    """Return the fastest, the one at hand where nothing is faster than it by more than the spread."""
    quickest = min((each for each in others if str(each) in times), key=lambda e: times[str(e)].median_us, default=best)
    return quickest if faster(times[str(quickest)], times[str(best)]) else best


def _tune_together(
    shapes: list[Shape],
    device: torch.device,
    budget_s: float,
    path: Path,
    on_progress: Progress | None,
    group: dist.ProcessGroup,
) -> Tuning:
    """Tune on rank 0 and send the file to every rank, which saves it where its own kernels look for it."""
    leads = dist.get_rank(group) == 0
    found, failure = b"", None
    if leads:
        try:
            found = _tune(shapes, device, budget_s, path, on_progress).text().encode()
        except BaseException as error:  # noqa: BLE001 - raised below, once the other ranks know and do not wait for ever
            failure = error
    received = gather_bytes(found, group)[0]
    if failure is not None:
        raise failure
    if not received:
        raise PlanError("Tuning failed on rank 0; its own message says why. Nothing was tuned on this rank.")
    if not leads:
        # Ranks of one host write the same bytes to the same place, each at once or not at all.
        path.parent.mkdir(parents=True, exist_ok=True)
        document.write_atomically(path, received.decode())
    return Tuning.load(path)
