"""The jobs of a worker that died or left."""

from __future__ import annotations

from uuid import uuid4

import pytest

from jobguard.model import DROPPED_BY_LIVE_WORKER
from tests.fakes.world import FakeWorker, World, calm, events, ids, running


def with_reports_unwritten() -> tuple[World, FakeWorker]:
    """Begin calmly, with an owed job and a worker that has reports that Postgres does not have."""
    world = World()
    worker = world.trusted()
    world.enqueue("job")
    world.run(6)
    worker.unflushed_since = world.clock.wall()
    worker.beat()
    return world, worker


def test_a_dead_workers_job_goes_back_with_takeover() -> None:
    """A single worker's death is found after worker_timeout, and its job is restored within 2 s of that."""
    world = World()
    worker = world.trusted()
    running(world, worker)
    worker.kill()

    took = world.run_until(lambda: world.broker.pushed, within=30, step=0.1)

    assert world.settings.worker_timeout <= took <= world.settings.worker_timeout + 2
    assert world.broker.pushed == world.broker.taken_over == ["job"]
    assert (world.owed()["job"].crashes, world.owed()["job"].recoveries) == (1, 1)
    assert world.owed()["job"].claim_number is None


def test_a_death_that_its_host_has_proved_is_acted_on_at_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The worker's beat process reported it: nothing waits for the silence, and it is a crash."""
    world = World()
    worker = world.trusted()
    running(world, worker)
    worker.kill()
    world.host.report_death(worker.id)

    world.run_until(lambda: world.broker.pushed == ["job"], within=2, step=0.1)
    world.run(30)

    assert world.broker.taken_over == ["job"]
    assert world.owed()["job"].crashes == 1
    assert events(caplog.records).count("worker_dead") == 1


def test_a_goodbye_costs_nothing_and_takes_no_time() -> None:
    """A job of a worker that signs off is restored at once, and is no crash."""
    world = World()
    worker = world.trusted()
    running(world, worker)
    worker.leave()

    world.run_until(lambda: world.broker.pushed == ["job"], within=2, step=0.1)

    assert world.owed()["job"].crashes == 0


def test_what_a_dead_worker_had_taken_goes_back_with_it() -> None:
    """A job that a dead worker took and did not start is restored within 2 s, and is no crash."""
    world = World()
    worker = world.trusted()
    world.enqueue(*ids(30))
    world.broker.taken = dict.fromkeys(ids(30), worker.name)
    world.run(70)
    assert world.broker.pushed == []
    worker.kill()

    took = world.run_until(lambda: len(world.broker.pushed) == 30, within=30, step=0.1)

    assert took <= world.settings.worker_timeout + 2
    assert world.broker.taken_from == [(job, worker.name) for job in ids(30)]
    assert {owed.crashes for owed in world.owed().values()} == {0}


def test_what_a_departed_worker_had_taken_goes_back_at_once() -> None:
    """A job that a worker took is restored at once if the worker, known by its session id, signs off."""
    world = World()
    worker = world.trusted()
    world.enqueue("job")
    world.broker.taken["job"] = worker.id.hex
    world.run(20)
    worker.leave()
    world.run_until(lambda: world.broker.taken_from == [("job", worker.id.hex)], within=3)


def test_a_job_that_an_unknown_worker_took_is_left_alone() -> None:
    """A job taken by an unknown name is left alone: that worker is not guarded, and may be alive."""
    world = calm()
    world.enqueue("job")
    world.broker.taken["job"] = "unguarded"
    world.run(200)
    assert world.broker.pushed == []


def test_what_a_forgotten_worker_had_taken_goes_back() -> None:
    """A job taken by an id that the ledger does not know any more is restored: that worker is long gone."""
    world = calm()
    world.enqueue("job")
    world.broker.taken["job"] = uuid4().hex
    world.run_until(lambda: world.broker.pushed == ["job"], within=130)


def test_a_dropped_job_is_restored_when_all_reports_are_written() -> None:
    """A job that a live worker dropped waits for its reports.

    The worker may have run it while it could not report to Postgres.
    """
    world, worker = with_reports_unwritten()
    world.broker.taken["job"] = DROPPED_BY_LIVE_WORKER
    world.run(130)
    assert world.broker.pushed == []

    worker.unflushed_since = None
    worker.beat()
    world.run_until(lambda: world.broker.taken_from == [("job", DROPPED_BY_LIVE_WORKER)], within=70)
