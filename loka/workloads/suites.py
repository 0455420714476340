"""Named sets of products, for `loka bench --suite`: what recommendation models and mixtures of experts run."""

from dataclasses import dataclass
from typing import Final, Literal

from loka.errors import ArgumentError, nearest


@dataclass(frozen=True, kw_only=True, slots=True)
class SuiteProduct:
    """One forward product Y [m, n] = X [m, k] . W, `batch` times; its gradients follow from it.

    Of a `grouped_linear` m counts the tokens of all experts together, `batch` the experts, and `tokens` says how many
    each one has; of a `linear_norm_act` the normalised, activated product is meant.
    """

    op: Literal["linear", "bmm", "many_linear", "grouped_linear", "linear_norm_act"] = "linear"
    m: int
    k: int
    n: int
    batch: int = 1
    tokens: tuple[int, ...] = ()

    def __str__(self) -> str:
        """Return e.g. `2048x256x768`, or `8x64x1024x512` of a batch of 8."""
        return f"{f'{self.batch}x' if self.batch > 1 else ''}{self.m}x{self.k}x{self.n}"


# M x K x N of forward products. lrm27 spans the shapes of the LoKA paper's micro-study (arXiv 2605.10886): 27 shapes
# from (2048, 256) x (256, 768) to (2048, 123200) x (123200, 1024), with three of them at other batch sizes.
_LRM_KN: Final[tuple[tuple[int, int], ...]] = (
    (256, 768),
    (256, 256),
    (512, 512),
    (768, 256),
    (1024, 256),
    (1024, 1024),
    (1536, 512),
    (2048, 1024),
    (2048, 2048),
    (3072, 768),
    (4096, 1024),
    (4096, 4096),
    (6144, 1024),
    (8192, 2048),
    (10413, 400),
    (12320, 1024),
    (16384, 1024),
    (24640, 512),
    (30800, 1024),
    (61600, 512),
    (123200, 1024),
)
_LRM_BATCHES: Final[tuple[tuple[int, int], ...]] = ((256, 768), (1024, 1024), (4096, 1024))
_SMALL: Final[tuple[SuiteProduct, ...]] = tuple(
    SuiteProduct(m=m, k=k, n=n) for m in (512, 2048) for k, n in ((256, 768), (512, 512), (429, 400))
)


def _experts(tokens: tuple[int, ...], k: int, n: int) -> SuiteProduct:
    return SuiteProduct(op="grouped_linear", m=sum(tokens), k=k, n=n, batch=len(tokens), tokens=tokens)


# Tokens per expert. Prefill: the busiest expert has some eight times the tokens of the idlest; decode: a few tokens at
# most, none at two of three experts, the first and the last among them.
_PREFILL: Final[tuple[int, ...]] = (129, 64, 311, 96, 40, 180, 77, 127)
_DECODE: Final[tuple[int, ...]] = (0, 1, 0, 0, 3, 0, 2, 0, 0, 1, 0, 0, 0, 8, 1, 0)

SUITES: Final[dict[str, tuple[SuiteProduct, ...]]] = {
    "lrm27": (
        *(SuiteProduct(m=2048, k=k, n=n) for k, n in _LRM_KN),
        *(SuiteProduct(m=m, k=k, n=n) for m in (512, 8192) for k, n in _LRM_BATCHES),
    ),
    # The others are small enough for a CPU.
    "lrm-small": _SMALL,
    # The same followed by BlockNorm and HardSwish, as a rewritten model has them.
    "lrm-small-fused": tuple(SuiteProduct(op="linear_norm_act", m=each.m, k=each.k, n=each.n) for each in _SMALL),
    # Gate and up, then down, of experts 512 wide in a model 256 wide.
    "moe-small": (
        _experts(_PREFILL, 256, 1024),
        _experts(_PREFILL, 512, 256),
        _experts(_DECODE, 256, 1024),
        _experts(_DECODE, 512, 256),
    ),
    # Pairwise interactions of features per sample, and attention scores and values per head.
    "batched-small": (
        SuiteProduct(op="bmm", m=27, k=64, n=27, batch=256),
        SuiteProduct(op="bmm", m=128, k=64, n=128, batch=16),
        SuiteProduct(op="bmm", m=128, k=128, n=64, batch=16),
    ),
    # The towers and gates of a multi-task model: as many linear layers, each with an input and a weight of its own.
    "towers-small": (
        SuiteProduct(op="many_linear", m=512, k=256, n=64, batch=12),
        SuiteProduct(op="many_linear", m=512, k=64, n=16, batch=12),
        SuiteProduct(op="many_linear", m=64, k=256, n=128, batch=30),
    ),
}


def suite(name: str) -> tuple[SuiteProduct, ...]:
    """Return the products of a named suite; raise ArgumentError naming the known ones."""
    if name not in SUITES:
        known = ", ".join(SUITES)
        raise ArgumentError(f"There is no suite {name!r}. Known suites: {known}.{nearest(name, SUITES)}")
    return SUITES[name]
