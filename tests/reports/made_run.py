"""Runs and decisions made by hand, for tests that render them."""

import math

from loka.dispatch.deciding.decide import Candidate, Decision
from loka.kernel_registry.spec import GemmRequest
from loka.probes.judging.evidence import ErrorInterval, ProductEvidence, RecipeEvidence, RunEvidence
from loka.probes.records import Environment, Event, OperandRecord, RunInfo, RunProgress

NAN, INF = math.nan, math.inf
HOSTILE = "</script><script>alert(1)</script>"


def recipe(name, upper, *, mean=None, low=None, samples=12, horizon=None, gate="row_error", note=""):
    mean = 0.9 * upper if mean is None else mean
    return RecipeEvidence(
        recipe=name,
        format="e5m2/e4m3" if name == "tensorwise" else "e4m3",
        samples=samples,
        gate=gate,
        error=ErrorInterval(
            mean=mean,
            low=0.95 * mean if low is None else low,
            high=1.05 * mean,
            p99=1.5 * mean,
            upper_tolerance=upper,
        ),
        relative_error=0.5 * mean,
        sqnr_db=31.25,
        mere=2.0 * mean,
        horizon=horizon,
        note=note,
    )


def operand(role, **changes):
    fields = {
        "role": role,
        "amax": 3.5,
        "rms": 0.75,
        "zeros": 0.25,
        "nan": 0,
        "inf": 0,
        "elements": 4096,
        "underflow": {"tensorwise": 0.125, "rowwise": 0.0625},
        "saturation": {"tensorwise": 0.0, "rowwise": 0.0},
    }
    return OperandRecord(**{**fields, **changes})


SAFE = (recipe("tensorwise", 0.06, low=0.04), recipe("rowwise", 0.03))
UNSAFE = (recipe("tensorwise", 0.3), recipe("rowwise", 0.2))
UNDECIDED = (recipe("tensorwise", 0.3), recipe("rowwise", NAN, mean=0.03, samples=5, note="5 of 8 sampled steps"))


def product(site="up", **changes):
    fields = {
        "site": site,
        "product": "fprop",
        "op": "addmm",
        "batch": 1,
        "m": 2048,
        "m_min": 2048,
        "m_max": 2048,
        "n": 768,
        "k": 256,
        "calls": 2.0,
        "dtype": "bfloat16",
        "parameter": f"{site}.weight",
        "flops": 1.6e9,
        "flop_share": 0.25,
        "operands": {"input": operand("input"), "weight": operand("weight", amax=0.5)},
        "recipes": SAFE,
    }
    return ProductEvidence(**{**fields, **changes})


def run(*products, events=(), confidence=0.95, **progress):
    totals = {
        "steps": 2000,
        "sampled_steps": 20,
        "skipped_samples": 0,
        "wall_s": 101.0,
        "probe_s": 1.0,
        "unattributed": 0,
        "weights_changed": True,
        "status": "complete",
    }
    return RunEvidence(
        info=RunInfo(
            id="0123456789abcdef",
            created="2026-01-02T03:04:05Z",
            environment=Environment(device="cpu (test)", torch="2.13.0", python="3.11.7", loka="0.1.0"),
            model="Wukong",
            fingerprint={},
            every=100,
            overhead_budget=0.01,
            recipes=("tensorwise", "rowwise"),
        ),
        progress=RunProgress(**{**totals, **progress}),
        events=tuple(events),
        confidence=confidence,
        family=max(1, sum(len(each.recipes) for each in products)),
        products=products,
    )


def decision(made, *, kernel="torch.mm", name=None, time_us=10.0, baseline_us=10.0, rejected=(), source="measured"):
    return Decision(
        request=GemmRequest(
            site=made.site, product=made.product, op="linear", m=made.m, n=made.n, k=made.k, dtype=made.dtype
        ),
        m_min=made.m_min,
        m_max=made.m_max,
        kernel=kernel,
        recipe=name,
        why="because it is the fastest",
        baseline="torch.mm",
        baseline_time_us=baseline_us,
        time_us=time_us,
        time_source=source,
        error_upper=0.03 if name else None,
        horizon=None,
        rejected=tuple(rejected),
    )


def candidate(kernel, code, *, name="rowwise", time_us=None, reason="a reason"):
    return Candidate(kernel=kernel, recipe=name, code=code, reason=reason, time_us=time_us)


def mixed():
    """Return a run with every verdict and its decisions: one gain, one baseline, one not decided."""
    safe = product("blocks.0.up", flop_share=0.5, flops=3.2e9)
    unsafe = product("blocks.0.down", product="dgrad", flop_share=0.2, recipes=UNSAFE, batch=4, m_min=1024)
    undecided = product("head", n=1, flop_share=0.3, recipes=UNDECIDED)
    decisions = {
        ("blocks.0.up", "fprop"): decision(
            safe,
            kernel="torch.scaled_mm.rowwise",
            name="rowwise",
            time_us=8.0,
            baseline_us=12.0,
            rejected=(
                candidate("triton.gemm.rowwise", "slower", time_us=9.0),
                candidate("triton.gemm.tensorwise", "undecided", name="tensorwise"),
                candidate("torch.mm", "slower", name=None, time_us=12.0),
            ),
        ),
        ("blocks.0.down", "dgrad"): decision(
            unsafe, rejected=(candidate("torch.scaled_mm.rowwise", "over_bound", time_us=7.0),)
        ),
    }
    events = (Event(step=300, kind="over_budget", message="sampling every 200 steps from here"),)
    return run(safe, unsafe, undecided, events=events), decisions


def many(sites, kernels):
    """Return a run of `sites` sites, three passes each, and decisions with `kernels` candidates each."""
    kinds = (SAFE + SAFE, UNSAFE + UNSAFE, UNDECIDED + UNDECIDED)
    products, decisions = [], {}
    for site in range(sites):
        for index, name in enumerate(("fprop", "dgrad", "wgrad")):
            scale = 1.0 + 1e-4 * (3 * site + index)
            recipes = tuple(
                recipe(label, scale * each.error.upper_tolerance, mean=scale * each.error.mean, note=each.note)
                for label, each in zip(
                    ("tensorwise", "rowwise", "blockwise", "mxfp8"), kinds[(site + index) % 3], strict=True
                )
            )
            made = product(
                f"model.layers.{site // 7}.mlp.experts.{site % 7}.up_projection",
                product=name,
                recipes=recipes,
                flop_share=1 / (3 * sites),
                operands={role: operand(role, amax=3.5 * scale, rms=scale) for role in ("input", "weight")},
            )
            products.append(made)
            rejected = [
                candidate(
                    f"library{number}.gemm.rowwise",
                    "slower",
                    time_us=9.0 * scale + number,
                    reason=f"{9 * scale + number:.4g} us, 1.5 us ({10 * scale:.3g} %) slower than library.gemm",
                )
                for number in range(kernels)
            ]
            decisions[made.site, name] = decision(made, rejected=rejected, time_us=8.0 * scale, baseline_us=12.0)
    return run(*products), decisions
