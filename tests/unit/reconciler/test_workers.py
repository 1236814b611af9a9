"""Which workers count as gone, so that a leader may take over the deliveries that they had taken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from uuid import UUID

from jobguard.model import DROPPED_BY_LIVE_WORKER, new_token
from jobguard.reconciler.workers import Workers
from jobguard.settings import Settings
from jobguard.store.protocols import WorkerRow
from tests.fakes.world import worker_row

TIMEOUT = 15.0


class Store:
    """A ledger that knows these workers."""

    def __init__(self) -> None:
        self.rows: list[WorkerRow] = []

    def workers(self, source: int) -> list[WorkerRow]:
        """Return them."""
        return self.rows

    def forget(self, term: int, workers: list[UUID]) -> None:
        """Delete no row."""


class Redis:
    """A Redis without any beat."""

    def mget(self, keys: list[str]) -> list[None]:
        """Return no beats."""
        return [None for _ in keys]


def test_an_unknown_id_is_not_gone_before_it_had_time_to_register() -> None:
    """An unknown worker may have started while Postgres was away, and run the deliveries that it took."""
    time = [100.0]
    store: Any = Store()
    client: Any = Redis()
    settings = Settings(worker_timeout=TIMEOUT)
    workers = Workers(client, store, 1, settings, clock=lambda: time[0])
    unknown = new_token().hex

    assert not workers.gone(unknown)  # Nothing is known yet.
    workers.poll(1, time[0], ask_redis=True)
    assert not workers.gone(unknown)
    time[0] += TIMEOUT - 1
    assert not workers.gone(unknown)
    time[0] += 2
    assert workers.gone(unknown)
    assert not workers.gone("an unguarded worker's name")


def test_a_dropped_delivery_has_no_holder() -> None:
    """This is true at once, and without the death of any worker of that name."""
    store: Any = Store()
    client: Any = Redis()
    workers = Workers(client, store, 1, Settings(worker_timeout=TIMEOUT), clock=lambda: 100.0)
    assert not workers.gone(DROPPED_BY_LIVE_WORKER)  # The live workers are not known yet.
    workers.poll(1, 100.0, ask_redis=True)
    assert workers.gone(DROPPED_BY_LIVE_WORKER)


def test_a_live_worker_without_a_row_reports_to_another_ledger() -> None:
    """It has the time to register; a worker that once had a row stays ours while Redis shows it."""
    time = [100.0]
    store: Any = Store()
    client: Any = Redis()
    settings = Settings(worker_timeout=TIMEOUT)
    workers = Workers(client, store, 1, settings, clock=lambda: time[0])
    both, other, none = frozenset({"ours", "other"}), frozenset({"other"}), frozenset[str]()

    assert workers.not_in_ledger(both) == (none, none)  # The rows are not known yet.
    store.rows = [worker_row(name="ours")]
    workers.poll(1, time[0], ask_redis=True)
    assert workers.not_in_ledger(both) == (other, none)
    store.rows = []
    time[0] += 2 * TIMEOUT - 1
    workers.poll(1, time[0], ask_redis=True)
    assert workers.not_in_ledger(both) == (other, none)
    time[0] += 2
    assert workers.not_in_ledger(both) == (none, other)
    assert workers.not_in_ledger(frozenset({"ours"})) == (none, none)
    assert workers.not_in_ledger(both) == (other, none)  # It was gone: it is another one.


def test_a_departure_counts_from_when_the_worker_left() -> None:
    """A leader that polls late, or began later, charges no job that was recorded after it had left."""
    store: Any = Store()
    client: Any = Redis()
    workers = Workers(client, store, 1, Settings(worker_timeout=TIMEOUT), clock=lambda: 100.0)
    store.rows = [worker_row(left_age=3.0), worker_row(left_age=4.0, queues=("mail", "bulk"))]
    workers.poll(1, 100.0, ask_redis=True)
    assert workers.deaths == {"mail": 97.0, "bulk": 96.0}
    store.rows.append(worker_row(left_age=9.0))
    workers.poll(1, 110.0, ask_redis=True)
    assert workers.deaths["mail"] == 101.0


def test_a_worker_has_two_beats_and_a_timeout_to_read_a_new_pulse() -> None:
    """A second loss starts both again; a worker that has died reads no pulse any more."""
    time = [100.0]
    store: Any = Store()
    client: Any = Redis()
    workers = Workers(client, store, 1, Settings(worker_timeout=TIMEOUT), clock=lambda: time[0])
    first, second, third = new_token(), new_token(), new_token()
    worker = worker_row(pulse=(first, 1))

    def beats(count: int) -> list[WorkerRow]:
        store.rows = [replace(worker, beat=count)]
        time[0] += TIMEOUT
        workers.poll(1, time[0], ask_redis=True)
        return workers.elsewhere(third if count > 3 else second)[1]

    store.rows = [worker]
    workers.poll(1, time[0], ask_redis=True)
    assert workers.elsewhere(first) == ([], [])
    assert not beats(2) and not beats(3)
    assert not beats(4) and not beats(5) and not beats(5)
    assert [row.id for row in beats(6)] == [worker.id]
