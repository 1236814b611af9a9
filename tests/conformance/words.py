"""Helpers of the suite, the same for every library."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
from psycopg.rows import class_row

from jobguard.adapter import Broker, Source
from jobguard.guard import JobGuard
from jobguard.model import (
    Beat,
    Claim,
    End,
    Ended,
    Observation,
    Outcome,
    Restorable,
    Restored,
    new_token,
)
from jobguard.reconciler.backfill import Backfill, BackfillCounts
from jobguard.reconciler.service import Service, clients_from_urls
from jobguard.settings import Settings
from jobguard.store.host import PostgresStore
from jobguard.store.leader import PostgresLeaderStore
from jobguard.store.protocols import ClaimRequest, SourceRow
from tests.conformance.library import QUEUE, Library
from tests.support import SLOWEST, newly_owed

BRISK: dict[str, Any] = {
    "beat_interval": 0.4,
    "worker_timeout": 2.0,
    "grace": 0.2,
    "lease": 2.0,
    "crash_budget": 2,
    "crash_backoff": (0.0,),
    **dict.fromkeys(("connect_timeout", "call_timeout", "record_timeout", "redis_timeout"), 10.0),
}
"""Settings with the same rules as the defaults and shorter times; long timeouts for a busy machine."""
ROOT = Path(__file__).parents[2]


class Records:
    """The content of the ledger in PostgreSQL."""

    def __init__(self, database: str) -> None:
        self.database = database
        self._opened: psycopg.Connection[Any] | None = None

    @property
    def _connection(self) -> psycopg.Connection[Any]:
        if self._opened is None or self._opened.closed:
            self._opened = psycopg.connect(self.database, autocommit=True)
        return self._opened

    def close(self) -> None:
        """Close the connection."""
        if self._opened is not None:
            self._opened.close()

    def owed(self) -> list[Restorable]:
        """Return the owed deliveries as a leader restores them, in the order of recording."""
        with self._connection.cursor(row_factory=class_row(Restorable)) as cursor:
            return cursor.execute(
                "select token, job_id, queue, envelope,"
                " extract(epoch from due_at)::float8 as due_at,"
                " extract(epoch from expires_at)::float8 as expires_at"
                " from jobguard.jobs order by token"
            ).fetchall()

    def ended(self, job_id: str) -> list[tuple[str, int]]:
        """Return the outcome and attempt of each delivery of a job, in the order of recording."""
        return self._connection.execute(
            "select outcome::text, attempt from jobguard.history where job_id = %s order by token",
            [job_id],
        ).fetchall()

    def blamed(self, job_id: str) -> set[int]:
        """Return the attempts of a job whose errors are recorded."""
        rows = self._connection.execute(
            "select attempt from jobguard.history where job_id = %s and errors <> '{}'",
            [job_id],
        )
        return {int(attempt) for (attempt,) in rows}

    def trusted(self) -> bool:
        """Return True if a queue has only guarded workers, so that its jobs are restored."""
        trusted = "select from jobguard.queues where trusted_since is not null"
        return self._connection.execute(trusted).rowcount > 0

    def claims(self) -> list[tuple[UUID, int]]:
        """Return the claims that exist, with their numbers."""
        return self._connection.execute("select token, number from jobguard.running").fetchall()


class Leader:
    """The steps of a reconciler on a broker, one at a time."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker

    def observe(self, delivery: Restorable) -> Observation:
        """Return the presence in Redis some time after the record."""
        owed = newly_owed(delivery.token, job_id=delivery.job_id, queue=delivery.queue)
        return self.broker.presence([replace(owed, age=60.0, claim_number=1)])[delivery.token]

    def restore(self, *deliveries: Restorable, deadline: float | None = None) -> list[Restored]:
        """Restore these, with enough time."""
        until = time.time() + 60 if deadline is None else deadline
        done = self.broker.restore(deliveries, deadline=until)
        return [done[delivery.token] for delivery in deliveries]


@contextmanager
def leading(guard: JobGuard, database: str, *urls: str) -> Iterator[Service]:
    """Run a reconciler for these Redises in a thread, with the settings of this guard, inside the block."""
    service = Service(guard.settings, lambda: database, clients_from_urls(urls))
    thread = threading.Thread(target=service.run, daemon=True)
    thread.start()
    try:
        yield service
    finally:
        service.stop()
        thread.join(SLOWEST)
        assert not thread.is_alive()


class AnotherWorker:
    """A live worker of another machine that has one claim."""

    def __init__(self, store: PostgresStore, source: Source, claimed: Restorable) -> None:
        self._store, self._source, self._claimed = store, source, claimed
        self._id = new_token()
        beat = Beat(worker=self._id, counter=1, claims=[claimed.token])
        store.beat(source.id, beat, namespace=source.namespace)
        request = ClaimRequest(claimed.token, new_token(), self._id, 1, source.namespace, 60.0, 3)
        assert isinstance(store.claim(source.id, request), Claim)

    def complete(self) -> Ended:
        """Report that its job has completed."""
        end = End(self._claimed.token, 1, Outcome.COMPLETED, self._id, self._claimed.job_id)
        return self._store.end(self._source.id, [end])[0]


@contextmanager
def another_worker(database: str, source: Source, claimed: Restorable) -> Iterator[AnotherWorker]:
    """Let another worker run this delivery."""
    store = PostgresStore(lambda: database, Settings(call_timeout=10, connect_timeout=10))
    try:
        yield AnotherWorker(store, source, claimed)
    finally:
        store.close()


@contextmanager
def filler(
    library: Library, source: Source, database: str
) -> Iterator[Callable[..., BackfillCounts]]:
    """Yield a function that makes one walk over the waiting jobs of QUEUE, as a leader does."""
    settings = Settings(call_timeout=10, connect_timeout=10)
    host = PostgresStore(lambda: database, settings)
    row = host.register(
        SourceRow(
            source.id,
            source.namespace,
            source.library,
            source.address,
            source.prefix,
            source.name,
            settings.fingerprint(),
            source.one_body,
        )
    )
    store = PostgresLeaderStore(lambda: database, source.namespace, new_token(), settings)

    def walk(*, page: int = 100, mark: bool = True, dry: bool = False) -> BackfillCounts:
        broker = library.adapter.broker(source, library.client)
        fill = Backfill(broker, store, host, row, [QUEUE], page=page, mark=mark, dry=dry)
        while not fill.finished:
            fill.step()
        return fill.counts

    try:
        yield walk
    finally:
        host.close()
        store.close()


def environ(database: str, redis_url: str) -> Mapping[str, str]:
    """Return the environment of a worker process."""
    brisk = {
        f"JOBGUARD_{name.upper()}": ",".join(map(str, value))
        if isinstance(value, tuple)
        else str(value)
        for name, value in BRISK.items()
    }
    urls = {"JOBGUARD_POSTGRES_URL": database, "JOBGUARD_REDIS_URL": redis_url}
    return {**os.environ, **brisk, **urls, "PYTHONPATH": str(ROOT)}


def end(worker: subprocess.Popen[bytes]) -> None:
    """End a worker, if it still runs."""
    worker.kill()
    worker.wait(10)
