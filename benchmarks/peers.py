"""What a team might pick instead: Redis that writes to disk, and queues in PostgreSQL.

Install them with ``pip install -e '.[bench]'``. A peer that is not installed is left out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec

import redis

from benchmarks.enqueue import CALLS
from benchmarks.measure import Case, Table, median_us
from benchmarks.site import SMALL, Site, celery_sender, rq_sender
from jobguard.demo.servers import RedisServer


@contextmanager
def tables(at: Site) -> Iterator[list[Table]]:
    """Give the table of peers."""
    base = "RQ, Redis without persistence"
    with ExitStack() as stack:
        cases = [Case(base, _timed(_rq(at)))]
        for policy in ("everysec", "always"):
            server = stack.enter_context(
                RedisServer(persistence="aof", config={"appendfsync": policy})
            )
            far = at.behind(at.postgres, server.url)
            assert (
                redis.Redis.from_url(server.url).config_get("appendfsync")["appendfsync"] == policy
            )
            cases.append(Case(f"RQ, appendfsync {policy}", _timed(_rq(far)), base))
        cases.append(Case("RQ, guarded", _timed(_rq(at, guard=True)), base))
        for package, title, make in (
            ("procrastinate", "Procrastinate defer", _procrastinate),
            ("pgqueuer", "PgQueuer enqueue", _pgqueuer),
            ("sqlalchemy", "Celery, transport on PostgreSQL", _celery),
        ):
            if find_spec(package) is not None:
                cases.append(Case(title, _timed(stack.enter_context(make(at))), base))
        yield [Table("Peers, enqueue", "us", cases, rounds=11)]


def _timed(send: Callable[[], object]) -> Callable[[], float]:
    for _ in range(10):
        send()
    return lambda: median_us(send, CALLS)


def _rq(at: Site, *, guard: bool = False) -> Callable[[], object]:
    send = rq_sender(at, guard=guard)
    return lambda: send(SMALL)


@contextmanager
def _procrastinate(at: Site) -> Iterator[Callable[[], object]]:
    import procrastinate

    url = at.server.create_database("procrastinate")
    app = procrastinate.App(connector=procrastinate.SyncPsycopgConnector(conninfo=url))

    @app.task(name="nothing")
    def nothing(payload: str) -> None:
        """Do nothing."""

    with app.open():
        app.schema_manager.apply_schema()
        yield lambda: nothing.defer(payload=SMALL)


@contextmanager
def _pgqueuer(at: Site) -> Iterator[Callable[[], object]]:
    import psycopg
    from pgqueuer.db import PsycopgDriver, SyncPsycopgDriver
    from pgqueuer.queries import Queries, SyncQueries

    url = at.server.create_database("pgqueuer")

    async def install() -> None:
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
            await Queries(PsycopgDriver(connection)).install()

    asyncio.run(install())
    payload = SMALL.encode()
    with psycopg.connect(url, autocommit=True) as connection:
        queries = SyncQueries(SyncPsycopgDriver(connection))
        yield lambda: queries.enqueue(["nothing"], [payload], [0])


@contextmanager
def _celery(at: Site) -> Iterator[Callable[[], object]]:
    url = at.server.create_database("celery")
    send = celery_sender(
        at, guard=False, broker=url.replace("postgresql://", "sqla+postgresql+psycopg://")
    )
    yield lambda: send(SMALL)
