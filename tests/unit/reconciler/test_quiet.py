"""While nothing is owed, a leader asks little; what becomes owed ends that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from jobguard.reconciler.runner import SharedSigns
from jobguard.store.protocols import Brake, Signs
from tests.fakes.world import Clock, World


class Counting:
    """Counts the calls of each method of an object."""

    def __init__(self, of: Any, calls: Counter[str]) -> None:
        self._of = of
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._of, name)
        if not callable(found):
            return found

        def call(*args: Any, **options: Any) -> Any:
            self._calls[name] += 1
            return found(*args, **options)

        return call


def run(world: World, seconds: float) -> None:
    """Make steps, with the rests that the monitor asks for."""
    until = world.clock() + seconds
    while world.clock() < until:
        world.step(world.monitor.rest or 0.01)


def counted(world: World, seconds: float) -> tuple[Counter[str], Counter[str]]:
    """Return the calls of both stores in so many seconds."""
    ledger, redis = Counter[str](), Counter[str]()
    ups = world.redis._up
    world.store = Counting(world.store, ledger)
    world.redis._up = lambda: (redis.update(["command"]), ups())[1]  # type: ignore[method-assign]
    monitor = world.monitor
    for part in (monitor, monitor._trust, monitor._pulse, monitor._workers, monitor._tally):
        if hasattr(part, "_store"):
            part._store = world.store
    run(world, seconds)
    return ledger, redis


def test_a_leader_of_an_idle_site_asks_little() -> None:
    """In a minute without an owed job: a few questions a second, and the pulse moves every 2 seconds."""
    world = World()
    world.worker("w1")
    run(world, 30)
    assert world.monitor._quiet
    before = world.redis.pulse()
    ledger, redis = counted(world, 60)
    assert ledger.pop("signs") <= 61
    assert sum(ledger.values()) <= 120, ledger
    assert redis["command"] <= 60 * 6
    after = world.redis.pulse()
    assert before is not None and after is not None
    assert 27 <= after[1] - before[1] <= 32


def test_what_becomes_owed_is_looked_after_at_once() -> None:
    """The step after the sign inspects as usual, and moves the pulse."""
    world = World()
    world.worker("w1")
    run(world, 30)
    assert world.monitor.rest == 1.0
    world.enqueue("job")
    world.step(1.0)
    assert 0 < world.monitor.rest < 1.0
    world.flushall()
    run(world, 15)
    assert world.broker.pushed == ["job"]


def test_a_loss_is_seen_on_an_idle_site() -> None:
    """The pulse is read at each step."""
    world = World()
    world.worker("w1")
    run(world, 30)
    before = world.redis.pulse()
    world.flushall()
    world.step(1.0)
    after = world.redis.pulse()
    assert before is not None and after is not None
    assert after[0] != before[0], "a new epoch begins with an incident"


def test_all_threads_share_the_signs() -> None:
    """One question in three fourths of a second; a change wakes all threads."""
    clock, woken, asked = Clock(), Counter[str](), []
    signs = Signs(owed=False, requested=False)

    class Store:
        def signs(self, term: int) -> Signs:
            asked.append(term)
            return signs

    shared = SharedSigns(7, clock)
    wake: Callable[[str], Callable[[], None]] = lambda name: lambda: woken.update([name])  # noqa: E731
    shared.on_change(wake("a"))
    shared.on_change(wake("b"))
    store: Any = Store()
    for _ in range(10):
        assert not shared.read(store).owed
        clock.advance(0.05)
    assert asked == [7]
    woken.clear()
    signs = replace(signs, owed=True)
    clock.advance(1)
    assert shared.read(store).owed
    assert woken == {"a": 1, "b": 1}
    shared.forget()
    shared.read(store)
    assert len(asked) == 3


def test_signs_that_are_older_than_a_hold_do_not_release_it() -> None:
    """What another thread has read before the hold says nothing about it."""
    world = World()
    world.enqueue("job")
    run(world, 10)
    old = replace(world.signs, asked_at=world.clock())
    world.clock.advance(0.1)
    world.monitor._hold_automatically(world.term, "mail")
    world.monitor.step(world.term, old)
    assert world.monitor._brake.holds(world.monitor.source.id, "mail")
    world.monitor.step(world.term, replace(old, asked_at=world.clock() + 0.1, brake=Brake()))
    assert not world.monitor._brake.holds(world.monitor.source.id, "mail")


@pytest.mark.parametrize("timeout", [3.0, 15.0])
def test_a_worker_that_dies_on_an_idle_site_is_found(timeout: float) -> None:
    """Its death is proved by polls that are close enough to each other."""
    world = World(worker_timeout=timeout, beat_interval=timeout / 5)
    worker = world.worker("w1")
    run(world, 30)
    assert world.monitor._quiet
    world.workers.remove(worker)
    run(world, 2 * timeout + 5)
    (row,) = world.store.workers(world.monitor.source.id)
    assert row.dead


def test_a_slow_statement_does_not_end_the_wait_for_a_push_early(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The sender of a committed job has its moment from the statement on that saw the commit."""
    world = World()
    run(world, 5)
    assert world.monitor.finished

    def slowly(*_: Any, **__: Any) -> int:
        world.clock.advance(0.7)
        return 1

    monkeypatch.setattr(world.store, "see_committed", slowly)
    world.monitor._see_committed(world.term, world.clock())
    world.clock.advance(1.1)
    assert not world.monitor.finished
    world.clock.advance(0.3)
    assert world.monitor.finished
