"""What a probe writes: plain frozen records, the contract between capture, the database and everything that reads it.

One `StepRecord` per sampled step holds one `ProductRecord` per (site, pass) seen in it. Numbers are Python floats and
ints: nothing here refers to a tensor, so a record can cross a thread or a process.
"""

import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from loka.formats import Pass, Role
from loka.numerics import ProductError

# Kinds of events that a monitor adds to the run which its plan was made from; their steps are those of the training
# that it watches.
MONITOR_EVENTS: Final[frozenset[str]] = frozenset(
    {"demoted", "promoted", "outliers", "kernel_fault", "kernel_differs", "monitored", "monitor_ended"}
)

RunStatus = Literal["running", "complete", "failed", "detached", "incomplete"]
DynamicsKind = Literal["bias", "norm", "activation"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """Where a run took place."""

    device: str  # e.g. "cpu (AMD EPYC 9R14)", "cuda (NVIDIA H200, sm_90)"
    torch: str
    python: str
    loka: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RunInfo:
    """What is known of a run when it starts."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: str  # ISO 8601, UTC
    environment: Environment
    model: str  # class name of the root module
    fingerprint: Mapping[str, tuple[int, ...]]  # parameter FQN -> shape
    every: int
    overhead_budget: float  # share of wall time
    recipes: tuple[str, ...]
    world_size: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class RunProgress:
    """Running totals of a run, rewritten with every sampled step and at the end."""

    steps: int
    sampled_steps: int
    skipped_samples: int  # samples that were due and left out to stay within the overhead budget
    wall_s: float  # inside the `with` block
    probe_s: float  # of which the probe's own
    unattributed: int  # backward products whose forward was not sampled
    weights_changed: bool  # whether any probed weight was written between two sampled steps
    status: RunStatus = "running"
    reason: str = ""

    @property
    def overhead_fraction(self) -> float:
        """Share of the run's own time that the probe added."""
        own = self.wall_s - self.probe_s
        return self.probe_s / own if own > 0 else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class OperandRecord:
    """Statistics of one operand of a product in one step. Shares are of all elements, in 0..1."""

    role: Role
    amax: float  # over finite elements
    rms: float  # over finite elements
    zeros: float  # share that is exactly zero
    nan: int
    inf: int
    elements: int
    # recipe -> share of non-zero elements that become zero, and share clipped at the format's maximum; measured on the
    # sampled part of the operand. Empty when the product was not measured in this step.
    underflow: Mapping[str, float] = field(default_factory=dict)
    saturation: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossImpact:
    """What rounding the operands of one forward product does to the mean loss of one step, in the loss' own unit."""

    kl: float  # curvature: the expected increase, never negative
    first_order: float  # <dL/dY, dY> on this batch
    spread: float  # standard deviation of first_order over batches of this size


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductRecord:
    """One product (site, pass) in one sampled step. out[m, n] = sum over k, `batch` times."""

    site: str
    product: Pass
    op: str  # aten name without overload, e.g. "addmm"
    batch: int
    m: int
    n: int
    k: int
    calls: int  # in this step
    dtype: str  # executed, e.g. "bfloat16"
    parameter: str  # FQN of the parameter that is an operand, "" for a product of activations
    operands: tuple[OperandRecord, ...] = ()
    errors: Mapping[str, ProductError] = field(default_factory=dict)  # by recipe
    alignment: float = math.nan  # mean over rows of A^-1/2, A = |y|^2 / sum_k x_k^2 |w_k|^2; NaN: not measured
    impacts: Mapping[str, LossImpact] = field(default_factory=dict)  # by recipe; fprop only
    unmeasured: str = ""  # why `errors` can never be filled, e.g. "transposed convolution"

    @property
    def flops(self) -> int:
        """Floating-point operations of all calls in this step."""
        return 2 * self.batch * self.m * self.n * self.k * self.calls


@dataclass(frozen=True, kw_only=True, slots=True)
class DynamicsRecord:
    """One bias, norm or Swish in one sampled step. Means are over sampled rows; NaN: not of this kind, or no number."""

    name: str  # FQN of the parameter or of the module
    kind: DynamicsKind
    module: str  # class of the module; of a bias, that of the module which holds it
    parameters: tuple[str, ...] = ()  # that the module itself has, e.g. ("weight", "bias")
    feeds: tuple[str, ...] = ()  # sites whose forward product reads its output
    norm: float = math.nan  # bias: L2 norm at the end of the step
    amax: float = math.nan  # bias: largest |b|
    cancellation: float = math.nan  # norm: |mean| / rms of its input: what subtracting the mean takes away
    crest: float = math.nan  # norm, activation: amax / rms of its input
    stretched: float = math.nan  # activation: share of its input below -3, where Swish is all exponential
    output_crest: float = math.nan  # activation: amax / rms of Swish of that input
    underflow: float = math.nan  # activation: share of the non-zero of it that a row-wise e4m3 cast turns into zero
    hard_underflow: float = math.nan  # the same of HardSwish of that input


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """Everything seen in one sampled step."""

    step: int  # counted from 0 over the root's forwards (or `probe.step()` scopes)
    products: tuple[ProductRecord, ...]
    rank: int = 0  # of the process that saw it
    loss: float = math.nan  # mean per item; NaN where no backward began at one number
    labels: str = ""  # what the curvature in `impacts` rests on: "closed", "sampled" or "empirical"; "": none was taken
    dynamics: tuple[DynamicsRecord, ...] = ()  # empty on steps that left them out, for the budget


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnedRecord:
    """What a run has learned of one product so far, in a form that takes no code to read."""

    site: str
    product: Pass
    kind: str  # "statistics" of the product, or the operand whose distribution it is
    samples: int  # sampled steps in it
    step: int  # the newest of them
    data: bytes  # .npz of plain arrays


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something that happened to the probe or the run, told to the reader of the report."""

    step: int
    kind: str  # e.g. "over_budget", "nonfinite", "detached"
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """One measured time of one kernel on one shape: the median over repetitions and its spread."""

    kernel: str
    product: Pass
    batch: int
    m: int
    n: int
    k: int
    dtype: str
    device: str
    median_us: float
    spread_us: float  # half the interquartile range
    repetitions: int
    values: str  # the distribution the operands were drawn from, e.g. "normal"
    created: str
