"""A probe database of a large model, written by the probe's own writer: what `benchmarks.report_page` reads.

Every site is a linear layer, of a model in training in three passes, of one that serves in one: ten sampled steps past
the first hundred, each with the operands and the errors of four recipes; what was learned of every product; times of
the kernels that run here. The numbers are made up, with the spread that real ones have; no two sites are alike.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from loka.formats import DEFAULT_RECIPES, PASS_OPERANDS, PASSES, Pass
from loka.hardware import DeviceInfo, current_device, device_info
from loka.kernel_registry.registry import default_registry
from loka.kernel_registry.spec import GemmRequest
from loka.numerics import ProductError, decibels
from loka.probes.distributions.closed_form import ProductStatistics
from loka.probes.distributions.gather import packed
from loka.probes.records import (
    Environment,
    LearnedRecord,
    OperandRecord,
    ProductRecord,
    RunInfo,
    RunProgress,
    StepRecord,
    Timing,
)
from loka.probes.sampling.learning import STATISTICS
from loka.probes.storing.database import open_database, write_timings
from loka.probes.storing.writer import RunWriter

STEPS: Final[int] = 10
_CREATED: Final[str] = "2026-01-01T00:00:00+00:00"
_ROWS: Final[int] = 2048
_WIDTHS: Final[tuple[int, ...]] = (512, 1024, 2048)
# Of the mean error of a recipe, and what one site and one step add: standard deviations of the logarithm.
_ERRORS: Final[dict[str, float]] = {"tensorwise": 0.041, "rowwise": 0.037, "blockwise": 0.035, "mxfp8": 0.036}
_OF_SITES, _OF_STEPS = 0.15, 0.01
_WAIT_S: Final[float] = 600.0


def write_database(path: Path, sites: int, passes: Sequence[Pass] = PASSES) -> None:
    """Write the run of a model with so many sites, in training where there is a backward pass."""
    generator = random.Random(0)
    products = list(_products(sites, passes, generator))
    trained = len(passes) > 1
    writer = RunWriter(path, _info(products), capacity=STEPS * len(products))
    for count in range(1, STEPS + 1):
        step = 100 + 100 * count
        writer.write(
            StepRecord(step=step, products=tuple(_sampled(*each, generator) for each in products)),
            _progress(count, "running", trained),
        )
    for product in passes:
        writer.learned(_learned(product, [each for each, _ in products if each["product"] == product]), final=True)
    writer.finish(_progress(STEPS, "complete", trained), timeout=_WAIT_S)
    if writer.failure is not None or writer.dropped:
        raise RuntimeError(writer.failure or "the writer left steps out")
    engine = open_database(path, create=True)
    write_timings(engine, _timings(products, generator))
    engine.dispose()


def _device() -> DeviceInfo:
    return device_info(current_device())


def _products(
    sites: int, passes: Sequence[Pass], generator: random.Random
) -> Iterator[tuple[dict[str, Any], dict[str, float]]]:
    """Yield what is the same of a product in every step, and the mean error of each recipe there."""
    for at in range(sites):
        site = f"layers.{at // 8}.block.{at % 8}.linear"
        n, k = generator.choice(_WIDTHS), generator.choice(_WIDTHS)
        shapes = {"fprop": (_ROWS, n, k), "dgrad": (_ROWS, k, n), "wgrad": (n, k, _ROWS)}
        for product in passes:
            m, columns, reduction = shapes[product]
            shape = {"batch": 1, "m": m, "n": columns, "k": reduction, "calls": 1}
            names = {"site": site, "product": product, "op": "addmm", "parameter": f"{site}.weight"}
            of_site = generator.gauss(0, _OF_SITES)
            errors = {name: _ERRORS[name] * float(np.exp(of_site)) for name in DEFAULT_RECIPES}
            yield {**names, **shape, "dtype": "bfloat16"}, errors


def _info(products: list[tuple[dict[str, Any], dict[str, float]]]) -> RunInfo:
    forward = [each for each, _ in products if each["product"] == "fprop"]
    return RunInfo(
        created=_CREATED,
        environment=Environment(device=str(_device()), torch=torch.__version__, python="3", loka="0"),
        model="Large",
        fingerprint={each["parameter"]: (each["n"], each["k"]) for each in forward},
        every=100,
        overhead_budget=0.01,
        recipes=DEFAULT_RECIPES,
    )


def _progress(sampled: int, status: Any, trained: bool) -> RunProgress:
    return RunProgress(
        **{"steps": 100 * (sampled + 1), "sampled_steps": sampled, "skipped_samples": 0, "wall_s": 100.0},
        **{"probe_s": 0.5, "unattributed": 0, "weights_changed": trained, "status": status},
    )


def _sampled(known: dict[str, Any], errors: dict[str, float], generator: random.Random) -> ProductRecord:
    operands = tuple(
        OperandRecord(
            **{"role": role, "amax": generator.lognormvariate(0, 1), "rms": generator.lognormvariate(-2, 0.5)},
            **{"zeros": generator.random() / 10, "nan": 0, "inf": 0, "elements": known["m"] * known["k"]},
            underflow={name: generator.random() / 100 for name in DEFAULT_RECIPES},
            saturation=dict.fromkeys(DEFAULT_RECIPES, 0.0),
        )
        for role in PASS_OPERANDS[known["product"]]
    )
    found = {name: _error(mean * generator.lognormvariate(0, _OF_STEPS)) for name, mean in errors.items()}
    return ProductRecord(**known, operands=operands, errors=found, alignment=1.0)


def _error(value: float) -> ProductError:
    return ProductError(
        **{"row_error": value, "row_error_p99": 1.3 * value, "relative_error": 0.95 * value, "mere": 3 * value},
        **{"sqnr_db": decibels(0.95 * value), "rows": 64, "zero_rows": 0, "bad_rows": 0, "bias": 1e-4 * value},
    )


def _learned(product: Pass, sites: list[dict[str, Any]]) -> Iterator[LearnedRecord]:
    """Yield the statistics of every site: those of normal values, each bin of energy changed at random."""
    torch.manual_seed(0)
    random_numbers = np.random.default_rng(0)
    arrays = ProductStatistics.of(torch.randn(64, 512), torch.randn(256, 512), product).arrays()
    for each in sites:
        changed = dict(arrays)
        for part in ("a", "b"):
            energy = arrays[f"{part}.energy"] * random_numbers.lognormal(0, 1.0, arrays[f"{part}.energy"].shape)
            phase = random_numbers.random(arrays[f"{part}.phase"].shape)
            changed[f"{part}.energy"] = energy
            changed[f"{part}.phase"] = phase * (energy.sum(axis=1) / phase.sum(axis=1))[:, None]
        yield LearnedRecord(
            **{"site": each["site"], "product": product, "kind": STATISTICS, "samples": 4, "step": 1000},
            data=packed(changed),
        )


def _timings(products: list[tuple[dict[str, Any], dict[str, float]]], generator: random.Random) -> Iterator[Timing]:
    """Yield a time of every kernel that runs here on every shape, passes together included."""
    registry, device = default_registry(), _device()
    requests = {
        (each["product"], each["m"], each["n"], each["k"]): GemmRequest(
            **{name: each[name] for name in ("site", "product", "m", "n", "k", "dtype")}, op="linear"
        )
        for each, _ in products
    }
    for key in sorted(requests):
        request = requests[key]
        baseline = registry.baseline(request)
        specs = (*registry.candidates("linear"), *registry.candidates("linear_layer"))
        able = [spec for spec in specs if registry.unavailable(spec, device) is None and spec.cannot(request) is None]
        for spec in (baseline, *able):
            yield Timing(
                **{"kernel": spec.name, "product": request.product, "batch": 1, "dtype": request.dtype},
                **{"m": request.m, "n": request.n, "k": request.k, "device": str(device), "spread_us": 1.0},
                median_us=100.0 if spec is baseline else generator.uniform(60, 140),
                **{"repetitions": 9, "values": "learned", "created": _CREATED},
            )
