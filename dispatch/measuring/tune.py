"""Find the fastest launches of our kernels for the shapes of a run, by measuring: `loka bench --tune`.

One thing at a time is varied, as `launches` lists it for each kernel: the tile first, then warps and stages, then what
else the kernel has. A launch replaces the one before it only where it is faster by more than the spread of both. What
is done is saved at once, so that a run that is stopped is taken up where it was. A launch that does not compile or does
not fit the device is left out.

With a process group, rank 0 measures, and all ranks get what it found, byte for byte.
"""

import logging
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from loka import document
from loka.dispatch.measuring.shapes import Shape
from loka.dispatch.measuring.tune_keys import Call, calls_of, keys_of
from loka.errors import ArgumentError, KernelError, PlanError
from loka.hardware import device_info, shared_bytes
from loka.kernel_registry.triton.gemm import program_count
from loka.kernel_registry.triton.launch import Key, Launch
from loka.kernel_registry.triton.launches import TUNABLES
from loka.kernel_registry.triton.tuned import (
    Provenance,
    TunedLaunch,
    Tuning,
    forced,
    launches_here,
    read_tuning,
    tuning_path,
    why_not,
)
from loka.probes.distributions.gather import gather_bytes
from loka.timing import Candidate, Measurement, Progress, faster, in_turns, measure

logger = logging.getLogger("loka.dispatch")


def tune(
    shapes: Iterable[Shape],
    device: torch.device | str,
    *,
    budget_s: float,
    path: Path | None = None,
    on_progress: Progress | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tuning:
    """Measure launches of all kernels for the shapes that have none yet, within about `budget_s` seconds.

    Returns all there are. They are saved at `path`, by default where the kernels of this device look for them. A file
    there that is damaged or of another device, version or source raises PlanError: it is never overwritten. In a
    process group all ranks have to call this; what rank 0 found is returned on all of them.
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
    wanted = [key for key in keys_of(shapes, present.device) if key not in done]
    for turn in in_turns(wanted, budget_s, "launches left untuned", _words, on_progress):
        launch = _fastest(turn.item, device, turn.share_s)
        if launch is not None:
            tuning = tuning.with_launch(launch)
            tuning.save(path)
    return tuning


def _words(key: Key) -> str:
    batch = f"{key.batch}x" if key.batch > 1 else ""
    kind = " ".join(part for part in (key.kernel, key.recipe, key.variant) if part)
    return f"{kind} {batch}{key.m}x{key.k}x{key.n} {key.dtype}"


def _resumed(path: Path, present: Provenance) -> Tuning:
    """Return the tuning that is there already, else an empty one; raise PlanError rather than replace a foreign one."""
    if not path.is_file():
        return Tuning(provenance=present, created=datetime.now(UTC).isoformat(timespec="seconds"), launches=())
    found = read_tuning(path, present)
    if found is None:
        there = Tuning.load(path)  # damaged files raise here, with what is wrong
        raise PlanError(
            f"{path} holds a tuning that does not hold here: {why_not(there, present)}. Move it away, or "
            "name another file with LOKA_TUNING."
        )
    return found


def _fastest(key: Key, device: torch.device, budget_s: float) -> TunedLaunch | None:
    """Measure the launches of one key; None, and a line in the log, where not even the untuned one runs."""
    kernel = TUNABLES[key.kernel]
    shared = shared_bytes(device_info(device))
    try:
        calls = calls_of(key, device)
    except (KernelError, torch.OutOfMemoryError) as error:
        logger.warning("%s left untuned: %s", _words(key), error)
        return None
    share_s = budget_s / (len(kernel.rounds) + 1)
    best = default = kernel.untuned(key, program_count(device))
    times: dict[Launch, Measurement] = {}
    for number in range(len(kernel.rounds)):
        others = kernel.tried(key, best, number, shared)
        times = _times(key, [best, *others], calls, device, share_s)
        if best not in times:
            logger.warning("%s left untuned: its untuned launch does not run", _words(key))
            return None
        best = _winner(best, others, times)
    if best == default:
        default_us = times[default].median_us
    else:
        times = _times(key, [default, best], calls, device, share_s)
        default_us = times[default].median_us
        if not faster(times[best], times[default]):
            best = default  # small steps, each within the noise of the last, must not add up to a wrong turn
    return TunedLaunch(
        **key._asdict(),
        launch=best,
        median_us=times[best].median_us,
        spread_us=times[best].spread_us,
        default_us=default_us,
    )


def _times(
    key: Key, launches: list[Launch], calls: list[Call], device: torch.device, budget_s: float
) -> dict[Launch, Measurement]:
    """Measure the launches that run against each other."""
    contest = _runnable(key, launches, calls, device)
    if not contest:
        return {}
    measured = measure(
        {str(launch): call for launch, call in contest.items()}, device=device, budget_s=budget_s, inputs=len(calls)
    )
    return {launch: measured[str(launch)] for launch in contest}


def _runnable(key: Key, launches: list[Launch], calls: list[Call], device: torch.device) -> dict[Launch, Candidate]:
    """Return the launches that run, compiled and ready to be timed."""
    found: dict[Launch, Candidate] = {}
    for launch in launches:
        try:
            with forced(key.kernel, launch) as state:
                calls[0]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as error:  # noqa: BLE001 - a launch that does not compile or fit fails in Triton's own ways
            logger.info("launch %s left out: %s: %s", launch, type(error).__name__, error)
            continue
        if state.keys != {key}:
            logger.warning("%s runs under other keys, %s, which it would not serve", _words(key), state.keys)
            return {}
        found[launch] = partial(_call, key.kernel, launch, calls)
    return found


def _call(kernel: str, launch: Launch, calls: list[Call], index: int) -> object:
    with forced(kernel, launch):
        return calls[index]()


def _winner(best: Launch, others: list[Launch], times: dict[Launch, Measurement]) -> Launch:
    """Return the fastest, the one at hand where nothing is faster than it by more than the spread."""
    quickest = min((each for each in others if each in times), key=lambda each: times[each].median_us, default=best)
    return quickest if faster(times[quickest], times[best]) else best


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
