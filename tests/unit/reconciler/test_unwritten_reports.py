"""While reports may be unwritten, absence is not judged."""

from __future__ import annotations

from tests.fakes.world import FakeWorker, World


def with_reports_unwritten() -> tuple[World, FakeWorker]:
    """Begin calmly, with an owed job and a worker that has reports that Postgres does not have."""
    world = World()
    worker = world.trusted()
    world.enqueue("job")
    world.run(6)
    worker.unflushed_since = world.clock.wall()
    worker.beat()
    return world, worker


def test_an_unflushed_worker_blocks_the_judgement() -> None:
    """While a live worker has unwritten reports no delivery is judged lost."""
    world, worker = with_reports_unwritten()
    world.flushall()
    world.run(60)
    assert world.broker.pushed == []

    worker.unflushed_since = None
    worker.beat()
    world.run_until(lambda: world.broker.pushed == ["job"], within=3)


def test_a_worker_without_a_beat_yet_blocks_the_judgement() -> None:
    """A new leader waits until every earlier worker has beaten or is dead."""
    world = World()
    worker = world.trusted()
    world.enqueue("job")
    world.run(6)
    worker.kill()
    world.flushall()
    world.new_leader()

    took = world.run_until(lambda: world.broker.pushed == ["job"], within=30)

    assert took >= world.settings.worker_timeout
