"""Outages and changes of Redis, and the walks that verify all deliveries."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import redis

from tests.fakes.world import SOURCE, World, calm, running


def test_a_redis_that_goes_away_in_the_middle() -> None:
    """If Redis is gone at the push, the job is restored when Redis is back."""
    world = calm()
    world.enqueue("job")
    world.run(6)
    world.flushall()

    def vanish() -> None:
        world.redis.error = redis.ConnectionError("gone")
        world.broker.before_restore = lambda: None

    world.broker.before_restore = vanish
    world.run(5)
    assert world.broker.pushed == []

    world.redis.error = None
    world.run_until(lambda: world.broker.pushed == ["job"], within=5)


def test_while_redis_is_down_no_worker_is_dead_and_no_job_is_absent() -> None:
    """An outage of Redis is neither a loss nor the death of a worker."""
    world = World()
    worker = world.trusted()
    running(world, worker)
    worker.kill()
    world.redis.error = redis.BusyLoadingError("LOADING")

    world.run(60)

    assert world.suspects() == {}
    assert not any(row.dead for row in world.store.workers(SOURCE.id))
    assert world.store.incidents(SOURCE.id) == []


def verified(world: World, act: Callable[[], None]) -> float:
    """Return how long after this act an absence was seen that only a walk can find."""
    world.enqueue("job")
    world.run(130)
    world.run_until(lambda: not world.monitor._lap.running, within=60)
    world.broker.bodies.clear()
    act()
    return world.run_until(lambda: "job" in world.suspects(), within=60, step=0.1)


@pytest.mark.parametrize("doubt", ["restart", "eviction", "reconnect"])
def test_a_change_of_redis_is_verified_at_once(doubt: str) -> None:
    """After a change of topology, an eviction or a reconnect all owed deliveries are inspected at once."""
    world = calm()

    def act() -> None:
        if doubt == "restart":
            world.redis.run_id = "another"
        elif doubt == "eviction":
            world.redis.evicted += 1
        else:
            world.redis.error = redis.ConnectionError("gone")
            world.run(1)
            world.redis.error = None

    assert verified(world, act) <= 2


def test_the_sweep_finds_what_nothing_hints_at() -> None:
    """A job that vanished without any sign is inspected within sweep_interval."""
    world = calm()

    assert verified(world, lambda: None) <= world.settings.sweep_interval
