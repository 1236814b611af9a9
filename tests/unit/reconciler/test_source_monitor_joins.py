from __future__ import annotations

from typing import Any

import pytest

from jobguard.model import Claim, Delivery, End, Join, Outcome, Part, Presence
from jobguard.store.protocols import Brake
from tests.fakes.world import NAMESPACE, SOURCE, FakeWorker, World, calm


def waiting_for(world: World, *parents: str) -> Delivery:
    """Enqueue a job that the library keeps waiting for others that it has forgotten."""
    (child,) = world.enqueue("child")
    world.broker.put(child, Presence.SCHEDULED)
    world.broker.joins["child"] = Join(parents)
    return child


def run(worker: FakeWorker, job: Delivery) -> Claim:
    """Start a job whose claim is surely granted."""
    claim = worker.start(job)
    assert isinstance(claim, Claim)
    return claim


def test_a_job_with_ended_dependencies_is_released() -> None:
    """A job whose parent completed, as only the ledger knows, is released a grace after it was seen."""
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


def test_a_job_with_an_unknown_dependency_is_released_after_a_sweep() -> None:
    """A parent that was never recorded counts as ended, but only after a sweep."""
    world = World()
    world.trusted()
    waiting_for(world, "unknown")

    took = world.run_until(lambda: world.broker.released == ["child"], within=300)

    assert took >= world.settings.sweep_interval


@pytest.mark.parametrize(
    ("settings", "brake"), [({}, Brake(paused=True)), ({"mode": "observe"}, Brake())]
)
def test_nothing_goes_on_while_it_is_held(settings: dict[str, Any], brake: Brake) -> None:
    """A pause stops the release of waiting jobs, and observe mode pushes nothing."""
    world = World(**settings)
    world.trusted()
    waiting_for(world)
    world.brake = brake

    world.run(200)

    assert world.broker.released == []


def test_one_pass_sees_a_join_twice() -> None:
    """A single pass is not finished before a waiting job was inspected again."""
    world = World()
    world.trusted()
    waiting_for(world)
    world.new_leader()

    world.run_until(lambda: world.monitor.finished, within=60)

    assert world.broker.released == ["child"]


def test_a_running_job_is_shown_again_after_a_loss() -> None:
    """A job that a live worker runs has a body again before any waiting job, and is not pushed."""
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
    """A body that was restored for a running job is removed when the job has ended."""
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
    """A unique job whose producer died before Redis could refuse it is closed and never pushed."""
    world = World()
    world.trusted()
    (twin,) = world.enqueue("job")
    world.record(world.describe("job", fresh=True))
    world.broker.put(twin)
    assert len(world.store.page(SOURCE.id, after=None, limit=9)) == 2

    world.run_until(lambda: len(world.store.page(SOURCE.id, after=None, limit=9)) == 1, within=90)

    assert world.owed()["job"].token == twin.token
    assert world.broker.pushed == []


def test_joins_are_restored_before_their_members() -> None:
    """After a loss the counts of joins are restored before the members; without a loss nothing is done."""
    world = calm()
    world.enqueue("member")
    world.host.open_join(SOURCE.id, "chord", size=2, state=b"", namespace=NAMESPACE)
    world.run(70)
    assert world.broker.rejoined == []
    seen: list[list[tuple[str, bool]]] = []
    world.broker.before_restore = lambda: seen.append(list(world.broker.rejoined))
    world.flushall()
    world.run_until(lambda: world.broker.pushed == ["member"], within=10)
    assert seen[0] == [("chord", False)]


def complete_join(world: World) -> None:
    """Record a join whose only member has ended, and whose body was never recorded."""
    worker = world.trusted()
    (member,) = world.enqueue("member")
    world.host.open_join(SOURCE.id, "chord", size=1, state=b"", namespace=NAMESPACE)
    claim = worker.start(member)
    assert isinstance(claim, Claim)
    end = End(member.token, claim.number, Outcome.COMPLETED, worker.id, part=Part("chord"))
    world.host.end(SOURCE.id, [end])


def test_a_complete_join_is_reported_until_its_body_is_recorded() -> None:
    """A complete join is reported again after the grace, with growing waits, until its body is recorded."""
    world = World()
    complete_join(world)
    world.run(world.settings.grace - 1)
    assert world.broker.rejoined == []
    world.run(5)
    assert world.broker.rejoined == [("chord", True)]
    world.run(100)
    assert world.broker.rejoined == [("chord", True)] * 3
    world.record(world.describe("body", closes="chord"))
    world.run(300)
    assert world.broker.rejoined == [("chord", True)] * 3


def test_a_complete_join_is_reported_at_once_after_a_loss() -> None:
    """A loss deletes what was pushed for a join too, so that the first report comes at once again."""
    world = World()
    complete_join(world)
    world.run_until(lambda: world.broker.rejoined == [("chord", True)] * 2, within=60)
    world.flushall()
    world.run(world.settings.grace + 5)
    assert world.broker.rejoined.count(("chord", True)) == 3


def test_a_paused_leader_finishes_no_join() -> None:
    """A paused leader finishes no join, because that would push a job."""
    world = World()
    complete_join(world)
    world.brake = Brake(paused=True)
    world.run(60)
    assert world.broker.rejoined == []
