"""Sources are independent: a Redis that hangs, is full or has invalid data does not affect others."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import Any

import pytest
import redis

from jobguard.demo.servers import RedisServer
from jobguard.reconciler import service
from jobguard.reconciler.refusals import REFUSED, Refusals
from jobguard.reconciler.source_monitor import SourceMonitor
from tests.conformance.words import leading
from tests.databases import rows
from tests.fakes.world import events
from tests.integration.hosts import Host, trusted
from tests.support import eventually


def test_redises_that_hang_disarm_no_other(redis_url: str, database: str, stack: ExitStack) -> None:
    """While three Redises are stopped, the losses of a fourth one are restored in the same term."""
    servers = [stack.enter_context(RedisServer()) for _ in range(3)]
    urls = [redis_url, *(server.database_url(0) for server in servers)]
    hosts = [Host("rq", url) for url in urls]
    guards = [host.guard(stack, database) for host in hosts]
    stack.enter_context(leading(guards[0], database, *urls))
    eventually(lambda: trusted(database) == 4, 30)
    for _ in range(3):
        hosts[0].send()
    term = rows(database, "select term from jobguard.leader")
    for server in servers:
        server.pause()
        stack.callback(server.resume)

    for _ in range(3):
        hosts[0].client.flushdb()
        eventually(lambda: hosts[0].waiting() == 3, 10)
    assert rows(database, "select term from jobguard.leader") == term


def test_a_step_that_is_stuck_gives_the_term_up(
    redis_url: str,
    database: str,
    stack: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A step that hangs without a timeout is logged; a new term starts and does the work."""
    monkeypatch.setattr(service, "_STUCK", 0.5)
    monkeypatch.setattr(service, "_GIVE_UP", 1.0)
    host = Host("rq", redis_url)
    guard = host.guard(stack, database)
    release, stuck = threading.Event(), threading.Event()
    stack.callback(release.set)
    step = SourceMonitor.step

    def hanging(self: SourceMonitor, term: int, signs: Any) -> None:
        if term == 1 and host.waiting():
            stuck.set()
            release.wait(60)
        step(self, term, signs)

    monkeypatch.setattr(SourceMonitor, "step", hanging)
    stack.enter_context(leading(guard, database, redis_url))
    eventually(lambda: trusted(database) == 1, 30)
    host.send()
    eventually(stuck.is_set, 10)
    host.client.flushdb()

    eventually(lambda: host.waiting() == 1, 30)
    assert rows(database, "select term from jobguard.leader")[0][0] > 1
    assert "step_stuck" in events(caplog.records)


@pytest.mark.parametrize("library", ["rq", "celery", "dramatiq"])
def test_a_full_redis_is_one_state(
    library: str,
    database: str,
    stack: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Jobs wait while Redis is full, with one open incident and few log lines; then all are restored."""
    caplog.set_level("INFO", logger="jobguard")
    monkeypatch.setattr(
        Refusals.__init__, "__defaults__", (REFUSED._replace(forget=5.0),)
    )  # five of its probes, not sixty
    server = stack.enter_context(RedisServer())
    url = server.database_url(0)
    host = Host(library, url)
    guard = host.guard(stack, database)
    stack.enter_context(leading(guard, database, url))
    eventually(lambda: trusted(database) == 1, 30)
    for _ in range(50):
        host.send()
    admin = stack.enter_context(redis.Redis.from_url(url))
    admin.config_set("maxmemory-policy", "noeviction")
    admin.flushall()
    admin.config_set("maxmemory", 1)

    def refused() -> list[str]:
        query = "select detail from jobguard.incidents where closed_at is null and cause = 'push'"
        return [detail for (detail,) in rows(database, query)]

    eventually(lambda: any("OOM" in detail for detail in refused()), 20)
    admin.config_set("maxmemory", 0)
    eventually(lambda: host.waiting() == 50, 30)
    eventually(lambda: not refused(), 90)
    assert events(caplog.records).count("redis_refuses") <= 2
    assert "job_not_restored" not in events(caplog.records)


@pytest.mark.parametrize("library", ["rq", "celery", "dramatiq"])
def test_nonsense_in_redis_stops_nothing(
    library: str, redis_url: str, database: str, stack: ExitStack
) -> None:
    """Lost jobs are restored despite a broken beat, a pulse of another type and broken registry names."""
    host = Host(library, redis_url)
    guard = host.guard(stack, database)
    stack.enter_context(leading(guard, database, redis_url))
    eventually(lambda: trusted(database) == 1, 30)
    for _ in range(3):
        host.send()
    pulses = list(host.client.scan_iter("jobguard:pulse:*"))
    client: Any = host.client
    host.client.flushdb()
    for ((worker,),) in [rows(database, "select id from jobguard.workers")]:
        client.set(f"jobguard:beat:{worker.hex}", "oops")
    for key in pulses:
        client.set(key, b"\xff")
    client.sadd("rq:queues", b"rq:queue:\xff")
    client.sadd(b"rq:workers:mail", b"rq:worker:\xff")

    eventually(lambda: host.waiting() == 3, 30)
    eventually(lambda: client.type(pulses[0]) == b"hash", 10)
