"""A job that is charged with a worker's death runs alone in its process."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, cast
from unittest.mock import Mock
from uuid import UUID

import pytest

from jobguard.errors import StoreUnavailable
from jobguard.host.alone import Alone, AloneAmongChildren, AloneInChild
from jobguard.host.child_slots import ChildSlots
from jobguard.host.parent import ParentStore
from jobguard.model import Claim, Delivery, Refused, new_token
from jobguard.store.protocols import Void
from tests.fakes.store import MemoryLedger
from tests.fakes.world import SOURCE, events, outage
from tests.support import eventually
from tests.unit.host.test_session import Worker, lead


class Process:
    """The starts of one process."""

    def __init__(self, **options: Any) -> None:
        self.alone = Alone(**options)
        self.pool = ThreadPoolExecutor(8)

    def soon(self, call: Callable[[UUID], object], token: UUID) -> threading.Event:
        """Call this in a thread; return the event that is set at its end."""
        result = threading.Event()

        def do() -> None:
            call(token)
            result.set()

        self.pool.submit(do)
        return result


@pytest.fixture
def tokens() -> list[UUID]:
    """Return some tokens."""
    return [new_token() for _ in range(4)]


def test_nothing_starts_beside_it(tokens: list[UUID]) -> None:
    """Nothing starts beside the suspect until the suspect has ended."""
    process, (suspect, other, *_) = Process(), tokens
    process.alone.enter(suspect)
    assert process.alone.take(suspect)

    begun = process.soon(process.alone.enter, other)
    assert not begun.wait(0.1)
    process.alone.leave(suspect)
    assert begun.wait(10)


def test_it_waits_for_what_runs(tokens: list[UUID]) -> None:
    """Nothing else starts while the suspect waits, so that its turn comes."""
    process, (suspect, running, fresh, _) = Process(), tokens
    process.alone.enter(running)
    process.alone.enter(suspect)
    assert not process.alone.take(suspect)

    begun = process.soon(process.alone.wait, suspect)
    eventually(lambda: process.alone._only == suspect)
    late = process.soon(process.alone.enter, fresh)
    assert not begun.wait(0.1)
    process.alone.leave(running)
    assert begun.wait(10)
    assert not late.wait(0.1)
    process.alone.leave(suspect)
    assert late.wait(10)


def test_one_suspect_after_the_other(tokens: list[UUID]) -> None:
    """The suspects of one death never run beside each other."""
    process = Process()
    inside: list[int] = []

    def run(token: UUID) -> None:
        process.alone.enter(token)
        if not process.alone.take(token):
            process.alone.wait(token)
        inside.append(len(process.alone._inside))
        process.alone.leave(token)

    for result in [process.soon(run, token) for token in tokens]:
        assert result.wait(10)
    assert inside == [1, 1, 1, 1]


def test_a_long_job_does_not_keep_it_for_ever(tokens: list[UUID]) -> None:
    """After a time limit the suspect runs beside others, and others start again."""
    process, (suspect, running, fresh, _) = Process(drain=0.1), tokens
    process.alone.enter(running)
    process.alone.enter(suspect)

    assert process.soon(process.alone.wait, suspect).wait(10)
    assert process.soon(process.alone.enter, fresh).wait(10)


def test_a_long_suspect_does_not_stop_the_process(tokens: list[UUID]) -> None:
    """Beside a suspect that runs for long, fresh jobs start again, and no other suspect does."""
    process, (suspect, fresh, second, _) = Process(shut=0.1), tokens
    process.alone.enter(suspect)
    assert process.alone.take(suspect)
    assert process.soon(process.alone.enter, fresh).wait(10)
    process.alone.enter(second)
    assert not process.alone.take(second)
    assert not process.alone.reserves(second)


def test_a_wait_has_the_bound_of_its_caller(tokens: list[UUID]) -> None:
    """A start whose time limit runs waits for no longer than its caller allows."""
    process, (suspect, other, *_) = Process(), tokens
    process.alone.enter(suspect)
    assert process.alone.take(suspect)
    assert process.soon(lambda token: process.alone.enter(token, 0.1), other).wait(10)
    assert process.soon(lambda token: process.alone.wait(token, 0.1), other).wait(10)


def test_a_run_without_a_reported_end_does_not_stop_the_process(tokens: list[UUID]) -> None:
    """Other jobs, and the next job that is to run alone, wait only for a limited time."""
    process, (suspect, other, next_one, _) = Process(patience=0.1, drain=0.1, shut=0.1), tokens
    process.alone.enter(suspect)
    assert process.alone.take(suspect)

    assert process.soon(process.alone.enter, other).wait(10)
    assert process.soon(process.alone.wait, next_one).wait(10)


# -- children of one worker ------------------------------------------------------------------------


class Children:
    """The children of one worker: they share its life, and the worker decides which of them start."""

    def __init__(self) -> None:
        self.slots = Mock(wraps=ChildSlots())
        self.running: set[UUID] = set()
        self.slots.running = lambda: frozenset(self.running)
        self.worker = AloneAmongChildren(self.slots)
        self.asked: list[str] = []

    def call(self, name: str, step: str, token: UUID, **options: bool) -> Any:
        """Answer a child, as the worker does."""
        assert name == "alone"
        self.asked.append(step)
        return getattr(self.worker, step)(token, **options)

    def child(self, token: UUID) -> AloneInChild:
        """Begin to start a delivery in a child."""
        self.running.add(token)
        return AloneInChild(self.slots, cast(ParentStore, self))


def test_children_start_without_a_question(tokens: list[UUID]) -> None:
    """While no charged job runs, a start in a child costs no call to the worker."""
    children, (one, two, *_) = Children(), tokens
    assert children.child(one).enters(one)
    assert children.child(two).enters(two)
    assert children.asked == []


def test_a_charged_job_runs_alone_among_the_children(tokens: list[UUID]) -> None:
    """A charged job of a child waits until its siblings have ended, and no sibling starts beside it."""
    children, (suspect, running, fresh, second) = Children(), tokens
    assert children.child(running).enters(running)
    charged = children.child(suspect)
    assert charged.enters(suspect)
    assert not charged.take(suspect)
    assert charged.reserves(suspect)
    assert not charged.takes_over(suspect, late=False)
    late = children.child(fresh)
    assert not late.enters(fresh)
    other = children.child(second)
    assert not other.reserves(second)

    children.running.remove(running)  # it has ended, or its child is dead
    assert charged.takes_over(suspect, late=False)
    assert not late.enters(fresh)
    assert not other.reserves(second)
    children.running.remove(suspect)
    assert late.enters(fresh)
    assert other.reserves(second)
    assert not other.takes_over(second, late=False)  # beside the fresh one


def test_a_worker_that_does_not_answer_stops_no_child(tokens: list[UUID]) -> None:
    """A child starts if its worker does not answer."""
    children, (suspect, fresh, *_) = Children(), tokens
    assert children.child(suspect).take(suspect)
    children.call = Mock(side_effect=StoreUnavailable)  # type: ignore[method-assign]
    children.child(fresh).enter(fresh)


# -- used by a session -----------------------------------------------------------------------------


def crashed(worker: Worker, job_id: str) -> Delivery:
    """Record a job that is charged with one death."""
    job = worker.owe(job_id)
    store, term = lead(worker.ledger)
    claim = worker.run(job)
    store.void(term, SOURCE.id, [Void(job.token, claim.number, charge=True, backoff=0)])
    worker.session.release(claim)
    store.resign(term)
    return job


def test_a_charged_job_starts_without_company() -> None:
    """A charged job has no claim while it waits, and its time limit does not run."""
    worker = Worker().begin()
    suspect = crashed(worker, "suspect")
    fresh = worker.owe("fresh")
    running = worker.run(fresh)
    log: list[str] = []

    @contextmanager
    def idle() -> Iterator[None]:
        log.append("idle")
        yield
        log.append("runs")

    with ThreadPoolExecutor(1) as pool:
        starts = pool.submit(
            lambda: worker.session.start(suspect.token, lambda: suspect, idle=idle)
        )
        eventually(lambda: log == ["idle"] and worker.claimed_by(suspect) is None)
        assert suspect.token in worker.in_flight
        worker.end(running)
        claim = starts.result(10)
    assert isinstance(claim, Claim) and claim.crashes == 1 and claim.number > 0
    assert log == ["idle", "runs"]
    # The end of the other job is committed, so the next death shows that the suspect was alone.
    assert worker.outcome(fresh) is not None
    assert worker.claimed_by(suspect) == worker.session.id


@pytest.mark.parametrize("reached", [True, False], ids=["the answer is lost", "the call is lost"])
def test_a_start_whose_release_is_in_doubt_gets_a_claim_later(*, reached: bool) -> None:
    """It has no claim number then, and the next death of its worker is charged to it."""
    worker = Worker().begin()
    suspect, fresh = crashed(worker, "suspect"), worker.owe("fresh")
    worker.run(fresh)
    release = worker.tracker._store.release

    def fails(*args: Any, **options: Any) -> None:
        if reached:
            release(*args, **options)
        raise StoreUnavailable("no answer")

    cast(Any, worker.tracker._store).release = fails
    assert worker.start(suspect) == Claim(suspect.token, 0)
    worker.session._late_claims()
    assert worker.claimed_by(suspect) == worker.session.id


def test_a_fresh_job_waits_without_a_claim() -> None:
    """A fresh job has no claim while it waits, so the suspect does not seem to run beside it."""
    worker = Worker().begin()
    suspect, fresh = crashed(worker, "suspect"), worker.owe("fresh")
    claim = worker.run(suspect)

    with ThreadPoolExecutor(1) as pool:
        starts = pool.submit(worker.start, fresh)
        eventually(lambda: fresh.token in worker.in_flight)
        assert worker.claimed_by(fresh) is None
        worker.end(claim)
        assert isinstance(starts.result(10), Claim)


def test_a_refused_start_leaves_no_trace(caplog: pytest.LogCaptureFixture) -> None:
    """A refused start does not count as running, and only the adapter logs the skip."""
    caplog.set_level(logging.INFO, "jobguard")
    worker = Worker().begin()
    job = worker.owe()
    worker.tracker.cancel(tokens=[job.token])
    assert isinstance(worker.start(job), Refused)
    assert "start_skipped" not in events(caplog.records)

    suspect = crashed(worker, "suspect")
    assert isinstance(worker.start(suspect), Claim)
    assert worker.session._alone._inside == [suspect.token]


def test_without_postgres_nothing_waits_for_a_claim() -> None:
    """A start in an outage is counted, and removed at its end."""
    worker = Worker(MemoryLedger()).begin()
    job = worker.owe()
    with outage(worker.ledger):
        claim = worker.run(job)
    assert worker.session._alone._inside == [job.token]
    worker.end(claim)
    assert worker.session._alone._inside == []
