"""Several libraries, applications, databases, namespaces and Redises, in one process and one Postgres.

Planted once, each seen to fail: one pulse a namespace (two libraries on one Redis); `_same` that hooks no
second target (two applications); a reconciler that takes the first client for every source (two dbs).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
import redis

import jobguard
from jobguard.demo.servers import RedisServer
from tests.conformance.words import BRISK
from tests.integration.hosts import Host, leading, rows, trusted
from tests.support import eventually


@pytest.fixture
def second_url(redis_url: str, redis_databases: Iterator[int]) -> Iterator[str]:
    """Give another database of the same Redis, empty."""
    url = f"{redis_url.rpartition('/')[0]}/{next(redis_databases)}"
    with redis.Redis.from_url(url) as client:
        client.flushdb()
        yield url
        client.flushdb()


def incidents(database: str) -> int:
    """Return how many sources have lost something."""
    return int(rows(database, "select count(distinct source) from jobguard.incidents")[0][0])


def all_waiting(*hosts: Host) -> list[int]:
    """Return how many jobs wait in each."""
    return [host.waiting() for host in hosts]


def test_three_libraries_on_one_redis(redis_url: str, database: str, stack: ExitStack) -> None:
    """Each has its source and its pulse; a loss is a loss for all, and each is put back as it was."""
    hosts = [Host(library, redis_url) for library in ("rq", "celery", "dramatiq")]
    guards = [host.guard(stack, database) for host in hosts]
    stack.enter_context(leading(guards[0], database, redis_url))
    eventually(lambda: trusted(database) == 3, 30)
    for host in hosts:
        for _ in range(3):
            host.send()
    assert all_waiting(*hosts) == [3, 3, 3]
    hosts[0].client.flushdb()
    eventually(lambda: all_waiting(*hosts) == [3, 3, 3], 30)
    eventually(lambda: incidents(database) == 3, 30)
    pulses = {key.decode() for key in hosts[0].client.scan_iter("jobguard:pulse:*")}
    assert {key.split(":")[3] for key in pulses} == {"rq", "celery", "dramatiq"}


@pytest.mark.parametrize("library", ["celery", "dramatiq", "rq"])
def test_two_applications_on_one_redis_are_one_source(
    library: str, redis_url: str, database: str, stack: ExitStack
) -> None:
    """Both are guarded; what either sends is recorded once."""
    hosts = [Host(library, redis_url) for _ in range(2)]
    guards = [host.guard(stack, database) for host in hosts]
    assert guards[0]._tracker is guards[1]._tracker
    sent = {host.send() for host in hosts}
    owed = rows(database, "select job_id from jobguard.jobs")
    assert {job_id for (job_id,) in owed} == sent and len(owed) == 2


@pytest.mark.parametrize("library", ["celery", "dramatiq", "rq"])
def test_two_databases_of_one_redis_are_two_sources(
    library: str, redis_url: str, second_url: str, database: str, stack: ExitStack
) -> None:
    """In one namespace: what one loses is put back there, and the other is left alone."""
    one, other = Host(library, redis_url), Host(library, second_url)
    guards = [host.guard(stack, database) for host in (one, other)]
    assert guards[0]._tracker is not guards[1]._tracker
    stack.enter_context(leading(guards[0], database, redis_url, second_url))
    eventually(lambda: trusted(database) == 2, 30)
    one.send()
    other.send()
    other.send()
    other.client.flushdb()
    eventually(lambda: all_waiting(one, other) == [1, 2], 30)
    assert incidents(database) == 1


def test_two_namespaces_do_not_see_each_other(
    redis_url: str, second_url: str, database: str, stack: ExitStack
) -> None:
    """Each has a leader of its own, in one Postgres."""
    one, other = Host("celery", redis_url), Host("celery", second_url)
    guards = [
        one.guard(stack, database, namespace="one"),
        other.guard(stack, database, namespace="other"),
    ]
    stack.enter_context(leading(guards[0], database, redis_url, second_url))
    eventually(lambda: trusted(database) == 1, 30)
    one.send()
    other.send()
    one.client.flushdb()
    other.client.flushdb()
    eventually(lambda: one.waiting() == 1, 30)
    assert other.waiting() == 0
    stack.enter_context(leading(guards[1], database, redis_url, second_url))
    # Its worker vouches for the place; but no leader had seen its queue before the loss.
    eventually(lambda: trusted(database) == 2, 30)
    other.send()
    eventually(lambda: len(rows(database, "select from jobguard.leader")) == 2, 30)
    assert (one.waiting(), other.waiting()) == (1, 1)


def test_two_namespaces_on_one_redis_and_one_library(
    redis_url: str, database: str, stack: ExitStack
) -> None:
    """Two tenants' pulses stand side by side; each leader puts back what is its own."""
    one, other = Host("rq", redis_url), Host("dramatiq", redis_url)
    first = one.guard(stack, database, namespace="one")
    second = other.guard(stack, database, namespace="other")
    for guard in (first, second):
        stack.enter_context(leading(guard, database, redis_url))
    eventually(lambda: trusted(database) == 2, 30)
    one.send()
    other.send()
    one.client.flushdb()
    eventually(lambda: all_waiting(one, other) == [1, 1], 30)


def test_two_redis_servers_and_one_reconciler(
    redis_url: str, own_redis: RedisServer, database: str, stack: ExitStack
) -> None:
    """One is killed and comes back empty: the other goes on meanwhile."""
    one, other = Host("celery", redis_url), Host("dramatiq", own_redis.url)
    guards = [host.guard(stack, database) for host in (one, other)]
    stack.enter_context(leading(guards[0], database, redis_url, own_redis.url))
    eventually(lambda: trusted(database) == 2, 30)
    one.send()
    other.send()
    own_redis.kill()
    one.client.flushdb()
    eventually(lambda: one.waiting() == 1, 30)
    own_redis.start()
    eventually(lambda: all_waiting(one, other) == [1, 1], 30)


def test_stats_of_a_guard_are_of_its_source_alone(
    redis_url: str, database: str, stack: ExitStack
) -> None:
    """Three libraries on one Redis may each have a queue of one name."""
    hosts = [Host(library, redis_url) for library in ("celery", "dramatiq", "rq")]
    guards = [host.guard(stack, database) for host in hosts]
    for number, host in enumerate(hosts, 1):
        for _ in range(number):
            host.send()
    assert [guard.stats().total for guard in guards] == [1, 2, 3]


def test_settings_of_one_source_must_agree(redis_url: str, database: str, stack: ExitStack) -> None:
    """A second application of the same source with other settings is an error that names them."""
    one, other = Host("dramatiq", redis_url), Host("dramatiq", redis_url)
    guard = one.guard(stack, database)
    with pytest.raises(jobguard.JobguardError, match="durability"):
        jobguard.guard(other.target, postgres=database, **{**BRISK, "durability": "relaxed"})
    assert replace(guard.settings, durability="strict") == guard.settings
