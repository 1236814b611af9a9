from __future__ import annotations

from typing import Any

import pytest

from jobguard.model import Claim, Delivery, Join, Presence
from jobguard.store.protocols import Brake
from tests.fakes.world import SOURCE, FakeWorker, World


def waiting_for(world: World, *parents: str) -> Delivery:
    """Enqueue a job that the library holds back for others that it has forgotten."""
    (child,) = world.enqueue("child")
    world.broker.put(child, Presence.SCHEDULED)
    world.broker.joins["child"] = Join(parents)
    return child


def run(worker: FakeWorker, job: Delivery) -> Claim:
    """Start a job that is surely granted."""
    claim = worker.start(job)
    assert isinstance(claim, Claim)
    return claim


def test_what_waits_in_vain_goes_on() -> None:
    """A7: its parent completed, which only the ledger knows: it goes on, a grace after it was seen."""
    world = World()
    worker = world.trusted()
    (parent,) = world.enqueue("parent")
    claim = run(worker, parent)
    waiting_for(world, "parent")
    world.run(130)
    assert world.broker.released == []

    worker.end(parent, claim)
    del world.broker.bodies["parent"]
    took = world.run_until(lambda: world.broker.released == ["child"], within=80)

    assert took >= world.settings.grace
    assert world.owed()["child"].recoveries == 1
    assert world.broker.pushed == []


def test_what_waits_for_a_stranger_goes_on_after_a_sweep() -> None:
    """Of a parent that nobody ever recorded it is believed that it has ended, but not at once."""
    world = World()
    world.trusted()
    waiting_for(world, "stranger")

    took = world.run_until(lambda: world.broker.released == ["child"], within=300)

    assert took >= world.settings.sweep_interval


@pytest.mark.parametrize(
    ("settings", "brake"), [({}, Brake(paused=True)), ({"mode": "observe"}, Brake())]
)
def test_nothing_goes_on_while_it_is_held(settings: dict[str, Any], brake: Brake) -> None:
    """A pause holds what waits in vain, and observation pushes nothing."""
    world = World(**settings)
    world.trusted()
    waiting_for(world)
    world.brake = brake

    world.run(200)

    assert world.broker.released == []


def test_one_pass_sees_a_join_twice() -> None:
    """A single pass is not over before what waits in vain was looked at again."""
    world = World()
    world.trusted()
    waiting_for(world)
    world.new_leader()

    world.run_until(lambda: world.monitor.finished, within=60)

    assert world.broker.released == ["child"]


def test_a_running_job_is_shown_again_after_a_loss() -> None:
    """What a live worker runs has a body again before anything that waits for it, and is not pushed."""
    world = World()
    worker = world.trusted()
    (parent,) = world.enqueue("parent")
    run(worker, parent)
    worker.beat()
    world.enqueue("other")
    world.run(8)
    world.flushall()

    world.run_until(lambda: "other" in world.broker.pushed, within=10, step=0.1)

    assert world.broker.shown == ["parent"]
    assert world.broker.pushed == ["other"]


def test_what_was_shown_and_ended_unseen_is_hidden() -> None:
    """A body that was put back for a running job does not outlive it."""
    world = World()
    worker = world.trusted()
    (job,) = world.enqueue("job")
    claim = run(worker, job)
    world.run(8)
    world.flushall()
    world.run_until(lambda: world.broker.shown == ["job"], within=10)

    worker.end(job, claim)

    world.run_until(lambda: "job" not in world.broker.bodies, within=10)


def test_a_unique_job_that_was_refused_unseen() -> None:
    """A9: recorded, and its producer died before Redis could refuse it: it is closed, never pushed."""
    world = World()
    world.trusted()
    (twin,) = world.enqueue("job")
    world.record(world.describe("job", fresh=True))
    world.broker.put(twin)
    assert world.store.count(SOURCE.id) == {"mail": 2}

    world.run_until(lambda: world.store.count(SOURCE.id) == {"mail": 1}, within=90)

    assert world.owed()["job"].token == twin.token
    assert world.broker.pushed == []
