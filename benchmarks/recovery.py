"""The time to detect and repair a loss: FLUSHALL of waiting jobs, again and again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import redis
import rq

from benchmarks.measure import Case, Table
from benchmarks.site import SMALL, TASK, Site, reconciler

JOBS = int(os.environ.get("BENCHMARK_LOST", "10000"))
_PATIENCE = 60.0
_UNLIMITED = 1_000_000
"""Jobs a second: the leader is measured here, and not its limiter."""


class _Losses:
    """Lose all jobs once a round, and give the figures of the round one by one."""

    def __init__(self, client: redis.Redis, queue: rq.Queue, database: str) -> None:
        self._client, self._queue, self._database = client, queue, database
        self._figures: dict[str, float] = {}

    def figure(self, name: str) -> float:
        """Return this figure of the round, or of the next round if it was given already."""
        if name not in self._figures:
            self._figures = self._lose()
        return self._figures.pop(name)

    def _lose(self) -> dict[str, float]:
        with psycopg.connect(self._database, autocommit=True) as connection:
            _wait_for_the_end_of_incidents(connection)
            time.sleep(0.37)  # the rounds shall begin at different points of the pulse interval
            began = time.time()
            self._client.flushall()
            first = None
            while (length := int(self._client.llen(self._queue.key))) < JOBS:  # type: ignore[arg-type]
                if length and first is None:
                    first = time.time() - began
                if time.time() - began > _PATIENCE:
                    raise SystemExit(f"only {length} of {JOBS} came back in a minute")
                time.sleep(0.01)
            whole = time.time() - began
            row = connection.execute(
                "select extract(epoch from max(opened_at))::float8 from jobguard.incidents"
            ).fetchone()
        assert row is not None
        return {"seen": row[0] - began, "first": first or whole, "whole": whole}


@contextmanager
def tables(at: Site) -> Iterator[list[Table]]:
    """Give the table of one size of loss; the variable BENCHMARK_LOST changes the size."""
    # The default namespace: a reconciler leads in one, and each other part has its own.
    queue = rq.Queue("lost", connection=redis.Redis.from_url(at.broker))
    client = redis.Redis.from_url(at.broker)
    client.flushall()
    with reconciler(at, recovery_rate=str(_UNLIMITED)):
        _fill(at, queue)
        losses = _Losses(client, queue, at.postgres)
        cases = [
            Case("seen", lambda: losses.figure("seen")),
            Case("first job back", lambda: losses.figure("first")),
            Case(f"{JOBS:,} back", lambda: losses.figure("whole")),
        ]
        yield [Table("Recovery after FLUSHALL", "s", cases, rounds=9)]


def _fill(at: Site, queue: rq.Queue) -> None:
    import jobguard

    jobguard.guard(queue, postgres=at.postgres)
    with psycopg.connect(at.postgres, autocommit=True) as connection:
        _trust(connection, at)
    for start in range(0, JOBS, 1000):
        size = min(1000, JOBS - start)
        queue.enqueue_many([rq.Queue.prepare_data(TASK, (n, SMALL)) for n in range(size)])


def _trust(connection: psycopg.Connection, at: Site) -> None:
    """Run a guarded worker until the queue is trusted; then stop it, so that the jobs stay in Redis."""
    command = "rq.cli worker lost --worker-class jobguard.adapters.rq.SimpleWorker --url"
    worker = subprocess.Popen(
        [sys.executable, "-m", *command.split(), at.broker],
        env=os.environ | {"JOBGUARD_POSTGRES_URL": at.postgres},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    query = "select count(*) from jobguard.queues where trusted_since is not null"
    while not connection.execute(query).fetchone()[0]:  # type: ignore[index]
        time.sleep(0.1)
    worker.terminate()
    worker.wait()


def _wait_for_the_end_of_incidents(connection: psycopg.Connection) -> None:
    query = "select count(*) from jobguard.incidents where closed_at is null"
    while connection.execute(query).fetchone()[0]:  # type: ignore[index]
        time.sleep(0.05)
