"""Queues that an unguarded worker may have consumed."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from jobguard.model import Cause, new_token
from jobguard.pulse import NO_PULSE
from tests.fakes.world import SOURCE, World, calm, events, ids


def test_the_untrusted_is_held_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    """While an unguarded worker consumes the queue, nothing is restored, and a log line says so."""
    caplog.set_level(logging.INFO, "jobguard")
    world = World()
    world.broker.names["mail"] = frozenset({"unguarded"})
    world.worker()
    world.run(10)
    world.enqueue("job")
    world.run(6)
    world.flushall()

    world.run(120)

    assert world.broker.pushed == []
    assert world.monitor.result.untrusted > 0
    assert "queue_untrusted" in events(caplog.records)
    assert not world.is_trusted("mail")


def test_a_loss_before_the_first_worker_is_repaired() -> None:
    """If no unguarded worker was ever seen, a loss before the first worker is repaired."""
    world = World()
    world.run(5)
    world.enqueue(*ids(20))
    world.run(6)
    world.flushall()

    world.run_until(lambda: len(world.broker.pushed) == 20, within=30)
    world.run_until(lambda: world.store.incidents(SOURCE.id) == [], within=30)


@pytest.mark.parametrize("kind", ["flushed", "restarted", "taken"])
def test_a_loss_before_the_first_inspection(kind: str) -> None:
    """Redis reports a restart and a flush; a job that is absent without either was run by a worker."""
    world = World()
    world.enqueue(*ids(3))
    world.clock.advance(20)
    if kind == "taken":
        world.broker.bodies.clear()
    else:
        world.flushall() if kind == "flushed" else world.restart()
    world.new_leader()

    world.run(90)

    assert world.broker.pushed == ([] if kind == "taken" else ids(3))
    assert set(world.suspects()) == (set(ids(3)) if kind == "taken" else set())


def test_the_database_is_not_asked_for_its_time_for_each_delivery(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The number of questions does not grow with the deliveries that are checked after a gap."""

    def asked(count: int) -> int:
        world = World()
        world.enqueue(*ids(count))
        world.clock.advance(20)
        world.flushall()
        world.new_leader()
        kind: Any = type(world.store)
        now = kind.now
        questions: list[float] = []

        def counted(self: Any) -> float:
            questions.append(now(self))
            return questions[-1]

        with monkeypatch.context() as patch:
            patch.setattr(kind, "now", counted)
            world.run(10)
        return len(questions)

    assert asked(60) - asked(6) < 27


def test_a_rollback(caplog: pytest.LogCaptureFixture) -> None:
    """A job that an unguarded image took in a gap is not run again; the others are trusted."""
    world = calm()
    world.enqueue("taken", "kept")
    world.run(6)
    for worker in world.workers:
        worker.leave()
    world.workers.clear()
    world.clock.advance(30)
    world.broker.bodies.pop("taken")
    world.new_leader()
    world.worker("w2")

    world.run(120)
    assert world.broker.pushed == []
    assert world.suspects() == {"taken": Cause.UNTRUSTED}
    assert "jobs_untrusted" in events(caplog.records)
    world.flushall()

    world.run_until(lambda: world.broker.pushed == ["kept"], within=30)


@pytest.mark.parametrize("away", [8.0, 600.0])
def test_a_loss_while_no_leader_watched(away: float) -> None:
    """Lost jobs are restored after any time without a leader, if no unguarded worker was seen."""
    world = calm()
    world.enqueue(*ids(3))
    world.run(6)
    world.clock.advance(away)
    world.flushall()
    world.new_leader()

    world.run_until(lambda: world.broker.pushed == ids(3), within=60)


def test_a_loss_right_after_a_change_of_leaders() -> None:
    """A loss is repaired by a new leader that has not checked the backlog yet."""
    world = calm()
    world.enqueue(*ids(3))
    world.run(6)
    world.clock.advance(12)
    world.new_leader()
    world.flushall()

    world.run_until(lambda: world.broker.pushed == ids(3), within=30)


def test_what_was_suspected_before_a_change_of_leaders_is_restored() -> None:
    """A job that a leader saw absent while the queue was trusted is restored after the gap."""
    world = calm()
    (job,) = world.enqueue("job")
    world.run(70)
    world.broker.bodies.pop("job")
    world.run_until(world.suspects, within=70)
    world.clock.advance(12)
    world.new_leader()

    world.run_until(lambda: world.broker.pushed == ["job"], within=90)
    assert world.outcome(job) is None


def test_what_was_absent_before_the_trust_is_never_recovered(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A job that an unguarded worker may have run is not restored after that worker left; the rest is."""
    caplog.set_level(logging.INFO, "jobguard")
    world = World()
    world.worker()
    world.broker.names["mail"] |= {"unguarded"}
    world.enqueue("taken", "kept")
    world.run(10)
    del world.broker.bodies["taken"]
    world.broker.names["mail"] = frozenset({"w1"})

    world.run_until(lambda: world.is_trusted("mail"), within=60)
    assert world.suspects()["taken"] is Cause.UNTRUSTED
    assert {"queue_trusted", "jobs_untrusted"} <= set(events(caplog.records))
    world.flushall()
    world.run(120)

    assert world.broker.pushed == ["kept"]


def test_the_outbox_of_before_the_trust_is_pushed() -> None:
    """A job that was surely not pushed cannot have been run by an unguarded worker: it is pushed."""
    world = World()
    world.record(world.describe("job"), outbox=True)
    world.clock.advance(5)
    world.new_leader()
    world.trusted()

    world.run(120)

    assert world.broker.pushed == ["job"]


@pytest.mark.parametrize("pulse", [NO_PULSE, (new_token(), 7)])
def test_the_jobs_of_a_worker_in_another_redis_are_not_put_into_this_one(
    pulse: tuple[Any, int], caplog: pytest.LogCaptureFixture
) -> None:
    """Two Redises of one source name: what is absent here may wait there, from the first beat on."""
    world = calm()
    stray = world.worker()
    stray.sees_redis, stray.pulse = False, pulse
    stray.beat()
    world.run(3)
    world.enqueue("job")
    world.broker.bodies.clear()
    world.run(120)

    assert world.broker.pushed == []
    assert events(caplog.records).count("worker_in_another_redis") == 1
    assert not world.is_trusted("mail")
    world.flushall()  # it may wait there also after a loss here
    world.run(30)
    assert world.broker.pushed == []
    stray.leave()
    world.run_until(lambda: world.is_trusted("mail"), within=700)
