"""The pulse and the beats do not wait for a walk over long queues."""

from __future__ import annotations

from jobguard.reconciler.tally import Tally
from tests.fakes.world import SOURCE, World


def test_the_pulse_moves_and_a_death_is_seen_in_the_middle_of_a_read() -> None:
    """While one read of a queue takes long, the pulse moves on and a silent worker is declared dead."""
    world = World()
    worker = world.trusted()
    world.enqueue("job")
    before = world.redis.pulse()
    moved: list[tuple[int, bool]] = []

    def slow() -> None:
        world.broker.reading = lambda: None
        worker.alive = False
        for _ in range(40):
            world.clock.advance(0.5)
            world.broker._pause()
        after = world.redis.pulse()
        (row,) = world.store.workers(SOURCE.id)
        moved.append((0 if after is None else after[1], row.dead))

    world.broker.reading = slow
    world.run_until(lambda: bool(moved), within=90)

    assert before is not None
    (n, dead), *_ = moved
    assert dead and n >= before[1] + 40


def test_a_loss_in_the_middle_of_a_read_is_repaired() -> None:
    """A Redis that loses its data during a read of a queue is repaired from the next step on."""
    world = World()
    world.trusted()
    world.enqueue(*(f"job{n}" for n in range(5)))

    def flushed() -> None:
        world.broker.reading = lambda: None
        world.flushall()
        world.clock.advance(1.0)
        world.broker._pause()

    world.broker.reading = flushed
    world.run_until(lambda: sorted(world.broker.pushed) == [f"job{n}" for n in range(5)], within=90)
    assert [loss.missing for loss in world.ledger._tables.incidents.values()] == [5]


def test_a_tally_counts_in_slices() -> None:
    """Owed deliveries are counted slice by slice; a queue is known as soon as one of its deliveries is."""
    world = World()
    world.enqueue(*(f"job{n}" for n in range(5)))
    world.enqueue("other", queue="bulk")
    tally = Tally(world.store, SOURCE.id, world.clock)
    tally._slice.rows = 2
    tally.saw(["seen"])
    assert tally.queues == {"seen"}
    for _ in range(4):
        assert tally.total == 0
        tally._slice.rows = 2
        tally.step()
    assert (tally.total, tally.of("mail"), tally.of("bulk")) == (6, 5, 1)
    assert tally.queues == {"mail", "bulk"}
