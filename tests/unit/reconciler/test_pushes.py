"""Jobs that were recorded and not pushed, and young jobs on their way to a worker."""

from __future__ import annotations

from jobguard.model import Presence
from tests.fakes.world import SOURCE, World, calm


def test_the_outbox_is_pushed_at_once() -> None:
    """A recorded job whose push was left to the leader is pushed with the next inspections."""
    world = calm()
    world.record(world.describe("job"), outbox=True)

    world.run_until(lambda: world.broker.pushed == ["job"], within=0.5, step=0.1)

    assert world.store.watched(SOURCE.id, limit=9) == []


def test_an_outbox_that_was_pushed_after_all() -> None:
    """A job in the outbox that Redis has is not pushed again."""
    world = calm()
    (job,) = world.enqueue("job")
    world.host.outbox(SOURCE.id, [job.token])

    world.run(20)

    assert world.broker.pushed == []
    assert world.store.watched(SOURCE.id, limit=9) == []


def test_a_producer_that_died_before_its_push() -> None:
    """A job that was recorded and never pushed is found absent, and pushed within 30 s."""
    world = calm()
    world.enqueue("job", push=False)

    took = world.run_until(lambda: world.broker.pushed == ["job"], within=30)

    assert took >= world.settings.push_deadline


def test_a_young_job_has_its_grace() -> None:
    """A young job that was seen absent once (on its way to a worker) is restored only after the grace."""
    world = calm()
    (job,) = world.enqueue("job")
    world.run(6)
    del world.broker.bodies["job"]
    world.run_until(lambda: "job" in world.suspects(), within=10, step=0.1)
    seen_at = world.clock()

    world.run_until(lambda: world.broker.pushed, within=30, step=0.1)

    assert world.clock() - seen_at >= world.settings.grace - 0.1
    assert world.outcome(job) is None


def test_a_job_on_its_way_after_another_workers_goodbye_has_its_grace() -> None:
    """A job on its way to a worker keeps its grace when another worker signs off."""
    world = World()
    world.trusted()
    other = world.worker("w2")
    (job,) = world.enqueue("job")
    world.run(70)
    other.leave()
    world.run(1)
    del world.broker.bodies["job"]
    world.run_until(lambda: "job" in world.suspects(), within=70, step=0.1)
    seen_at = world.clock()

    world.run_until(lambda: world.broker.pushed, within=30, step=0.1)

    assert world.clock() - seen_at >= world.settings.grace - 0.1
    assert world.outcome(job) is None


def test_an_unclaimed_run_is_not_taken_over_for_anothers_goodbye() -> None:
    """A job that the library shows as running, unclaimed, is left alone when another worker leaves."""
    world = World()
    world.trusted()
    other = world.worker("w2")
    (job,) = world.enqueue("job")
    world.broker.put(job, Presence.RUNNING)
    world.run(70)

    other.leave()
    world.run(130)

    assert world.broker.pushed == []
