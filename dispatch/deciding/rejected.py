"""What lost of one product, held as it was considered: a candidate is a record only where somebody looks.

Products of one shape share most of what is said of their kernels: the kernel with its time, the objection, and, of all
kernels of one recipe, the error. A model of thousands of products has a hundred thousand candidates that lost. So the
cases and the objections stay what they are, parts that many products share, and become records one by one.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, overload

from loka.dispatch.deciding.candidates import Candidate, Case, Code, Objection, rejected_candidate

# What lost: a case and the objection to it, or a record where the words are of one product alone.
Entry = tuple[Case, Objection] | Candidate


class Rejected(Sequence[Candidate]):
    """The candidates that lost, by name: equal to the tuple of them, and copied and pickled as that.

    `entries` are the same in the same order, for those who need no records.
    """

    __slots__ = ("entries",)

    def __init__(self, entries: Iterable[Entry]) -> None:
        """Sort what lost by the name of its kernel."""
        self.entries: Final[list[Entry]] = sorted(entries, key=kernel_of)

    def __len__(self) -> int:
        """Return how many lost."""
        return len(self.entries)

    @overload
    def __getitem__(self, index: int) -> Candidate: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Candidate, ...]: ...
    def __getitem__(self, index: int | slice) -> Candidate | tuple[Candidate, ...]:
        """Return one as a record, or some of them."""
        if isinstance(index, slice):
            return tuple(map(candidate_of, self.entries[index]))
        return candidate_of(self.entries[index])

    def __iter__(self) -> Iterator[Candidate]:
        """Yield all of them as records."""
        return map(candidate_of, self.entries)

    def __eq__(self, other: object) -> bool:
        """Compare as a tuple of records does."""
        return tuple(self) == tuple(other) if isinstance(other, Rejected | tuple) else NotImplemented

    def __hash__(self) -> int:
        """Return that of the tuple of records."""
        return hash(tuple(self))

    def __repr__(self) -> str:
        """Return that of the tuple of records."""
        return repr(tuple(self))

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave the evidence behind that the cases lead to."""
        return Rejected, (tuple(self),)


def entries_of(rejected: Sequence[Candidate], *, without: str = "") -> Sequence[Entry]:
    """Return what lost without making records of it, and without the kernel of a name."""
    if not isinstance(rejected, Rejected):
        return [each for each in rejected if each.kernel != without]
    entries = rejected.entries
    at = bisect_left(entries, without, key=kernel_of)
    if at == len(entries) or kernel_of(entries[at]) != without:
        return entries
    return [each for each in entries if kernel_of(each) != without]


def told(rejected: Sequence[Candidate], others: Iterable[Candidate], *, without: str = "") -> Rejected:
    """Return what lost with others beside it, and without the kernel of a name."""
    return Rejected((*entries_of(rejected, without=without), *others))


def kernel_of(entry: Entry) -> str:
    """Return the name of a kernel that lost."""
    return entry.kernel if isinstance(entry, Candidate) else entry[0].offer.spec.name


def code_of(entry: Entry) -> Code | None:
    """Return why it lost, as a code."""
    return entry.code if isinstance(entry, Candidate) else entry[1][0]


def candidate_of(entry: Entry) -> Candidate:
    """Return what lost as a record."""
    return entry if isinstance(entry, Candidate) else rejected_candidate(entry[0], *entry[1])
