"""A Redis that is frozen: each producer waits for it once, and is not held for as long as that lasts."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack

import pytest

from jobguard.demo.servers import RedisServer
from tests.integration.hosts import Host, leading, rows, trusted
from tests.support import eventually


@pytest.mark.parametrize("library", ["rq", "celery", "dramatiq"])
def test_a_producer_waits_once(library: str, database: str, stack: ExitStack) -> None:
    """All of 60 jobs are accepted while Redis is frozen, with one wait; all of them are pushed later."""
    server = stack.enter_context(RedisServer())
    url = server.database_url(0)
    host = Host(library, url)  # with the library's own client, which waits for ever
    guard = host.guard(stack, database)
    stack.enter_context(leading(guard, database, url))
    eventually(lambda: trusted(database) == 1, 30)
    for _ in range(20):
        host.send()  # Redis has answered just now: it is not asked before the next push

    took: list[float] = []

    def produce() -> None:
        for _ in range(60):
            begun = time.monotonic()
            host.send()
            took.append(time.monotonic() - begun)
            time.sleep(0.05)

    producer = threading.Thread(target=produce, daemon=True)
    server.pause()
    try:
        producer.start()
        producer.join(60)
        assert not producer.is_alive()
    finally:
        server.resume()
    assert sum(one > 0.2 for one in took) <= 3, sorted(took)[-5:]
    eventually(lambda: host.waiting() == 80, 30)
    assert rows(database, "select count(*) from jobguard.jobs") == [(80,)]
