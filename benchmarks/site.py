"""The servers of a run, and the producers of the three libraries, bare and guarded."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import celery
import dramatiq
import psycopg
import redis
import rq
from dramatiq.brokers.redis import RedisBroker
from psycopg import sql

import jobguard
from jobguard.demo.servers import PostgresServer, RedisServer
from jobguard.schema import migrate

Send = Callable[[str], object]
"""Enqueues one job with this payload."""

SMALL, LARGE = "x" * 400, "x" * 100_000
"""Payloads. With its headers, a job with the small one has about half a kilobyte."""
TASK = "benchmarks.jobs.nothing"


@dataclass(slots=True)
class Site:
    """The servers of a run."""

    postgres: str
    """The URL of a migrated database."""
    broker: str
    server: PostgresServer
    _names: Iterator[int] = field(default_factory=lambda: iter(range(1_000_000)))

    def name(self, kind: str) -> str:
        """Return a name for a queue that no other case uses."""
        return f"{kind}-{next(self._names)}"

    @contextmanager
    def recording(self, jobs: int, table: str = "jobs") -> Iterator[None]:
        """Fail unless the ledger gets exactly so many jobs inside: in ``jobs``, or in ``history``.

        Otherwise a case that guards nothing would show how cheap the guard is.
        """
        before = self._count(table)
        yield
        found = self._count(table) - before
        if found != jobs:
            raise SystemExit(f"jobguard.{table} has {found} jobs of a case, and must have {jobs}")

    def _count(self, table: str) -> int:
        with psycopg.connect(self.postgres) as connection:
            query = sql.SQL("select count(*) from jobguard.{}").format(sql.Identifier(table))
            return int(connection.execute(query).fetchall()[0][0])

    def behind(self, postgres: str, broker: str) -> Site:
        """Return the same servers by other addresses."""
        return Site(postgres, broker, self.server, self._names)


@contextmanager
def site() -> Iterator[Site]:
    """Start a PostgreSQL with all safety on, and a Redis without persistence."""
    with PostgresServer() as postgres, RedisServer() as broker:
        url = postgres.create_database("benchmark")
        migrate(url)
        yield Site(url, broker.url, postgres)


@contextmanager
def delayed(url: str, milliseconds: float) -> Iterator[str]:
    """Give another address of this server, with a network that needs so long for a round trip."""
    at = urlsplit(url)
    command = [sys.executable, str(Path(__file__).parent / "proxy.py")]
    proxy = subprocess.Popen(
        [*command, str(at.hostname), str(at.port), str(milliseconds)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert proxy.stdout is not None
        port = int(proxy.stdout.readline())
        host = f"{at.username}@127.0.0.1:{port}" if at.username else f"127.0.0.1:{port}"
        yield urlunsplit(at._replace(netloc=host))
    finally:
        proxy.kill()
        proxy.wait()


@contextmanager
def reconciler(at: Site, **settings: str) -> Iterator[None]:
    """Run a reconciler of these servers, with these settings in its environment."""
    variables = {f"JOBGUARD_{name.upper()}": value for name, value in settings.items()}
    process = subprocess.Popen(
        [sys.executable, "-c", "from jobguard.cli import main; main()", "reconcile"],
        env=os.environ
        | {"JOBGUARD_POSTGRES_URL": at.postgres, "JOBGUARD_REDIS_URL": at.broker}
        | variables,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def rq_queue(at: Site, kind: str, *, guard: bool, **settings: Any) -> rq.Queue:
    """Return a queue of RQ with its own connection."""
    queue = rq.Queue(at.name(kind), connection=redis.Redis.from_url(at.broker))
    if guard:
        jobguard.guard(queue, postgres=at.postgres, namespace=queue.name, **settings)
    return queue


def rq_sender(at: Site, *, guard: bool, **settings: Any) -> Send:
    """Return RQ's enqueue."""
    queue = rq_queue(at, "rq", guard=guard, **settings)
    return lambda payload: queue.enqueue(TASK, payload)


def celery_sender(at: Site, *, guard: bool, broker: str | None = None, **settings: Any) -> Send:
    """Return Celery's send_task."""
    name = at.name("celery")
    app: Any = celery.Celery(name, broker=broker or at.broker, set_as_current=False)
    app.conf.task_default_queue = name
    if guard:
        jobguard.guard(app, postgres=at.postgres, namespace=name, **settings)
    return lambda payload: app.send_task(TASK, (payload,))


def dramatiq_sender(at: Site, *, guard: bool, **settings: Any) -> Send:
    """Return the send of one of Dramatiq's actors."""
    name = at.name("dramatiq")
    make: Any = RedisBroker
    broker = make(url=at.broker, namespace=name)
    if guard:
        jobguard.guard(broker, postgres=at.postgres, namespace=name, **settings)
    declare: Any = dramatiq.actor
    actor = declare(_nothing, actor_name="nothing", queue_name="q", broker=broker)
    return lambda payload: actor.send(payload)


def _nothing(*_: object) -> None:
    """Do nothing."""


SENDERS = {"RQ": rq_sender, "Celery": celery_sender, "Dramatiq": dramatiq_sender}
