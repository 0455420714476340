"""`loka bench`: every available kernel on the shapes of a probed run, or of a named suite, as timings and a profile."""

import os
from collections.abc import Sequence

import torch

from loka.dispatch.measure import Progress, measure_products
from loka.dispatch.profile import DeviceProfile, newest
from loka.dispatch.shapes import shapes_of
from loka.dispatch.verify import Verification, verify
from loka.errors import KernelError
from loka.formats import PASSES, Pass
from loka.hardware import current_device, device_info
from loka.kernel_registry.registry import default_registry
from loka.probes.database import open_database, read_learned, read_timings, write_timings
from loka.probes.evidence import ProductEvidence, RunEvidence, collect_evidence
from loka.probes.records import Environment, RunInfo, RunProgress, Timing
from loka.version import VERSION
from loka.workloads.suites import suite


def bench_database(
    db: str | os.PathLike[str], device: torch.device | str | None, budget_s: float, on_progress: Progress | None = None
) -> tuple[Timing, ...]:
    """Measure what a database's newest run needs and does not have yet; the times are kept in it.

    Returns all its times for this device. Raises DatabaseError, EvidenceError.
    """
    where = current_device() if device is None else torch.device(device)
    engine = open_database(db, create=False)
    try:
        evidence = collect_evidence(engine)
        known = read_timings(engine, str(device_info(where)))
        measured = measure_products(
            evidence,
            default_registry(),
            where,
            budget_s=budget_s,
            known=known,
            learned=read_learned(engine),
            on_progress=on_progress,
        )
        if measured:
            write_timings(engine, measured)
    finally:
        engine.dispose()
    return (*known, *measured)


def bench_suite(
    name: str, device: torch.device | str | None, budget_s: float, on_progress: Progress | None = None
) -> tuple[Timing, ...]:
    """Measure a named suite of shapes in all three passes, in bf16 on CUDA and fp32 on a CPU."""
    where = current_device() if device is None else torch.device(device)
    evidence = suite_evidence(suite(name), _dtype(where))
    return tuple(measure_products(evidence, default_registry(), where, budget_s=budget_s, on_progress=on_progress))


def verify_database(
    db: str | os.PathLike[str], device: torch.device | str | None, on_progress: Progress | None = None
) -> list[Verification]:
    """Compare every kernel available here with its definition on the products of a database's newest run."""
    engine = open_database(db, create=False)
    try:
        shapes = shapes_of(collect_evidence(engine).products, read_learned(engine))
    finally:
        engine.dispose()
    return verify(shapes, default_registry(), current_device() if device is None else device, on_progress)


def verify_suite(
    name: str, device: torch.device | str | None, on_progress: Progress | None = None
) -> list[Verification]:
    """Do the same on a named suite of shapes, on N(0, 1)."""
    where = current_device() if device is None else torch.device(device)
    shapes = shapes_of(suite_evidence(suite(name), _dtype(where)).products)
    return verify(shapes, default_registry(), where, on_progress)


def profile_of(timings: Sequence[Timing], label: str, device: torch.device | str | None) -> DeviceProfile:
    """Bundle the times of this device into a profile that plans can be made from elsewhere."""
    info = device_info(current_device() if device is None else device)
    if not timings:
        raise KernelError(
            f"Nothing was timed on {info}: no FP8 kernel serves these shapes here, or the budget was too small. "
            "See `loka kernels`, or give a larger --budget."
        )
    return DeviceProfile(
        label=label,
        source="measured",
        device=info,
        environment={"torch": torch.__version__, "loka": VERSION},
        times=tuple(newest(timings)),
    )


def suite_evidence(shapes: Sequence[tuple[int, int, int]], dtype: str) -> RunEvidence:
    """Write a suite's shapes down as the products of a run, without any error: enough to be timed."""
    products = tuple(_product(shape, product, dtype) for shape in shapes for product in PASSES)
    return RunEvidence(
        info=RunInfo(
            id="suite",
            created="",
            environment=Environment(device="", torch=torch.__version__, python="", loka=VERSION),
            model="suite",
            fingerprint={},
            every=1,
            overhead_budget=1.0,
            recipes=(),
        ),
        progress=RunProgress(
            steps=0,
            sampled_steps=0,
            skipped_samples=0,
            wall_s=0.0,
            probe_s=0.0,
            unattributed=0,
            weights_changed=False,
            status="complete",
        ),
        events=(),
        confidence=0.95,
        family=0,
        products=products,
    )


def _dtype(device: torch.device) -> str:
    return "bfloat16" if device.type == "cuda" else "float32"


def _product(shape: tuple[int, int, int], product: Pass, dtype: str) -> ProductEvidence:
    rows, reduction, columns = shape
    m, n, k = {
        "fprop": (rows, columns, reduction),
        "dgrad": (rows, reduction, columns),
        "wgrad": (columns, reduction, rows),
    }[product]
    return ProductEvidence(
        site=f"{rows}x{reduction}x{columns}",
        product=product,
        op="mm",
        batch=1,
        m=m,
        m_min=m,
        m_max=m,
        n=n,
        k=k,
        calls=1.0,
        dtype=dtype,
        parameter="",
        flops=2.0 * m * n * k,
        flop_share=0.0,
        operands={},
        recipes=(),
    )
