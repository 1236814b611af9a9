"""A frozen Redis: each producer waits for it once, and not until Redis answers again."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import redis

from jobguard.clients import bounded, take_connection
from jobguard.demo.servers import PostgresServer, RedisServer
from tests.conformance.words import leading
from tests.databases import rows
from tests.integration.hosts import Host, trusted
from tests.support import eventually

LIBRARIES = ["rq", "celery", "dramatiq"]


class Producer:
    """A thread that sends jobs, with the times that the calls took, and their errors."""

    def __init__(self, host: Host, count: int) -> None:
        self.took: list[float] = []
        self.errors: list[Exception] = []
        self._host, self._count = host, count
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        for _ in range(self._count):
            begun = time.monotonic()
            try:
                self._host.send()
            except Exception as error:
                self.errors.append(error)
            self.took.append(time.monotonic() - begun)
            time.sleep(0.05)

    def run_while_frozen(self, server: RedisServer) -> None:
        """Send all jobs while Redis is frozen."""
        server.pause()
        try:
            self._thread.start()
            self._thread.join(90)
            assert not self._thread.is_alive()
        finally:
            server.resume()


def test_a_frozen_redis_costs_one_bound(stack: ExitStack) -> None:
    """A command on the next connection of a host's pool ends after our bound, not when Redis answers."""
    server = stack.enter_context(RedisServer())
    client = redis.Redis.from_url(server.database_url(0), socket_timeout=None)
    stack.callback(client.close)
    client.ping()
    server.pause()
    try:
        connection = take_connection(client.connection_pool, "PING")

        def ping() -> None:
            with bounded(client.connection_pool, connection, 0.3):
                client.ping()

        silence = ThreadPoolExecutor(1).submit(ping).exception(30)
        assert isinstance(silence, redis.TimeoutError)
    finally:
        server.resume()
    assert client.ping()
    assert connection._sock.gettimeout() is None, "the host's own timeout is back"


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_producer_waits_once(library: str, database: str, stack: ExitStack) -> None:
    """A producer's 60 jobs are accepted while Redis is frozen, with few waits, and pushed later."""
    server = stack.enter_context(RedisServer())
    url = server.database_url(0)
    host = Host(library, url)  # with the library's own client, which waits without a limit
    # On a busy machine a record may be late and a leader slow: such a job would be refused.
    guard = host.guard(
        stack, database, connect_timeout=10, call_timeout=10, record_timeout=20, lease=30
    )
    stack.enter_context(leading(guard, database, url))
    eventually(lambda: trusted(database) == 1, 30)
    for _ in range(20):
        host.send()  # Redis has just answered, so the next push does not check it first

    producer = Producer(host, 60)
    producer.run_while_frozen(server)
    assert producer.errors == []
    assert sum(producer.took) < 30, sorted(producer.took)[-5:]  # one wait for each: 60 s
    eventually(lambda: host.waiting() == 80, 30)
    assert rows(database, "select count(*) from jobguard.jobs") == [(80,)]


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_producer_without_postgres_waits_once(
    library: str, own_database: str, own_postgres: PostgresServer, stack: ExitStack
) -> None:
    """If PostgreSQL is away too, each call raises the library's error, and few calls wait for Redis."""
    server = stack.enter_context(RedisServer())
    host = Host(library, server.database_url(0))
    host.guard(stack, own_database, record_timeout=1, call_timeout=0.5, redis_timeout=0.5)
    host.send()
    own_postgres.pause()
    try:
        host.send()  # it waits for PostgreSQL, and reaches Redis
        producer = Producer(host, 40)
        producer.run_while_frozen(server)
        assert len(producer.errors) == 40
        assert sum(producer.took) < 25, sorted(producer.took)[-5:]
        time.sleep(1.5)  # an answer of Redis is older than a second then, so it is asked again
        host.send()
    finally:
        own_postgres.resume()
