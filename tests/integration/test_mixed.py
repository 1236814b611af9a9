"""Several libraries, applications, databases, namespaces and Redises, in one process and one Postgres.

Faults that these tests were seen to catch: one pulse for a namespace (two libraries on one Redis); no
hooks on a second target (`_same`, two applications); a reconciler that uses the first client for every
source (two databases).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import redis
from rq import SimpleWorker

import jobguard
from jobguard.demo.servers import RedisServer
from tests.conformance.words import BRISK, leading
from tests.databases import rows
from tests.integration.hosts import Host, trusted
from tests.support import eventually


@pytest.fixture
def second_url(redis_url: str, redis_databases: Iterator[int]) -> Iterator[str]:
    """Return the URL of another, empty database of the same Redis."""
    url = f"{redis_url.rpartition('/')[0]}/{next(redis_databases)}"
    with redis.Redis.from_url(url) as client:
        client.flushdb()
        yield url
        client.flushdb()


def incidents(database: str) -> int:
    """Return the number of sources with an incident."""
    return int(rows(database, "select count(distinct source) from jobguard.incidents")[0][0])


def all_waiting(*hosts: Host) -> list[int]:
    """Return the number of waiting jobs of each host."""
    return [host.waiting() for host in hosts]


def test_three_libraries_on_one_redis(redis_url: str, database: str, stack: ExitStack) -> None:
    """Three libraries have three sources and three pulses, and a loss of all is restored for each."""
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
    """Two applications on one Redis are both guarded, and each job is recorded once."""
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
    """The losses of one database are restored there, and the other database is not changed."""
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
    """Two namespaces in one Postgres have separate leaders; each leader restores only its own jobs."""
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
    # The worker confirms that this is the right Redis, but no leader had seen the queue before the loss.
    eventually(lambda: trusted(database) == 2, 30)
    other.send()
    eventually(lambda: len(rows(database, "select from jobguard.leader")) == 2, 30)
    assert (one.waiting(), other.waiting()) == (1, 1)


def test_two_namespaces_on_one_redis_and_one_library(
    redis_url: str, database: str, stack: ExitStack
) -> None:
    """Two namespaces on one Redis have separate pulses; each leader restores only its own jobs."""
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


@pytest.mark.parametrize("library", ["celery", "dramatiq", "rq"])
def test_two_namespaces_of_one_process_on_one_redis(
    library: str, redis_url: str, database: str, stack: ExitStack
) -> None:
    """Two namespaces guard different queues of one Redis: each records the jobs of its own queue."""
    one, other = Host(library, redis_url), Host(library, redis_url, queue="bulk")
    one.guard(stack, database, namespace="one")
    other.guard(stack, database, namespace="other")
    sent = {"one": one.send(), "other": other.send()}
    found = rows(
        database,
        "select s.namespace, j.job_id from jobguard.jobs j join jobguard.sources s on s.id = j.source",
    )
    assert dict(found) == sent and len(found) == 2


def test_an_rq_worker_of_two_namespaces_names_the_queues_that_it_does_not_guard(
    redis_url: str, database: str, stack: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    """It reports to the namespace of most of its queues, and says which queues are of another one."""
    hosts = [Host("rq", redis_url, queue=name) for name in ("mail", "bulk", "press")]
    for host, namespace in zip(hosts, ("one", "other", "other"), strict=True):
        host.guard(stack, database, namespace=namespace)
    worker: Any = SimpleWorker([host.target for host in hosts], connection=hosts[0].client)
    with caplog.at_level("INFO", logger="rq"):
        worker.register_birth()
    worker.register_death()
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert "guarded by jobguard: bulk, press of rq at" in text
    assert "another namespace guards them: mail." in text


def test_two_redis_servers_and_one_reconciler(
    redis_url: str, own_redis: RedisServer, database: str, stack: ExitStack
) -> None:
    """While one of two Redis servers is down, the other is restored; then the first one is, too."""
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
    """The stats of a guard count only its own source, also if other sources have the same queue name."""
    hosts = [Host(library, redis_url) for library in ("celery", "dramatiq", "rq")]
    guards = [host.guard(stack, database) for host in hosts]
    for number, host in enumerate(hosts, 1):
        for _ in range(number):
            host.send()
    assert [guard.stats().total for guard in guards] == [1, 2, 3]


def test_settings_of_one_source_must_agree(redis_url: str, database: str, stack: ExitStack) -> None:
    """A second application of one source with other settings gets an error that names the setting."""
    one, other = Host("dramatiq", redis_url), Host("dramatiq", redis_url)
    guard = one.guard(stack, database)
    with pytest.raises(jobguard.JobguardError, match="durability"):
        jobguard.guard(other.target, postgres=database, **{**BRISK, "durability": "relaxed"})
    assert replace(guard.settings, durability="strict") == guard.settings
