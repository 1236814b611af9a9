"""Queues that a person or the monitor holds."""

from __future__ import annotations

import logging

import pytest

from jobguard.store.protocols import Brake
from tests.fakes.world import SOURCE, World, calm, events, ids, resume


@pytest.mark.parametrize(
    "brake",
    [Brake(paused=True), Brake(held={f"{SOURCE.id}/mail": {}}), Brake(held={f"{SOURCE.id}/*": {}})],
    ids=["all", "queue", "source"],
)
def test_a_pause_holds(brake: Brake) -> None:
    """During a pause lost jobs wait, and their incident stays open."""
    world = calm()
    world.enqueue("job")
    world.run(6)
    world.brake = brake
    world.flushall()
    world.run(70)
    assert world.broker.pushed == []
    assert len(world.store.incidents(SOURCE.id)) == 1

    world.brake = Brake()
    world.run_until(lambda: world.broker.pushed == ["job"], within=2)
    world.run(2)
    assert world.store.incidents(SOURCE.id) == []


def test_a_pause_of_another_queue_holds_nothing_here() -> None:
    """A pause of one queue does not affect another one."""
    world = calm()
    world.enqueue("job")
    world.run(6)
    world.brake = Brake(held={f"{SOURCE.id}/video": {}})
    world.flushall()

    world.run_until(lambda: world.broker.pushed == ["job"], within=5)


def emptied(world: World, count: int, *, age: float = 80) -> None:
    """Let a tool that does not know jobguard empty the queue, when its jobs are this old."""
    world.enqueue(*ids(count))
    world.run(age)
    world.broker.bodies.clear()


@pytest.mark.parametrize("age", [80, 12])
def test_too_many_unexplained_absences_hold_the_queue(
    caplog: pytest.LogCaptureFixture, age: float
) -> None:
    """A queue that was emptied is held automatically, and an error is logged.

    This is also the case where its jobs are young: an inspection saw them in Redis.
    """
    caplog.set_level(logging.ERROR, "jobguard")
    world = calm()
    emptied(world, 150, age=age)

    world.run(90)

    assert world.broker.pushed == []
    assert f"{SOURCE.id}/mail" in world.store.signs(world.term).brake.held
    assert "queue_held" in events(caplog.records)


def test_a_few_unexplained_absences_go_back() -> None:
    """A few jobs without a cause are restored after two inspections a grace apart."""
    world = calm()
    emptied(world, 5)

    world.run_until(lambda: "job-0000" in world.suspects(), within=70)
    seen_at = world.clock()
    world.run_until(lambda: len(world.broker.pushed) == 5, within=20)

    assert world.clock() - seen_at >= world.settings.grace - 0.5


def test_unexplained_may_be_held_by_setting() -> None:
    """With unexplained="hold" jobs that are absent without a cause are reported, and not restored."""
    world = calm(unexplained="hold")
    emptied(world, 5)

    world.run(150)

    assert world.broker.pushed == []
    assert len(world.suspects()) == 5


def test_a_person_resumes_a_queue_that_held_itself() -> None:
    """After `resume` the jobs of an automatically held queue are restored."""
    world = calm()
    emptied(world, 150)
    world.run_until(lambda: world.store.signs(world.term).brake.held, within=100)

    resume(world)
    world.run(30)

    assert len(world.broker.pushed) == 150


def test_waiting_for_the_limiter_is_no_new_absence() -> None:
    """Absences that wait for the limiter are counted once."""
    world = calm(repair_rate=1.0, brake_count=30, brake_share=1.0)
    emptied(world, 20)

    world.run_until(lambda: world.broker.pushed, within=100)
    world.run(10)

    assert not world.store.signs(world.term).brake.held
