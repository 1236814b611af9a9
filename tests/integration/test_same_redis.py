"""A guarded Redis is guarded also by another spelling of its address.

Faults that these tests were seen to catch: the address alone decides; another server counts as the same; no
answer counts as an answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import celery
import pytest
import redis
from rq import Queue, SimpleWorker

import jobguard
from jobguard import same_redis
from jobguard.adapter import Source
from jobguard.adapters.celery import lookup
from jobguard.clients import address_of
from jobguard.demo.servers import RedisServer
from jobguard.pulse import pulse_key
from tests.conformance.words import BRISK
from tests.databases import rows
from tests.fakes.world import events
from tests.support import eventually


@pytest.fixture(autouse=True)
def no_answers() -> Iterator[None]:
    """Forget the answers of the servers of other tests."""
    same_redis._found.clear()
    yield
    same_redis._found.clear()


def alias_of(url: str) -> str:
    """Return the URL with another spelling of this machine."""
    assert "127.0.0.1" in url
    return url.replace("127.0.0.1", "127.1")


def found(guarded: str, asked: str) -> bool:
    """Return True if a tracker at the one URL is found by a client of the other one."""
    client = redis.Redis.from_url(guarded)
    source = Source("default", "rq", address_of(client))
    tracker: Any = SimpleNamespace(source=source, client=lambda: redis.Redis.from_url(guarded))
    there = redis.Redis.from_url(asked)
    assert address_of(there) != source.address
    return bool(same_redis.trackers_at([tracker], address_of(there), lambda: there))


def test_rq_is_guarded_by_another_spelling(redis_url: str, database: str, stack: ExitStack) -> None:
    """A queue and a worker with a connection of their own are those of the guarded Redis."""
    guarded = stack.enter_context(redis.Redis.from_url(redis_url))
    given: dict[str, Any] = {"postgres": database, **BRISK}
    stack.enter_context(jobguard.guard(guarded, **given))
    other = stack.enter_context(redis.Redis.from_url(alias_of(redis_url)))
    queue = Queue("mail", connection=other)
    ran, cancelled = queue.enqueue("builtins.print", "x"), queue.enqueue("builtins.print", "y")
    assert rows(database, "select count(*) from jobguard.jobs") == [(2,)]
    cancelled.cancel()
    SimpleWorker([queue], connection=other).work(burst=True)

    def ended() -> dict[str, str]:
        return dict(rows(database, "select job_id, outcome::text from jobguard.history"))

    eventually(lambda: ended() == {ran.id: "completed", cancelled.id: "cancelled"})
    assert rows(database, "select count(*) from jobguard.sources") == [(1,)]


def test_celery_is_guarded_by_another_spelling(
    redis_url: str, database: str, stack: ExitStack
) -> None:
    """A task that an app sends on a connection of its own is recorded; its workers are guarded too."""
    app = celery.Celery("app", broker=redis_url, set_as_current=False)
    guard = stack.enter_context(jobguard.guard(app, postgres=database))
    with app.connection_for_write(alias_of(redis_url)) as connection:
        app.send_task("app.task", connection=connection)
        assert [tracker.source for tracker in lookup.trackers_at(connection)] == [
            guard._tracker and guard._tracker.source
        ]
    assert rows(database, "select count(*) from jobguard.jobs") == [(1,)]


def test_another_server_or_database_is_not_guarded(
    redis_server: Any, redis_url: str, own_redis: RedisServer
) -> None:
    """A second Redis of the application stays its own affair."""
    assert found(redis_url, alias_of(redis_url))
    assert not found(own_redis.database_url(1), redis_server.database_url(2))
    assert not found(own_redis.database_url(1), redis_server.database_url(1))


def test_the_pulse_tells_where_info_is_forbidden(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Without INFO, the pulse is compared; without a pulse, the log says that nothing is known."""
    url = own_redis.database_url(0)
    with redis.Redis.from_url(url) as client:
        client.execute_command("ACL", "SETUSER", "default", "-info")
        assert not found(url, alias_of(url))
        assert events(caplog.records).count("redis_unrecognized") == 1
        same_redis._found.clear()
        source = Source("default", "rq", address_of(client))
        epoch = "00000000-0000-7000-8000-000000000001"
        pulse = {"epoch": epoch, "n": 1, "source": source.id, "installation": epoch}
        client.hset(pulse_key(source), mapping=pulse)
        assert found(url, alias_of(url))


def test_a_server_that_does_not_answer_is_asked_again(
    own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outage is no answer: the last one stays, and the first one comes after it."""
    monkeypatch.setattr(same_redis, "_ASK_AGAIN", 0.0)
    url = own_redis.database_url(0)
    own_redis.kill()
    assert not found(url, alias_of(url))
    own_redis.restart(keep_data=False)
    assert found(url, alias_of(url))
    own_redis.kill()
    for key, (_, there) in same_redis._found.items():
        same_redis._found[key] = (0.0, there)
    assert found(url, alias_of(url))
