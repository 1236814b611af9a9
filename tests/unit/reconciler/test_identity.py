"""The identity check: at the wrong Redis nothing is restored."""

from __future__ import annotations

from dataclasses import replace
from uuid import uuid4

from jobguard.pulse import ACCEPTED, beat_key
from tests.fakes.world import SOURCE, World, calm, ids, resume


def moved(world: World, *, named: bool = False) -> None:
    """Let a new leader start at a Redis that is empty and another server process."""
    world.flushall()
    world.redis.restart()
    world.new_leader(named=named)


def lead_with_old_data(world: World) -> tuple[str, int]:
    """Let a new leader start at a Redis with an older pulse and no jobs; return the pulse before."""
    pulse = world.redis.pulse()
    assert pulse is not None
    world.redis.set_pulse(n=pulse[1] - 10)
    world.redis.run_id = "another process"
    world.broker.bodies.clear()
    world.new_leader()
    return pulse


def moved_without_workers() -> World:
    """Owe a job, and begin with another leader in an empty Redis when no worker is left."""
    world = World()
    world.trusted().leave()
    world.enqueue("job")
    world.run(20)
    moved(world)
    return world


def test_an_unnamed_ledger_without_workers_asks_a_person() -> None:
    """Without a worker to confirm the Redis, all queues are held until a person resumes them."""
    world = moved_without_workers()

    world.run(9)
    assert not world.store.signs(world.term).brake.held
    world.run(60)
    assert f"{SOURCE.id}/*" in world.store.signs(world.term).brake.held
    assert world.redis.pulse() is None
    assert world.broker.pushed == []

    resume(world)
    world.run_until(lambda: world.broker.pushed == ["job"], within=20)


def test_a_brake_that_was_read_before_the_hold_does_not_end_it() -> None:
    """The threads of a leader share what one of them has read of the brake a moment ago."""
    world = moved_without_workers()
    held = f"{SOURCE.id}/*"
    before = replace(world.signs, asked_at=world.clock())
    for _ in range(400):
        world.clock.advance(0.25)
        now = world.signs
        if held in now.brake.held:
            break
        before = replace(now, asked_at=world.clock())
        world.monitor.step(world.term, before)
    assert held in world.signs.brake.held
    for _ in range(8):
        world.clock.advance(0.25)
        world.monitor.step(world.term, before)
    assert world.redis.pulse() is None


def test_a_worker_confirms_the_redis() -> None:
    """A worker that misses the pulse as the leader does confirms the Redis."""
    world = calm()
    world.enqueue("job")
    world.run(6)
    moved(world)

    world.run_until(lambda: world.broker.pushed == ["job"], within=15)


def test_a_worker_that_sees_the_pulse_elsewhere() -> None:
    """If workers read the pulse in another Redis, the leader never changes this one."""
    world = World()
    worker = world.trusted()
    world.enqueue("job")
    world.run(6)
    worker.sees_redis = False  # It goes on to report the pulse of the right Redis.
    moved(world)

    world.run(60)

    assert world.redis.pulse() is None
    assert world.broker.pushed == []
    assert world.store.incidents(SOURCE.id) == []


def test_a_named_ledger_listens_to_its_workers_as_well() -> None:
    """A named ledger at the wrong Redis changes nothing, if its workers read the pulse elsewhere."""
    world = World()
    worker = world.trusted()
    world.enqueue("job")
    world.run(6)
    worker.sees_redis = False
    moved(world, named=True)

    world.run(60)

    assert world.redis.pulse() is None
    assert world.broker.pushed == []


def test_one_worker_that_sees_the_pulse_elsewhere_is_enough() -> None:
    """A worker that reads no pulse does not outvote one that reads it."""
    world = World()
    blind = world.trusted()
    seeing = world.worker("w2")
    world.enqueue("job")
    world.run(6)
    assert blind.id < seeing.id
    blind.sees_redis, blind.pulse = False, None
    seeing.sees_redis = False
    moved(world)

    world.run(60)

    assert world.redis.pulse() is None
    assert world.broker.pushed == []


def test_a_redis_with_old_data_is_confirmed_by_its_workers() -> None:
    """A leader that starts beside a Redis with an older pulse restores after the next beat.

    It began to poll in the middle of one: Redis had that beat, and Postgres did not.
    """
    world = World()
    worker = world.trusted()
    world.enqueue("job")
    world.run(6)
    world.redis.strings[beat_key(worker.id)] = str(worker._counter + 1).encode()
    lead_with_old_data(world)

    world.run_until(lambda: world.broker.pushed == ["job"], within=30)


def test_an_old_master_is_not_the_right_place() -> None:
    """A leader at a master from before a failover stops, because its workers read the new pulse."""
    world = World()
    worker = world.trusted()
    world.enqueue("job")
    world.run(6)
    worker.sees_redis = False  # It reads the pulse of the new master.
    pulse = lead_with_old_data(world)

    world.run(60)

    assert world.broker.pushed == []
    assert world.redis.pulse() == (pulse[0], pulse[1] - 10)


def test_a_ledger_that_forgot_touches_nothing() -> None:
    """A pulse that is ahead of Postgres stops the monitor, even if jobs are absent."""
    world = calm()
    world.enqueue("job")
    world.run(6)
    pulse = world.redis.pulse()
    assert pulse is not None
    world.redis.set_pulse(n=pulse[1] + 50)
    world.broker.bodies.clear()

    world.run(100)

    assert world.broker.pushed == []
    assert world.suspects() == {}


def test_a_loss_behind_an_accepted_move() -> None:
    """A Redis that is empty at `resume --moved` has lost the owed jobs."""
    world = calm()
    world.enqueue(*ids(150))
    world.run(80)
    sources = world.ledger._tables.sources
    sources[SOURCE.id] = replace(
        sources[SOURCE.id], pulse_epoch=None, pulse_n=ACCEPTED, run_id=None
    )
    moved(world)

    world.run(120)

    assert len(world.broker.pushed) == 150


def test_another_ledgers_redis_is_left_alone() -> None:
    """A pulse of another installation stops the monitor."""
    world = calm()
    world.enqueue("job")
    world.run(6)
    world.redis.set_pulse(installation=uuid4())
    world.broker.bodies.clear()

    world.run(100)

    assert world.broker.pushed == []
