"""Every reader of a file that may come from elsewhere, with originals to spoil and all that is done with what it reads.

`read` returns what the file says, as text, after it has asked of the result what its users ask, and has checked that
what was read is written and read again as the same. Whatever is wrong with a file has to be a LokaError.
"""

import json
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import loka
from loka.bounds import Bound
from loka.dispatch.deciding.plan import Plan
from loka.dispatch.measuring.profile import DeviceProfile, TimeTable
from loka.dispatch.placement.evaluate import evaluate
from loka.dispatch.placement.options import PlaceOptions
from loka.dispatch.placement.place import place
from loka.dispatch.placement.record import METHODS, Placement
from loka.errors import ArgumentError
from loka.hardware import current_device, device_info
from loka.kernel_registry.registry import default_registry
from loka.kernel_registry.triton.launch import CODES, Key, Launch
from loka.kernel_registry.triton.tuned import Provenance, TunedLaunch, Tuning
from loka.probes.judging.predictions import predicted
from loka.probes.routing.convert import convert
from loka.probes.routing.spill import ClosedRequests, Spill, TraceFacts
from loka.probes.routing.trace import RoutingTrace
from loka.probes.sampling.learning import STATISTICS, restore
from loka.probes.storing.database import list_runs, open_database, read_learned, read_steps, read_timings, write_timings
from loka.reports.build import report_of
from loka.reports.render import FORMATS
from loka.reports.routing_record import routing_report
from tests.dispatch.made_evidence import HOPPER, decided, made_plan, product, recipe, timing
from tests.dispatch.made_routing import made_trace
from tests.fuzz.mutations import BYTES, JSON, NPZ, SQL, Mutation

# What a routing trace may unpack to here, so that a file can ask for too much.
MAX_BYTES = 64 * 2**20
_REGISTRY = default_registry()
_JUDGED_ON = made_trace(requests=6, layers=2, experts=8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """One kind of file. `originals` writes whole files into a folder and returns their bytes."""

    name: str
    file: str  # what it is called
    originals: Callable[[Path], tuple[bytes, ...]]
    mutations: tuple[Mutation, ...]
    read: Callable[[Path], str]


def _again(path: Path) -> Path:
    return path.with_name("again")


# ---- plans, profiles, tunings


def _plans(folder: Path) -> tuple[bytes, ...]:
    times = {"torch.mm.bf16": 20.0, "torch.scaled_mm.rowwise": 10.0, "triton.gemm.rowwise": 9.0}
    sites = (
        product("up", recipes=(recipe("rowwise", 0.03, horizon=400), recipe("tensorwise", 0.2))),
        product("down", product="dgrad", recipes=(recipe("rowwise", 0.3),)),
        product("attention", op="bmm", batch=8),
    )
    decisions = (decided(times, evidence=each) for each in sites)
    plans = (made_plan(*decisions, chains={"up": "attention"}), made_plan(bound=Bound(loss=2e-4)))
    for number, plan in enumerate(plans):
        plan.save(folder / f"plan{number}.json")
    return tuple((folder / f"plan{number}.json").read_bytes() for number in range(len(plans)))


def _read_plan(path: Path) -> str:
    plan = Plan.load(path)
    plan.save(_again(path))
    again = Plan.load(_again(path))
    assert again == plan, "a plan that was saved is another"
    assert again.hash == plan.hash
    assert 0 <= plan.fp8_share() <= 1
    plan.kernel_problems(_REGISTRY, HOPPER)
    for decision in plan.decisions:
        assert plan.decision(decision.request.site, decision.request.product) is decision
    return plan.text()


def _profiles(folder: Path) -> tuple[bytes, ...]:
    times = [timing(name, 10.0 + at, device=HOPPER, of=product(m=64 * (at + 1))) for at, name in enumerate("abc")]
    environment = {"torch": "2.13"}
    DeviceProfile(label="h200", source="measured", device=HOPPER, environment=environment, times=tuple(times)).save(
        folder / "profile.json"
    )
    return ((folder / "profile.json").read_bytes(),)


def _read_profile(path: Path) -> str:
    profile = DeviceProfile.load(path)
    profile.save(_again(path))
    assert sorted(map(repr, DeviceProfile.load(_again(path)).times)) == sorted(map(repr, profile.times))
    TimeTable(profile.times)
    return _again(path).read_text(encoding="utf-8")


def _tunings(folder: Path) -> tuple[bytes, ...]:
    launches = (
        TunedLaunch(
            **Key("gemm", "rowwise", "fprop", CODES, 8, n, 40)._asdict(),
            launch=Launch(block_m=32, block_n=16, num_warps=4, num_stages=2),
            **{"median_us": 1.0, "spread_us": 0.1, "default_us": 2.0},
        )
        for n in (24, 48)
    )
    Tuning(provenance=Provenance.here("cpu"), created="2026-01-01T00:00:00+00:00", launches=tuple(launches)).save(
        folder / "tuning.json"
    )
    return ((folder / "tuning.json").read_bytes(),)


def _read_tuning(path: Path) -> str:
    tuning = Tuning.load(path)
    tuning.save(_again(path))
    assert Tuning.load(_again(path)) == tuning
    tuning.provenance.differs(Provenance.here("cpu"))
    return tuning.text()


# ---- routing


def _traces(folder: Path) -> tuple[bytes, ...]:
    bare = RoutingTrace(counts=made_trace(requests=5).counts, domain=("a",) * 5, layers=(0, 1, 2))
    whole = made_trace(requests=8, layers=2)
    steps = RoutingTrace(
        counts=whole.counts, domain=whole.domain, layers=whole.layers, decode_steps=[3] * 8, top_k=2, model="made"
    )
    for number, trace in enumerate((bare, whole, steps)):
        trace.save(folder / f"{number}.npz")
    return tuple((folder / f"{number}.npz").read_bytes() for number in range(3))


def _described(path: Path, trace: RoutingTrace) -> str:
    trace.save(_again(path))
    again = RoutingTrace.load(_again(path), max_bytes=4 * MAX_BYTES)
    assert repr(again) == repr(trace)
    report = json.dumps(routing_report(trace)) if trace.counts.size < 10**5 else ""
    return f"{trace!r} {trace.counts.tobytes().hex()} {report}"


def _read_trace(path: Path) -> str:
    return _described(path, RoutingTrace.load(path, max_bytes=MAX_BYTES))


def _token_lines(folder: Path) -> tuple[bytes, ...]:
    records = [
        {"request": f"r{at % 3}", "domain": f"d{at % 3}", "phase": ("prefill", "decode")[at % 2], "layer": at % 2}
        | {"token": at, "experts": [at % 5, (at + 1) % 5]}
        for at in range(12)
    ]
    return ("\n".join(map(json.dumps, records)).encode(), json.dumps(records[3]).encode())


def _token_tables(folder: Path) -> tuple[bytes, ...]:
    lines = [f"r{at % 3},d{at % 3},{('prefill', 'decode')[at % 2]},{at % 2},{at},{at % 5}" for at in range(12)]
    return ("\n".join(("request,domain,phase,layer,token,expert", *lines)).encode(),)


def _cut_recordings(folder: Path) -> tuple[bytes, ...]:
    trace = made_trace(requests=6, layers=2)
    facts = TraceFacts(layers=trace.layers, experts=trace.experts, model="made", hidden_size=8, top_k=1)
    spill = Spill(folder / "cut.npz", facts)
    for part in (slice(0, 3), slice(3, 6)):
        spill.append(ClosedRequests(counts=trace.counts[part], domain=trace.domain[part], decode_steps=(1,) * 3), facts)
    data = spill.partial.read_bytes()
    spill.discard()
    return (data,)


def _read_tokens(path: Path) -> str:
    return _described(path, convert(path, max_bytes=MAX_BYTES))


def _placements(folder: Path) -> tuple[bytes, ...]:
    for number, options in enumerate((PlaceOptions(devices=3, replicas=1), PlaceOptions(devices=2))):
        place(made_trace(requests=24, layers=2, experts=8), options).save(folder / f"placement{number}.json")
    return tuple((folder / f"placement{number}.json").read_bytes() for number in range(2))


def _read_placement(path: Path) -> str:
    placement = Placement.load(path)
    placement.save(_again(path))
    assert Placement.load(_again(path)) == placement
    for name in METHODS:
        placement.maps(name)
    json.dumps(evaluate(placement, _JUDGED_ON).to_json())
    return _again(path).read_text(encoding="utf-8")


# ---- probe databases


RECIPES = ("tensorwise", "rowwise")


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(24, 16), nn.LayerNorm(16), nn.Linear(16, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.norm(self.up(x))))


def _databases(folder: Path) -> tuple[bytes, ...]:
    torch.manual_seed(0)
    path = folder / "run.db"
    model = _Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with loka.probe(model, path, every=1, overhead=100.0, recipes=RECIPES, loss="cross_entropy"):
            for _ in range(8):
                x, labels = torch.randn(8, 24), torch.randint(9, (8,))
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), labels).backward()
                optimizer.step()
    engine = open_database(path, create=False)
    info = str(device_info(current_device()))
    for kernel in ("torch.mm.bf16", "emulated.linear.rowwise"):
        write_timings(engine, [timing(kernel, 5.0, of=product("up", m=8, n=16, k=24), device=info)])
    engine.dispose()
    return (path.read_bytes(),)


def _read_database(path: Path) -> str:
    for name in ("-wal", "-shm", "-journal"):
        path.with_name(path.name + name).unlink(missing_ok=True)
    engine = open_database(path, create=False)
    try:
        runs = list_runs(engine)
        steps = [list(read_steps(engine, run.info.id)) for run in runs]
        learned = read_learned(engine)
        timings = read_timings(engine, str(device_info(current_device())))
    finally:
        engine.dispose()
    expected = predicted(one for one in learned if one.kind == STATISTICS)
    for one in learned:
        with suppress(ArgumentError):
            restore(one)
    report = report_of(path, Bound(row_error=0.05))
    for name in ("table", "csv", "md"):
        FORMATS[name](report)
    return f"{runs} {steps} {learned} {expected} {timings} {FORMATS['json'](report)}"


READERS = {
    reader.name: reader
    for reader in (
        Reader(name="plan", file="plan.json", originals=_plans, mutations=(*JSON, *BYTES), read=_read_plan),
        Reader(name="profile", file="h200.json", originals=_profiles, mutations=(*JSON, *BYTES), read=_read_profile),
        Reader(name="tuning", file="tuning.json", originals=_tunings, mutations=(*JSON, *BYTES), read=_read_tuning),
        Reader(
            name="placement",
            file="placement.json",
            originals=_placements,
            mutations=(*JSON, *BYTES),
            read=_read_placement,
        ),
        Reader(name="routing trace", file="trace.npz", originals=_traces, mutations=(*NPZ, *BYTES), read=_read_trace),
        Reader(
            name="routing tokens",
            file="tokens.jsonl",
            originals=_token_lines,
            mutations=BYTES,
            read=_read_tokens,
        ),
        Reader(name="routing table", file="tokens.csv", originals=_token_tables, mutations=BYTES, read=_read_tokens),
        Reader(
            name="routing cut off",
            file="trace.partial",
            originals=_cut_recordings,
            mutations=BYTES,
            read=_read_tokens,
        ),
        Reader(name="database, values", file="run.db", originals=_databases, mutations=SQL, read=_read_database),
        Reader(name="database, bytes", file="run.db", originals=_databases, mutations=BYTES, read=_read_database),
    )
}
