"""Who counts as gone: what a leader may take out of the hands of a worker, and what it may not."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from jobguard.model import DROPPED_BY_LIVE_WORKER, new_token
from jobguard.reconciler.workers import Workers
from jobguard.settings import Settings
from jobguard.store.protocols import WorkerRow

TIMEOUT = 15.0


class Store:
    """A ledger that knows these workers."""

    def __init__(self) -> None:
        self.rows: list[WorkerRow] = []

    def workers(self, source: int) -> list[WorkerRow]:
        """Give them."""
        return self.rows

    def forget(self, term: int, workers: list[UUID]) -> None:
        """Forget nobody."""


class Redis:
    """A Redis without any beat."""

    def mget(self, keys: list[str]) -> list[None]:
        """Answer nothing."""
        return [None for _ in keys]


def test_an_id_that_the_ledger_does_not_know_is_not_gone_before_it_had_time_to_introduce_itself() -> (
    None
):
    """It may have booted while Postgres was away, and be running what it took."""
    time = [100.0]
    store: Any = Store()
    client: Any = Redis()
    settings = Settings(worker_timeout=TIMEOUT)
    workers = Workers(client, store, 1, settings, clock=lambda: time[0])
    unknown = new_token().hex

    assert not workers.gone(unknown)  # nothing is known yet
    workers.poll(1, time[0], ask_redis=True)
    assert not workers.gone(unknown)
    time[0] += TIMEOUT - 1
    assert not workers.gone(unknown)
    time[0] += 2
    assert workers.gone(unknown)
    assert not workers.gone("an unguarded worker's name")


def test_what_a_living_worker_has_let_go_of_has_no_holder() -> None:
    """At once, and though no worker of that name ever died."""
    store: Any = Store()
    client: Any = Redis()
    workers = Workers(client, store, 1, Settings(worker_timeout=TIMEOUT), clock=lambda: 100.0)
    assert not workers.gone(DROPPED_BY_LIVE_WORKER)  # who is alive is not known yet
    workers.poll(1, 100.0, ask_redis=True)
    assert workers.gone(DROPPED_BY_LIVE_WORKER)
