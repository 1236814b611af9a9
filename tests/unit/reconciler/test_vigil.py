"""A process watches the consumers in Redis, also while it does not lead, and can vouch for that time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast
from uuid import uuid4

import pytest
import redis

from jobguard.client_list import Consumers
from jobguard.model import Claim, Presence
from jobguard.reconciler.vigil import Vigil
from tests.fakes.world import SOURCE, Clock, calm, request, source_row

NOBODY = Consumers({}, frozenset())
GUARDED = Consumers({"mail": frozenset({"w1"})}, frozenset(), proved=frozenset({"w1"}))
UNGUARDED = Consumers({"mail": frozenset({"w1"})}, frozenset())
STRANGER = Consumers({}, frozenset({"10.0.0.1:7"}))
UNCOUNTED = Consumers({}, frozenset(), "NOPERM")


class Watched:
    """A vigil over one source whose consumers the test sets."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.consumers_now: Mapping[str, frozenset[str]] | Exception = NOBODY
        self.vigil = Vigil(lambda _row: cast(Any, self), longest=18.0, clock=self.clock)
        self.vigil.watch([source_row()])

    def consumers(self) -> Mapping[str, frozenset[str]]:
        """Return the consumers, as a broker does."""
        if isinstance(self.consumers_now, Exception):
            raise self.consumers_now
        return self.consumers_now

    def watch(self, seconds: float, consumers: Mapping[str, frozenset[str]] | Exception) -> None:
        """Watch for so long."""
        self.consumers_now = consumers
        until = self.clock() + seconds
        while self.clock() < until:
            self.clock.advance(1.0)
            self.vigil.look()

    def vouches(self, gap: float) -> bool:
        """Return True if it vouches for a gap of this length that ends now."""
        return self.vigil.vouches(SOURCE.id, gap)


def always(*, answer: bool) -> Callable[[float], bool]:
    """Return a function that gives this answer for any gap."""
    return lambda _gap: answer


@pytest.mark.parametrize("consumers", [NOBODY, GUARDED])
def test_it_vouches_for_the_time_of_its_watch(consumers: Consumers) -> None:
    """A watch without unguarded consumers covers its length, and not the time before it."""
    watched = Watched()
    assert not watched.vouches(1)
    watched.watch(60, consumers)
    assert watched.vouches(60)
    assert not watched.vouches(70)
    assert not watched.vigil.vouches(SOURCE.id + 1, 10)


def test_the_length_of_the_watch() -> None:
    """It is that of the source whose watch began last, and nothing before the first inspection."""
    watched = Watched()
    assert watched.vigil.watched_for() == 0
    watched.watch(60, GUARDED)
    assert 58 <= watched.vigil.watched_for() <= 60
    watched.watch(6, STRANGER)
    assert watched.vigil.watched_for() == 0
    watched.watch(6, GUARDED)
    assert 0 < watched.vigil.watched_for() < 7
    watched.vigil.watch([replace(source_row(), id=SOURCE.id + 1)])
    assert watched.vigil.watched_for() == 0


def test_a_process_that_started_in_the_gap_does_not_vouch_for_its_beginning() -> None:
    """A lone reconciler that was killed and started again has not seen who consumed meanwhile."""
    watched = Watched()
    watched.watch(4, NOBODY)
    assert not watched.vouches(12)


def test_a_process_that_led_vouches_for_the_time_since_it_lost_the_lease() -> None:
    """What its monitors saw while it led is the beginning of the watch that it goes on with."""
    watched = Watched()
    for _ in range(10):
        watched.vigil.saw(source_row(), NOBODY)
        watched.clock.advance(2)
    watched.watch(30, NOBODY)
    assert watched.vouches(40)
    watched.vigil.saw(source_row(), STRANGER)
    assert not watched.vouches(1)


def test_a_leading_process_watches_itself_when_its_monitors_are_late() -> None:
    """In an outage of Postgres, or in a long step, no monitor inspects the consumers."""
    watched = Watched()
    watched.vigil.saw(source_row(), NOBODY)
    asked: list[float] = []
    watched.consumers_now = NOBODY
    for _ in range(40):
        watched.clock.advance(1.0)
        before = watched.vigil._watches[SOURCE.id].seen_at
        watched.vigil.look(leads=True)
        if watched.vigil._watches[SOURCE.id].seen_at != before:
            asked.append(watched.clock())
    assert len(asked) == 4  # each half of the longest pause
    assert watched.vouches(40)


def test_a_monitor_reports_the_consumers_that_it_sees() -> None:
    """Each inspection of the consumers by a leading process continues the watch of the process."""
    seen: list[Mapping[str, frozenset[str]]] = []
    world = calm()
    world.new_leader(saw=seen.append)
    world.run(10)
    assert len(seen) > 1


@pytest.mark.parametrize("consumers", [UNGUARDED, STRANGER, UNCOUNTED])
def test_an_unguarded_consumer_ends_the_watch(consumers: Consumers) -> None:
    """After an unguarded consumer, or a time in which they could not be counted, it begins again."""
    watched = Watched()
    watched.watch(60, NOBODY)
    watched.watch(6, consumers)
    assert not watched.vouches(30)
    watched.watch(40, NOBODY)
    assert watched.vouches(30)
    assert not watched.vouches(100)


def test_one_sight_of_a_worker_that_starts_is_no_proof() -> None:
    """A worker that shows that it is guarded at the second inspection does not end the watch."""
    watched = Watched()
    watched.watch(60, NOBODY)
    watched.watch(2, UNGUARDED)
    assert not watched.vouches(30)  # Not until the next inspection.
    watched.watch(2, GUARDED)
    assert watched.vouches(60)


def test_a_pause_ends_the_watch() -> None:
    """A Redis that does not answer for longer than a change of leaders ends the watch."""
    watched = Watched()
    watched.watch(60, NOBODY)
    watched.watch(10, redis.ConnectionError("away"))
    assert watched.vouches(60)
    watched.watch(20, redis.ConnectionError("away"))
    watched.watch(4, NOBODY)
    assert not watched.vouches(60)


def test_a_leader_that_watched_a_gap_restores_its_jobs() -> None:
    """After an outage of PostgreSQL a job that was taken in it is restored, not held as untrusted."""
    for vouched in (True, False):
        world = calm()
        (job,) = world.enqueue("job")
        world.broker.bodies.clear()
        world.clock.advance(60)
        world.new_leader(vouches=always(answer=vouched))
        world.run(40)
        assert (world.broker.pushed == ["job"]) is vouched, job


def test_a_worker_that_started_in_an_outage_is_not_taken_for_an_unguarded_one() -> None:
    """A name that the ledger does not know yet is guarded if its connection shows it."""
    for proved in (True, False):
        world = calm()
        names = frozenset({"w1", "w2"})
        made: Any = Consumers(
            {"mail": names}, frozenset(), proved=names if proved else frozenset({"w1"})
        )
        world.broker.names = made
        world.run(10)
        (row,) = [row for row in world.store.queues(SOURCE.id) if row.queue == "mail"]
        assert (row.unguarded == ()) is proved


def test_workers_of_one_process_are_guarded_by_their_session() -> None:
    """The ledger knows a process by the name of its first worker, also after the process was killed."""
    names = frozenset({"w1", "w2"})
    for alive in (names, frozenset[str]()):
        for known in (True, False):
            world = calm()
            (session,) = (row.id.hex for row in world.store.workers(SOURCE.id))
            made: Any = Consumers(
                {"mail": names},
                frozenset(),
                proved=alive,
                alive=alive,
                sessions=dict.fromkeys(names, session) if known else {},
            )
            world.broker.names = made
            world.run(60)
            (row,) = [row for row in world.store.queues(SOURCE.id) if row.queue == "mail"]
            assert (row.unguarded == ()) is known


def test_what_may_wait_for_a_reply_makes_no_queue_untrusted() -> None:
    """A connection in doubt holds restores back while it lasts; without the doubt it is unguarded."""
    world = calm()
    guarded, stranger = {"mail": frozenset({"w1"})}, frozenset({"10.0.0.1:7"})
    proved = frozenset({"w1"})
    doubtful: Any = Consumers(guarded, stranger, proved=proved, passing=stranger)
    world.broker.names = doubtful
    world.enqueue("job")
    world.run(4)
    world.broker.bodies.clear()
    world.run(40)
    assert world.broker.pushed == []
    (row,) = [row for row in world.store.queues(SOURCE.id) if row.queue == "mail"]
    assert not row.unguarded and row.trusted_since is not None
    nobody: Any = Consumers(guarded, frozenset(), proved=proved)
    world.broker.names = nobody
    world.run_until(lambda: world.broker.pushed == ["job"], within=60)
    certain: Any = Consumers(guarded, stranger, proved=proved)
    world.broker.names = certain
    world.run(10)
    (row,) = [row for row in world.store.queues(SOURCE.id) if row.queue == "mail"]
    assert list(row.unguarded) == list(stranger)


def test_a_claim_of_a_worker_that_is_not_known_yet_counts_as_live() -> None:
    """The claim was in the stream: its worker gets the time to register, and then it is dead."""
    world = calm()
    (job,) = world.enqueue("job")
    world.broker.put(job, Presence.RUNNING)
    assert isinstance(world.host.claim(SOURCE.id, request(job, uuid4())), Claim)
    world.broker.bodies.clear()
    world.run(12)
    assert world.broker.pushed == []
    assert world.owed()["job"].claim_number == 1
    world.run_until(lambda: world.broker.pushed == ["job"], within=60)
