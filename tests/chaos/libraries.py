"""The libraries that chaos is made with: an entry says which processes there are and where keys lie.

Everything else, the tasks, the faults, the ledger and the counting, is the same for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

QUEUES = ("mail", "image")


@dataclass(frozen=True, slots=True)
class Role:
    """One process of the library: how it is started, and what may be done to it."""

    name: str
    arguments: tuple[str, ...]  # behind `python -m module`; URL stands for that of Redis
    queues: tuple[str, ...] = QUEUES
    forks: bool = False
    failpoints: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Library:
    """One queue library."""

    name: str
    module: str
    workers: tuple[Role, ...]
    services: tuple[Role, ...]  # what the library needs besides: only failpoints are aimed at it
    producer_failpoints: Mapping[str, float]
    list_key: str  # of a queue's list
    hash_key: str  # of what a member of that list stands for


_PRODUCER = {"after_record": 0.03, "after_push": 0.03}
_WORKER = {
    "after_claim": 0.01,
    "after_return": 0.01,
    "after_move_record": 0.1,
    "after_end_committed": 0.02,
}

RQ = Library(
    name="rq",
    module="tests.chaos.rq_program",
    workers=(
        Role("simple-mail", ("worker", "URL", "simple"), ("mail",), failpoints=_WORKER),
        Role("simple-image", ("worker", "URL", "simple"), ("image",), failpoints=_WORKER),
        Role("simple-both", ("worker", "URL", "simple"), failpoints=_WORKER),
        Role("fork-mail", ("worker", "URL", "fork"), ("mail",), forks=True, failpoints=_WORKER),
        Role("fork-both", ("worker", "URL", "fork"), forks=True, failpoints=_WORKER),
    ),
    services=(Role("scheduler", ("scheduler", "URL"), failpoints={"after_move_record": 0.05}),),
    producer_failpoints=_PRODUCER,
    list_key="rq:queue:{queue}",
    hash_key="rq:job:{member}",
)

LIBRARIES = {library.name: library for library in (RQ,)}

RECONCILER_FAILPOINTS = {"after_incident_row": 0.6, "after_restore": 0.5, "after_void": 0.9}


def failpoints(library: Library) -> list[str]:
    """Name every failpoint that some process of this library's installation may die at."""
    places = dict(library.producer_failpoints)
    for role in (*library.workers, *library.services):
        places |= role.failpoints or {}
    return [*places, *RECONCILER_FAILPOINTS]
