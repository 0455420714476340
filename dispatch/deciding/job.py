"""One decision per job: every rank runs the same plan, on the same libraries, or none of them starts.

    all ranks    send what the numbers and the choice of a kernel depend on: versions, device, LoKA's kernels
    rank 0       makes the plan, alone: times differ from rank to rank, and so would the choice
    all ranks    receive its bytes, read them as they would read a file, and compare hashes

Whatever goes wrong on one rank is told to all of them, and all of them raise: a rank that raises alone leaves the
others waiting for it.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeVar

import torch.distributed as dist

from loka.dispatch.deciding.plan import Plan
from loka.environment import environment_facts
from loka.errors import LokaError, PlanError
from loka.probes.distributions.gather import gather_bytes

logger = logging.getLogger("loka.dispatch")

# What may differ between ranks: a machine's name for itself, and settings that change no number.
_MAY_DIFFER: Final[frozenset[str]] = frozenset({"platform", "torch threads"})
_MAX_DIFFERENCES: Final[int] = 3

Prepared = TypeVar("Prepared")


def plan_together(make: Callable[[], Plan], group: dist.ProcessGroup) -> Plan:
    """Return the plan that `make` makes on rank 0, the same on every rank; every rank of the group has to call.

    Raises PlanError on every rank where the ranks' environments differ, or rank 0 fails; there, its own error.
    """
    check_environments(environment_facts(), group)
    failure: Exception | None = None
    payload = b""
    if dist.get_rank(group) == 0:
        try:
            payload = make().text().encode()
        except Exception as error:  # noqa: BLE001 - raised below, once the other ranks know and do not wait for ever
            failure = error
            told = str(error) if isinstance(error, LokaError) else f"{type(error).__name__}: {error}"
            payload = json.dumps({"failed": told}).encode()
    received = gather_bytes(payload, group)[0]
    if failure is not None:
        raise failure
    plan = _read(received)
    check_plans(plan, group)
    return plan


def _read(received: bytes) -> Plan:
    if received.startswith(b'{"failed"'):
        raise PlanError(f"Rank 0 could not make the plan: {json.loads(received)['failed']}")
    return Plan.parse(received, "the plan of rank 0")


def all_or_none(prepare: Callable[[], Prepared], group: dist.ProcessGroup) -> Prepared:
    """Return what `prepare` returns if it succeeds on every rank; every rank of the group has to call.

    Raises its own error on a rank where it fails, and PlanError naming the first such rank on the others.
    """
    failure: Exception | None = None
    try:
        prepared = prepare()
    except Exception as error:  # noqa: BLE001 - raised below, once the other ranks know and do not wait for ever
        failure = error
    told = gather_bytes(b"" if failure is None else str(failure).encode(), group)
    if failure is not None:
        raise failure
    for rank, message in enumerate(told):
        if message:
            raise PlanError(f"Rank {rank} failed, so no rank goes on: {message.decode(errors='replace')}")
    return prepared


def check_environments(facts: Mapping[str, str], group: dist.ProcessGroup) -> None:
    """Raise PlanError, on every rank, where ranks have other versions, devices or libraries than most of them."""
    everyone = [json.loads(payload) for payload in gather_bytes(json.dumps(dict(facts)).encode(), group)]
    problems = []
    for name in everyone[0]:
        values = [str(each.get(name)) for each in everyone]
        if name in _MAY_DIFFER or len(set(values)) == 1:
            continue
        usual = _most_common(values)
        odd = [f"rank {rank} has {value}" for rank, value in enumerate(values) if value != usual]
        problems.append(f"{name} is {usual} on most, and {', '.join(odd[:_MAX_DIFFERENCES])}")
    if problems:
        raise PlanError(
            f"The {len(everyone)} ranks of this job are not alike: {'; '.join(problems)}. A kernel that is fastest on "
            "one may be missing, or compute otherwise, on another: install the same versions on all of them."
        )


def check_plans(plan: Plan, group: dist.ProcessGroup) -> None:
    """Raise PlanError, on every rank, where ranks hold other plans; every rank of the group has to call."""
    hashes = [payload.decode("ascii") for payload in gather_bytes(plan.hash.encode("ascii"), group)]
    if len(set(hashes)) > 1:
        usual = _most_common(hashes)
        odd = [f"rank {rank} has {each[:12]}" for rank, each in enumerate(hashes) if each != usual]
        raise PlanError(
            f"The {len(hashes)} ranks of this job hold different plans: most have {usual[:12]}, "
            f"{', '.join(odd[:_MAX_DIFFERENCES])}. Load the same file on all of them, or make the plan with "
            "loka.plan(process_group=...)."
        )
    logger.info("all %d ranks hold the plan %s", len(hashes), plan.hash[:12])


def _most_common(values: Sequence[str]) -> str:
    """Return the commonest value, the first of those that are equally common."""
    return Counter(values).most_common(1)[0][0]
