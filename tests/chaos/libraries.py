"""The libraries that chaos supports: an entry names the processes and the layout of the keys.

Everything else (the tasks, the faults, the ledger and the counting) is the same for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.chaos.layouts import CeleryLayout, DramatiqLayout, RQLayout

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.chaos.layouts import Layout

QUEUES = ("mail", "image")
REDIS_VARIABLE = "CHAOS_REDIS_URL"
"""The address of Redis for the programs; it is no setting of jobguard or of a library."""


@dataclass(frozen=True, slots=True)
class Role:
    """One process of the library: how it is started, and which faults it may get."""

    name: str
    arguments: tuple[str, ...]  # behind `python -m module`, and followed by the queues
    queues: tuple[str, ...] = QUEUES
    forks: bool = False
    failpoints: Mapping[str, float] | None = None
    stops: tuple[str, ...] = ("SIGTERM",)  # each of these ends it in order


@dataclass(frozen=True, slots=True)
class Library:
    """One queue library."""

    name: str
    module: str
    workers: tuple[Role, ...]
    services: tuple[Role, ...]  # other processes that the library needs; only failpoints kill them
    stranger: Role  # a worker that comes without jobguard, and goes
    spared: str  # a worker that no fault ends in a soak
    producer_failpoints: Mapping[str, float]
    layout: Layout
    grows: float = 0.0  # MB for each hour by which its workers grow without jobguard, measured


_PRODUCER = {
    "after_record": 0.03,
    "record_under_way": 0.02,
    "pushed_before_record": 0.02,
    "after_push": 0.03,
}
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
        Role("simple-mail", ("worker", "simple"), ("mail",), failpoints=_WORKER),
        Role("simple-image", ("worker", "simple"), ("image",), failpoints=_WORKER),
        Role("simple-both", ("worker", "simple"), failpoints=_WORKER),
        Role("fork-mail", ("worker", "fork"), ("mail",), forks=True, failpoints=_WORKER),
        Role("fork-both", ("worker", "fork"), forks=True, failpoints=_WORKER),
    ),
    services=(Role("scheduler", ("scheduler",), failpoints={"after_move_record": 0.05}),),
    stranger=Role("stranger", ("worker", "simple")),
    spared="simple-both",
    producer_failpoints=_PRODUCER,
    layout=RQLayout(),
)

# These workers publish, too: the next step of a chain, a retry, a message that a task sends.
_PUBLISHER = _WORKER | {"after_record": 0.02, "after_push": 0.02}


def _celery(name: str, *how: str, queues: tuple[str, ...] = QUEUES) -> Role:
    forks = "prefork" in how
    return Role(
        name,
        ("worker", name, *how),
        queues,
        forks=forks,
        failpoints=_PUBLISHER,
        # A cold shutdown gives up running tasks; only a pool with processes has a cold shutdown.
        stops=("SIGTERM", "SIGQUIT") if forks else ("SIGTERM",),
    )


CELERY = Library(
    name="celery",
    module="tests.chaos.celery_program",
    workers=(
        _celery("prefork-mail", "prefork", "2", "early", queues=("mail",)),
        _celery("prefork-both", "prefork", "2", "early"),
        _celery("prefork-late", "prefork", "2", "late"),
        _celery("threads", "threads", "4", "early"),
        _celery("solo", "solo", "1", "early", queues=("image",)),
    ),
    services=(),
    stranger=_celery("stranger", "threads", "2", "early"),
    spared="threads",
    producer_failpoints=_PRODUCER,
    layout=CeleryLayout(),
    grows=100.0,
)

DRAMATIQ = Library(
    name="dramatiq",
    module="tests.chaos.dramatiq_program",
    workers=(
        Role("command-mail", ("command", "2", "1"), ("mail",), True, _PUBLISHER),
        Role("command-both", ("command", "2", "2"), QUEUES, True, _PUBLISHER),
        Role("command-threads", ("command", "1", "4"), QUEUES, True, _PUBLISHER),
        Role("worker-both", ("worker", "2"), failpoints=_PUBLISHER),
        Role("worker-image", ("worker", "2"), ("image",), failpoints=_PUBLISHER),
    ),
    services=(),
    stranger=Role("stranger", ("worker", "2")),
    spared="worker-both",
    producer_failpoints=_PRODUCER,
    layout=DramatiqLayout(),
)

LIBRARIES = {library.name: library for library in (RQ, CELERY, DRAMATIQ)}

RECONCILER_FAILPOINTS = {"after_incident_row": 0.6, "after_restore": 0.5, "after_void": 0.9}


def failpoints(library: Library) -> list[str]:
    """Return the names of the failpoints at which a process of this library may die."""
    places = dict(library.producer_failpoints)
    for role in (*library.workers, *library.services):
        places |= role.failpoints or {}
    return [*places, *RECONCILER_FAILPOINTS]
