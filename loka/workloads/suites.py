"""Named sets of GEMM shapes that recommendation models run, for `loka bench --suite`."""

from typing import Final

from loka.errors import ArgumentError, nearest

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

SUITES: Final[dict[str, tuple[tuple[int, int, int], ...]]] = {
    "lrm27": (
        *((2048, k, n) for k, n in _LRM_KN),
        *((m, k, n) for m in (512, 8192) for k, n in _LRM_BATCHES),
    ),
    # A few of them, small enough for a CPU.
    "lrm-small": tuple((m, k, n) for m in (512, 2048) for k, n in ((256, 768), (512, 512), (429, 400))),
}


def suite(name: str) -> tuple[tuple[int, int, int], ...]:
    """Return the (M, K, N) of a named suite; raise ArgumentError naming the known ones."""
    if name not in SUITES:
        known = ", ".join(SUITES)
        raise ArgumentError(f"There is no suite {name!r}. Known suites: {known}.{nearest(name, SUITES)}")
    return SUITES[name]
