from __future__ import annotations

from dataclasses import replace
from uuid import UUID

import pytest

from jobguard.reconciler.liveness import Judgement, Liveness
from jobguard.store.protocols import WorkerRow
from tests.fakes.world import token, worker_row

T = 15.0
POLL = 0.5


class Stage:
    """Workers that beat in two stores, polled by one leader twice a second."""

    def __init__(self) -> None:
        self.liveness = Liveness(T)
        self.at = 1000.0
        self.rows: dict[UUID, WorkerRow] = {}
        self.redis: dict[UUID, int] | None = {}
        self.died: dict[UUID, float] = {}
        """When each worker was judged dead, in seconds since the beginning."""
        self.last: Judgement | None = None

    def worker(self, host: str = "h1", **fields: object) -> UUID:
        """Add a worker."""
        row = worker_row(id=token(), host=host, **fields)
        self.rows[row.id] = row
        return row.id

    def set(self, worker: UUID, **fields: object) -> None:
        """Change the row of a worker."""
        self.rows[worker] = replace(self.rows[worker], **fields)  # type: ignore[arg-type]

    def beat(self, *workers: UUID) -> None:
        """Let workers beat in Postgres."""
        for worker in workers:
            self.set(worker, beat=self.rows[worker].beat + 1)

    def beat_in_redis(self, worker: UUID) -> None:
        """Let a worker beat in Redis."""
        assert self.redis is not None
        self.redis[worker] = self.redis.get(worker, 0) + 1

    def poll(self, after: float = POLL) -> Judgement:
        """Advance the time, and poll."""
        self.at += after
        self.last = self.liveness.poll(self.at, list(self.rows.values()), self.redis)
        for worker in self.last.dead:
            self.died[worker] = self.at - 1000.0
            self.set(worker, dead=True)  # As declare_dead does.
        return self.last

    def poll_until(self, second: float) -> Judgement:
        """Poll regularly until that many seconds since the beginning."""
        judgement = self.poll(0.0)
        while self.at < 1000.0 + second - 1e-9:
            judgement = self.poll()
        return judgement


def test_an_only_worker_is_dead_after_the_timeout() -> None:
    """A single worker that becomes silent is dead at T, neither earlier nor later."""
    stage = Stage()
    worker = stage.worker()

    before = stage.poll_until(T - POLL)
    assert before.dead == []
    assert worker in before.live

    after = stage.poll()
    assert after.dead == [worker]
    assert worker not in after.live


def test_the_dead_are_reported_once() -> None:
    """A worker that was declared dead is not judged again."""
    stage = Stage()
    stage.worker()
    stage.poll_until(T)

    assert stage.poll().dead == []


@pytest.mark.parametrize("store", ["postgres", "redis"])
def test_a_beat_in_either_store_keeps_alive(store: str) -> None:
    """A worker that is cut off from one store stays alive by its beats in the other one."""
    stage = Stage()
    worker = stage.worker()

    for _ in range(200):
        if store == "postgres":
            stage.beat(worker)
        else:
            stage.beat_in_redis(worker)
        stage.poll()

    assert stage.died == {}


def test_it_is_the_counter_that_counts() -> None:
    """A beat in Redis that does not change is silence, and so is one that has expired."""
    stage = Stage()
    worker = stage.worker()
    stage.beat_in_redis(worker)
    stage.poll_until(T / 2)
    assert stage.redis is not None
    stage.redis.clear()

    stage.poll_until(T)

    assert worker in stage.died


def test_silence_counts_from_the_last_beat() -> None:
    """A worker is dead T after its last beat was seen."""
    stage = Stage()
    worker = stage.worker()
    stage.poll_until(10)
    stage.beat(worker)
    stage.poll_until(40)

    assert stage.died == {worker: 10.0 + T}


def test_a_gap_in_our_own_polls_starts_the_window_again() -> None:
    """A leader that did not poll for more than a fifth of T starts the window again."""
    stage = Stage()
    worker = stage.worker()
    stage.poll_until(T - POLL)

    stage.poll(after=T / 5 + POLL)
    assert stage.died == {}

    resumed = stage.at - 1000.0
    stage.poll_until(resumed + T - POLL)
    assert stage.died == {}
    stage.poll()
    assert worker in stage.died


def test_a_small_gap_does_not() -> None:
    """A gap of a fifth of T does not start the window again."""
    stage = Stage()
    worker = stage.worker()
    stage.poll_until(T - 3)

    assert stage.poll(after=T / 5).dead == [worker]


def test_an_incident_of_redis_starts_the_window_again() -> None:
    """After Redis lost data, missing beats prove nothing for T seconds."""
    stage = Stage()
    worker = stage.worker()
    stage.poll_until(10)
    stage.liveness.interrupted(stage.at)

    stage.poll_until(10 + T - POLL)
    assert stage.died == {}

    stage.poll()
    assert worker in stage.died


def test_a_redis_that_cannot_be_asked_starts_the_window_again() -> None:
    """While one of the two stores cannot be asked, no worker is judged dead."""
    stage = Stage()
    worker = stage.worker()
    stage.redis = None
    stage.poll_until(3 * T)
    assert stage.died == {}

    stage.redis = {}
    stage.poll_until(4 * T - POLL)
    assert stage.died == {}
    stage.poll_until(4 * T)
    assert worker in stage.died


def test_all_hosts_silent_together_have_double_the_time_once() -> None:
    """If two hosts become silent together, the network is the likely cause: 2T, and never longer."""
    stage = Stage()
    workers = [stage.worker("h1"), stage.worker("h2")]

    stage.poll_until(2 * T - POLL)
    assert stage.died == {}

    stage.poll()
    assert stage.died == dict.fromkeys(workers, 2 * T)


def test_all_of_one_host_have_not() -> None:
    """All workers of one host may die with it: they are dead at T."""
    stage = Stage()
    workers = [stage.worker("h1"), stage.worker("h1")]

    stage.poll_until(T)

    assert stage.died == dict.fromkeys(workers, T)


def test_one_of_two_hosts_is_dead_at_the_timeout() -> None:
    """While another host is heard, a silent worker is dead at T."""
    stage = Stage()
    silent, heard = stage.worker("h1"), stage.worker("h2")
    stage.poll(0.0)

    while stage.at < 1000.0 + T:
        stage.beat(heard)
        stage.poll()

    assert stage.died == {silent: T}


def test_a_survivor_ends_the_double_time() -> None:
    """When one of the silent hosts is heard again, the others are judged at once."""
    stage = Stage()
    silent, back = stage.worker("h1"), stage.worker("h2")
    stage.poll_until(T + 3)
    assert stage.died == {}

    stage.beat(back)
    stage.poll()

    assert list(stage.died) == [silent]


def test_all_hosts_silent_together_though_their_beats_were_not_simultaneous() -> None:
    """Two hosts cut off at one moment, whose last beats were 2 s apart, have double the time."""
    stage = Stage()
    first, last = stage.worker("h1"), stage.worker("h2")
    stage.poll_until(10)
    stage.beat(first)
    stage.poll_until(12)
    stage.beat(last)

    stage.poll_until(10 + T + 3 * POLL)

    assert stage.died == {}


def test_goodbye_needs_no_silence() -> None:
    """A worker that left is neither live nor to be declared dead: its claims are free already."""
    stage = Stage()
    worker = stage.worker()
    stage.poll_until(2)
    stage.set(worker, left_age=0.0)

    judgement = stage.poll()

    assert worker not in judgement.live
    assert stage.poll_until(2 * T).dead == []
    assert stage.died == {}


def test_a_goodbye_does_not_silence_the_others() -> None:
    """A host that left in order does not count among those that became silent together."""
    stage = Stage()
    gone, silent = stage.worker("h1"), stage.worker("h2")
    stage.set(gone, left_age=0.0)

    stage.poll_until(T)

    assert stage.died == {silent: T}


def test_an_earlier_worker_is_silent_until_its_first_beat() -> None:
    """The reports of a worker that this leader has not heard yet may still be unwritten."""
    stage = Stage()
    old = stage.worker()

    assert stage.poll(0.0).silent == {old}
    assert stage.poll().silent == {old}

    stage.beat(old)
    assert stage.poll().silent == frozenset()


def test_a_new_row_counts_as_a_beat() -> None:
    """A worker whose row appears between two polls has just beaten."""
    stage = Stage()
    stage.poll(0.0)
    stage.poll()

    new = stage.worker()

    judgement = stage.poll()
    assert new in judgement.live
    assert judgement.silent == frozenset()


def test_after_a_gap_every_worker_is_silent_again() -> None:
    """After a gap in its polls, a leader has to hear every worker again."""
    stage = Stage()
    worker = stage.worker()
    stage.poll(0.0)
    stage.beat(worker)
    assert stage.poll().silent == frozenset()

    assert stage.poll(after=T).silent == {worker}


def test_an_incident_leaves_the_introductions() -> None:
    """A loss in Redis does not make heard workers silent: their reports go to Postgres."""
    stage = Stage()
    worker = stage.worker()
    stage.poll(0.0)
    stage.beat(worker)
    stage.poll()

    stage.liveness.interrupted(stage.at)

    assert stage.poll().silent == frozenset()


def test_the_dead_are_not_silent() -> None:
    """A dead worker has no more reports: the leader does not wait for it."""
    stage = Stage()
    stage.worker()

    assert stage.poll_until(T).silent == frozenset()


def test_unflushed_reports_of_the_living() -> None:
    """A live worker with unwritten reports counts as unflushed; a dead or departed one does not."""
    stage = Stage()
    assert not stage.poll(0.0).unflushed

    worker = stage.worker(unflushed_since=990.0)
    assert stage.poll().unflushed

    stage.set(worker, left_age=0.0)
    assert not stage.poll().unflushed

    other = stage.worker(unflushed_since=990.0)
    stage.poll()
    stage.poll_until(40)
    assert other in stage.died
    assert stage.last is not None
    assert not stage.last.unflushed
