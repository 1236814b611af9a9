"""Deliveries that are absent or overwritten, and must not be restored."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from uuid import UUID

import pytest

from jobguard.model import Claim, Outcome, Parent, Presence
from tests.fakes.world import SOURCE, World, calm, events


def test_a_claimed_job_of_a_live_worker_is_never_recovered() -> None:
    """A job whose worker beats and lists it is left alone, even for hours."""
    world = World()
    worker = world.trusted()
    (job,) = world.enqueue("job")
    claim = worker.start(job)
    assert isinstance(claim, Claim)
    worker.beat()
    world.flushall()

    world.run(7200, step=1.5)

    assert world.broker.pushed == []
    assert worker.end(job, claim).value == "ended"


def test_a_listed_job_is_never_recovered_though_unclaimed() -> None:
    """A job started while Postgres was away is protected by its worker's list."""
    world = World()
    worker = world.trusted()
    (job,) = world.enqueue("job")
    worker.in_flight.append(job.token)
    worker.beat()
    world.flushall()

    world.run(200)

    assert world.broker.pushed == []
    assert "job" in world.owed()


def test_a_cancelled_job_stays_cancelled() -> None:
    """A job that was cancelled before the loss is not restored."""
    world = calm()
    world.enqueue("kept", "cancelled")
    world.run(6)
    world.host.cancel(SOURCE.id, job_ids=["cancelled"], meant=world.host.now())
    world.flushall()

    world.run(30)

    assert world.broker.pushed == ["kept"]


def test_an_expired_job_is_closed() -> None:
    """A job that the library would have dropped by now is closed as cancelled, and not restored."""
    world = calm()
    (job,) = world.enqueue("job", expires_at=world.clock.wall() + 8)
    world.run(9)
    world.flushall()

    world.run(10)

    assert world.broker.pushed == []
    assert world.outcome(job) is Outcome.CANCELLED


@pytest.mark.parametrize(
    ("presence", "outcome"),
    [
        (Presence.FINISHED, Outcome.COMPLETED),
        (Presence.FAILED, Outcome.FAILED),
        (Presence.CANCELLED, Outcome.CANCELLED),
    ],
)
def test_an_end_that_only_redis_knows(presence: Presence, outcome: Outcome) -> None:
    """A job that the library has ended, without a report, is closed with the library's outcome."""
    world = calm()
    (job,) = world.enqueue("job")
    world.broker.put(job, presence)

    world.run_until(lambda: world.outcome(job) is outcome, within=60)

    assert world.owed() == {}
    assert world.broker.pushed == []


def test_a_job_that_a_live_worker_dropped_waits_for_its_reports() -> None:
    """A job that its live worker dropped is not restored before all reports are written.

    A child process may have ended or retried it while Postgres was away.
    """
    world = calm()
    (job,) = world.enqueue("job")
    worker = world.workers[0]
    claim = worker.start(job)
    assert isinstance(claim, Claim)
    world.run(4)
    world.broker.bodies.clear()
    worker.in_flight.clear()
    worker.unflushed_since = world.clock.wall()

    world.run(60)

    assert world.broker.pushed == []
    worker.end(job, claim)
    worker.unflushed_since = None
    world.run(10)
    assert world.outcome(job) is Outcome.COMPLETED
    assert world.broker.pushed == []


def test_a_job_that_ends_during_an_inspection(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A job that its worker ends before the leader closes it is neither logged nor counted as closed."""
    world = calm()
    (job,) = world.enqueue("job")
    worker = world.workers[0]
    claim = worker.start(job)
    assert isinstance(claim, Claim)
    world.broker.bodies.clear()
    tombstones = world.store.tombstones

    def end_and_return(source: int, tokens: Sequence[UUID]) -> Mapping[UUID, Outcome]:
        if job.token in tokens:
            worker.end(job, claim)
        return tombstones(source, tokens)

    monkeypatch.setattr(world.store, "tombstones", end_and_return)
    with caplog.at_level(logging.INFO):
        world.run_until(lambda: not world.owed(), within=120)
        world.run(5)

    assert world.outcome(job) is Outcome.COMPLETED
    assert "job_closed" not in events(caplog.records)


def test_overwritten_by_another_life() -> None:
    """A delivery in whose place a newer recorded one stands is closed after two inspections, not one."""
    world = calm()
    (job,) = world.enqueue("job")
    world.run(80)
    other = world.describe("job", fresh=True)
    world.record(other)
    world.broker.put(other)

    world.run_until(lambda: (SOURCE.id, job.token) in world.ledger._tables.suspects, within=60)
    seen_at = world.clock()
    world.run_until(lambda: world.outcome(job) is Outcome.SUPERSEDED, within=20)

    assert world.clock() - seen_at >= world.settings.grace - 0.5
    assert world.broker.pushed == []


def test_an_unrecorded_delivery_replaces_none_for_good() -> None:
    """A delivery replaced by an unrecorded retry stays owed; if that one is lost, it is restored."""
    world = calm()
    (job,) = world.enqueue("job")
    world.run(80)
    world.broker.put(world.describe("job"))
    world.run(200)
    assert world.outcome(job) is None

    world.flushall()
    world.run_until(lambda: world.broker.pushed == ["job"], within=10)


def test_an_older_life_in_its_place_is_replaced() -> None:
    """A retry that was recorded and not pushed replaces the body that it superseded."""
    world = World()
    worker = world.trusted()
    (first,) = world.enqueue("job")
    claim = worker.start(first)
    assert isinstance(claim, Claim)
    retry = world.describe("job", parent=Parent(first.token, claim.number))
    worker.in_flight.clear()
    world.record(retry)
    assert world.outcome(first) is Outcome.SUPERSEDED

    world.run_until(lambda: world.broker.pushed == ["job"], within=60)

    assert world.broker.bodies["job"] == (retry.token, Presence.WAITING)
    assert world.owed()["job"].token == retry.token
    # The library would keep the run of the first delivery until the timeout of the job ends.
    assert world.broker.taken_over == ["job"]


def test_an_older_life_that_a_worker_lists_is_not_taken_over() -> None:
    """An older delivery that the ledger has ended, but a live worker lists, is left to finish."""
    world = World()
    worker = world.trusted()
    (first,) = world.enqueue("job")
    claim = worker.start(first)
    assert isinstance(claim, Claim)
    world.record(world.describe("job", parent=Parent(first.token, claim.number)))
    assert first.token in worker.in_flight
    world.run_until(lambda: world.broker.pushed == ["job"], within=60)
    assert world.broker.taken_over == []


def test_an_older_life_does_not_come_back_when_a_later_one_has_run() -> None:
    """A delivery is not restored after a loss if an unrecorded retry of it has run."""
    world = World()
    worker = world.trusted()
    (first,) = world.enqueue("job")
    assert isinstance(worker.start(first), Claim)
    worker.beat()
    world.run(1)
    retry = world.describe("job")
    world.record(retry)  # Its worker records it at the start: its parent is not known.
    claim = worker.start(retry)
    assert isinstance(claim, Claim)
    worker.end(retry, claim)
    worker.in_flight.clear()
    world.flushall()

    world.run_until(lambda: world.outcome(first) is Outcome.SUPERSEDED, within=60)

    assert world.outcome(retry) is Outcome.COMPLETED
    assert world.broker.pushed == []


def test_a_scheduled_job_is_where_it_belongs() -> None:
    """A delayed job in Redis is no suspect; a lost one is restored before it is due."""
    world = calm()
    (job,) = world.enqueue("job", due_at=world.clock.wall() + 3600)
    world.broker.put(job, Presence.SCHEDULED)
    world.run(130)
    assert world.suspects() == {}

    world.flushall()
    world.run_until(lambda: world.broker.pushed == ["job"], within=10)
