"""``guard.transaction()`` on the connections of the drivers and frameworks that applications use."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
import redis
import rq
import sqlalchemy
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

import jobguard
from jobguard.errors import ConfigurationError, NotTransactional, UnsupportedTarget
from jobguard.guard import JobGuard
from tests.conformance.words import BRISK
from tests.support import eventually


class Undo(Exception):
    """Roll back."""


class Site:
    """A guarded queue, and the jobs that wait in it."""

    def __init__(self, database: str, client: redis.Redis) -> None:
        self.database = database
        self.queue = rq.Queue("mail", connection=client)
        self.guard: JobGuard = jobguard.guard(self.queue, postgres=database, **BRISK)

    def send(self, **options: Any) -> str:
        """Send a job."""
        return self.queue.enqueue("tests.conformance.tasks.say", "/dev/null", **options).id

    @property
    def waiting(self) -> list[str]:
        """The ids that wait in Redis."""
        return self.queue.job_ids

    def owed(self) -> list[str]:
        """Return the ids that are owed."""
        with psycopg.connect(self.database) as connection:
            rows = connection.execute("select job_id from jobguard.jobs order by token").fetchall()
        return [job_id for (job_id,) in rows]


@pytest.fixture
def site(database: str, redis_url: str) -> Iterator[Site]:
    """Yield a guarded queue."""
    with redis.Redis.from_url(redis_url) as client:
        made = Site(database, client)
        yield made
        made.guard.close()


@pytest.fixture
def engine(database: str) -> Iterator[sqlalchemy.Engine]:
    """Yield an engine of the application."""
    url = database.replace("postgresql://", "postgresql+psycopg://")
    made = sqlalchemy.create_engine(url)
    yield made
    made.dispose()


@pytest.mark.parametrize("kind", ["connection", "session"])
def test_sqlalchemy(site: Site, engine: sqlalchemy.Engine, kind: str) -> None:
    """A block of its own commits, a block in a transaction waits, and rolled back jobs are not sent."""
    make = Session if kind == "session" else sqlalchemy.Engine.connect
    with make(engine) as connection:
        with site.guard.transaction(connection):
            own = site.send()
            assert site.waiting == []
        assert site.waiting == [own]
        connection.execute(sqlalchemy.text("select 1"))
        with site.guard.transaction(connection):
            joined = site.send()
        with pytest.raises(Undo), site.guard.transaction(connection):
            site.send()
            raise Undo
        with connection.begin_nested() as savepoint:
            with site.guard.transaction(connection):
                site.send()
            savepoint.rollback()
        assert site.waiting == [own]
        connection.commit()
        assert site.owed() == [own, joined]
        with site.guard.transaction(connection):
            site.send()
        assert len(site.waiting) == 3
        connection.execute(sqlalchemy.text("select 1"))
        with site.guard.transaction(connection):
            site.send()
        connection.rollback()
        with site.guard.transaction(connection):
            pass
    assert len(site.waiting) == len(site.owed()) == 3


def test_sqlalchemys_own_block(site: Site, engine: sqlalchemy.Engine) -> None:
    """Jobs in the usual blocks of SQLAlchemy are pushed when the block has committed."""
    with engine.begin() as connection, site.guard.transaction(connection):
        first = site.send()
    assert site.waiting == [first]
    with Session(engine) as session, session.begin(), site.guard.transaction(session):
        second = site.send()
    assert site.waiting == [first, second]
    options = engine.execution_options(isolation_level="AUTOCOMMIT")
    with (
        options.connect() as connection,
        pytest.raises(ConfigurationError, match="autocommit"),
        site.guard.transaction(connection),
    ):
        site.send()
    assert site.waiting == [first, second]


def test_what_reads_redis_is_refused(site: Site, engine: sqlalchemy.Engine) -> None:
    """Dependencies and unique jobs of RQ are refused in a transaction, and nothing of them is sent."""
    first = site.send()
    before = site.queue.connection.keys()
    options: list[dict[str, Any]] = [{"depends_on": first}, {"pipeline": None, "unique": True}]
    for option in options if hasattr(rq.exceptions, "DuplicateJobError") else options[:1]:
        with (
            engine.connect() as connection,
            pytest.raises(NotTransactional, match="after the commit"),
            site.guard.transaction(connection),
        ):
            site.send(**option, job_id="second")
    assert site.queue.connection.keys() == before
    assert site.owed() == [first]
    with pytest.raises(UnsupportedTarget, match="atransaction"):
        site.guard.transaction(create_async_engine("postgresql+psycopg://").connect())


def test_asyncio(site: Site) -> None:
    """Jobs of an asynchronous block are recorded at its end, and pushed after the commit."""

    async def psycopg_(connection: psycopg.AsyncConnection[Any]) -> None:
        async with site.guard.atransaction(connection):
            site.send()
            with pytest.raises(Undo):
                async with site.guard.atransaction(connection):
                    site.send()
                    raise Undo
            assert site.waiting == []
        assert len(site.waiting) == 1
        with pytest.raises(Undo):
            async with site.guard.atransaction(connection):
                site.send()
                raise Undo

    async def sqlalchemy_(url: str) -> None:
        engine = create_async_engine(url)
        async with engine.connect() as connection, site.guard.atransaction(connection):
            site.send()
        assert len(site.waiting) == 2
        async with AsyncSession(engine) as session:
            await session.execute(sqlalchemy.text("select 1"))
            async with site.guard.atransaction(session):
                site.send()
            assert len(site.waiting) == 2
            await session.commit()
        while len(site.waiting) < 3:  # a thread pushes
            await asyncio.sleep(0.01)
        options = engine.execution_options(isolation_level="AUTOCOMMIT")
        async with options.connect() as connection, AsyncSession(options) as session:
            for refused in (connection, session):
                with pytest.raises(ConfigurationError, match="autocommit"):
                    async with site.guard.atransaction(refused):
                        site.send()
        await engine.dispose()

    async def all_() -> None:
        async with await psycopg.AsyncConnection.connect(site.database) as connection:
            await psycopg_(connection)
        await sqlalchemy_(site.database.replace("postgresql://", "postgresql+psycopg://"))

    asyncio.run(asyncio.wait_for(all_(), 60))
    eventually(lambda: len(site.waiting) == len(site.owed()) == 3)


def test_asyncpg(site: Site) -> None:
    """A block on a connection of asyncpg commits; a block in an open transaction is the leader's."""
    asyncpg = pytest.importorskip("asyncpg")

    async def all_() -> None:
        pool = await asyncpg.create_pool(site.database, min_size=1, max_size=1)
        async with pool.acquire() as connection:
            async with site.guard.atransaction(connection):
                site.send()
            assert len(site.waiting) == 1
            with pytest.raises(Undo):
                async with site.guard.atransaction(connection):
                    site.send()
                    raise Undo
            async with connection.transaction(), site.guard.atransaction(connection):
                site.send()
        await pool.close()

    asyncio.run(asyncio.wait_for(all_(), 60))
    assert len(site.waiting) == 1
    site.guard.reconcile()
    assert len(site.waiting) == len(site.owed()) == 2


DJANGO = """
import django, redis, rq, sys
from django.conf import settings
from psycopg.conninfo import conninfo_to_dict

given = conninfo_to_dict(sys.argv[1])
settings.configure(DATABASES={"default": {
    "ENGINE": "django.db.backends.postgresql", "NAME": given["dbname"], "USER": given.get("user"),
    "HOST": given.get("host"), "PORT": given.get("port"), "PASSWORD": given.get("password")}})
django.setup()
from django.db import connection, transaction
import jobguard
from jobguard.django import atomic

queue = rq.Queue("mail", connection=redis.Redis.from_url(sys.argv[2]))
guard = jobguard.guard(queue, postgres=sys.argv[1])
def send():
    return queue.enqueue("tests.conformance.tasks.say", "/dev/null").id
def waiting():
    return queue.job_ids
class Undo(Exception):
    pass
def undo(block, work):
    try:
        with block:
            work()
            raise Undo
    except Undo:
        pass

with atomic():
    first = send()
    undo(transaction.atomic(), send)
    undo(atomic(), send)
    transaction.on_commit(lambda: order.append(len(waiting())))
    order = []
    assert waiting() == []
assert waiting() == [first], waiting()
undo(atomic(), send)
undo(transaction.atomic(), lambda: atomic(send)())
with transaction.atomic():
    second = atomic(send)()
    third_later = []
    transaction.on_commit(lambda: third_later.append(send()))
    assert waiting() == [first]
assert waiting() == [first, second, *third_later], waiting()
with guard.transaction(connection):
    send()
assert len(waiting()) == 4
with atomic(durable=True, guards=[]):
    send()
    assert len(waiting()) == 5
transaction.set_autocommit(False)
with atomic():
    by_hand = send()
transaction.commit()
with atomic():
    never = send()
transaction.rollback()
transaction.set_autocommit(True)
assert [guard.job(id).state for id in (by_hand, never)] == ["pending", "unknown"]
assert len(waiting()) == 5
"""


def test_django(site: Site, redis_url: str) -> None:
    """`jobguard.django.atomic` is Django's atomic, also as a decorator; `on_commit` is as before."""
    done = subprocess.run(
        [sys.executable, "-c", DJANGO, site.database, redis_url],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
