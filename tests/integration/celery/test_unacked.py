"""What a worker says of what it has taken: that it holds it still, or no longer.

Planted once, each seen to fail: a worker that lets go of whatever has its tag (no ``since``), of what is
another's (no session in the pattern), and one that forgets it without having been heard.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import celery
import pytest
import redis

from jobguard.adapters.celery.broker import CeleryBroker
from jobguard.adapters.celery.unacked import Unacked
from jobguard.demo.servers import RedisServer
from jobguard.model import DROPPED_BY_LIVE_WORKER
from tests.integration.celery.support import FakeTracker, observe, take

HOUR = 3600.0


class Books:
    """What kombu notes of one connection."""

    visibility_timeout = HOUR

    def __init__(self, *tags: str) -> None:
        self._delivered = dict.fromkeys(tags)
        self.channel = SimpleNamespace(closed=False, connection=SimpleNamespace(client=self))


@pytest.fixture
def session() -> UUID:
    """Name a worker."""
    return uuid4()


@pytest.fixture
def unacked(app: celery.Celery, tracker: FakeTracker, session: UUID) -> Unacked:
    """Give what one worker holds."""
    return Unacked(app, tracker.source, session=lambda: session, is_ours=lambda _: True, runs=set)


@pytest.fixture
def taken(
    app: celery.Celery, tracker: FakeTracker, client: redis.Redis
) -> Callable[[UUID], tuple[str, Any]]:
    """Return what sends a task and has a worker take it; gives its tag and its delivery."""

    def send(worker: UUID) -> tuple[str, Any]:
        app.tasks["add"].delay(1)
        return take(client, worker=worker.hex), tracker.recorded[-1]

    return send


def break_off(books: Any) -> None:
    """Close its connection."""
    books.channel.closed = True


def test_what_a_broken_connection_had_taken_is_nobodys(
    unacked: Unacked, taken: Any, session: UUID, broker: CeleryBroker
) -> None:
    """But nobody else's is touched."""
    tag, ours = taken(session)
    other = uuid4()
    others, theirs = taken(other)
    books: Any = Books(tag, others, "gone by now")
    unacked.add(books)
    unacked.tend()
    assert observe(broker, ours).taken_by == session.hex
    break_off(books)
    unacked.tend()
    assert observe(broker, ours).taken_by == DROPPED_BY_LIVE_WORKER
    assert observe(broker, theirs).taken_by == other.hex


def test_what_was_taken_anew_by_another_connection_is_held(
    unacked: Unacked, taken: Any, session: UUID, broker: CeleryBroker, client: redis.Redis
) -> None:
    """It has the same tag."""
    tag, ours = taken(session)
    before, after = Books(tag), Books(tag)
    unacked.add(before)  # type: ignore[arg-type]
    time.sleep(0.001)  # the clock goes on
    unacked.add(after)  # type: ignore[arg-type]
    client.zadd("unacked_index", {tag: time.time()})
    break_off(before)
    unacked.tend()
    assert observe(broker, ours).taken_by == session.hex


def test_another_channel_of_the_same_connection_is_no_later_one(
    unacked: Unacked, taken: Any, session: UUID, broker: CeleryBroker
) -> None:
    """What was taken after it began to take is lost with the connection all the same."""
    queue: Any = Books()
    other: Any = Books()
    other.channel.connection = queue.channel.connection
    unacked.add(queue)
    time.sleep(0.001)  # the clock goes on
    unacked.add(other)
    tag, ours = taken(session)
    queue._delivered[tag] = None
    break_off(queue)
    break_off(other)
    unacked.tend()
    assert observe(broker, ours).taken_by == DROPPED_BY_LIVE_WORKER


def test_what_redis_may_have_heard_is_let_go_too(
    unacked: Unacked, taken: Any, session: UUID, broker: CeleryBroker
) -> None:
    """The connection broke while kombu wrote down that it takes this: it does not know of it."""
    books: Any = Books()
    unacked.add(books)
    tag, ours = taken(session)
    unacked.doubt(books, tag)
    break_off(books)
    unacked.tend()
    assert observe(broker, ours).taken_by == DROPPED_BY_LIVE_WORKER


def test_what_runs_in_this_process_all_the_same_is_kept_until_it_has_run(
    app: celery.Celery, tracker: FakeTracker, taken: Any, session: UUID, broker: CeleryBroker
) -> None:
    """The backlog of a pool of threads is not cleared."""
    tag, ours = taken(session)
    backlog = {tag}
    unacked = Unacked(
        *(app, tracker.source),
        session=lambda: session,
        is_ours=lambda _: True,
        runs=lambda: backlog,
    )
    books: Any = Books(tag)
    unacked.add(books)
    break_off(books)
    unacked.tend()
    assert observe(broker, ours).taken_by == session.hex
    backlog.clear()
    unacked.tend()
    assert observe(broker, ours).taken_by == DROPPED_BY_LIVE_WORKER


def test_it_is_said_again_until_redis_hears_it(
    make_app: Any, taken: Any, session: UUID, tracker: FakeTracker, own_redis: RedisServer
) -> None:
    """A beat comes while Redis is still away."""
    away = make_app(broker_url=own_redis.url)
    unacked = Unacked(
        away, tracker.source, session=lambda: session, is_ours=lambda _: True, runs=set
    )
    books: Any = Books("tag")
    unacked.add(books)
    break_off(books)
    entry = f'[{{"headers": {{"jobguard-worker": "{session.hex}"}}}}, "", "celery"]'
    with redis.Redis.from_url(own_redis.url) as client:
        client.ping()
        own_redis.kill()
        unacked.tend()
        own_redis.start()
        client.hset("unacked", "tag", entry)
        client.zadd("unacked_index", {"tag": time.time()})
        unacked.tend()
        reported = client.hget("unacked", "tag") or b""
    assert DROPPED_BY_LIVE_WORKER.encode() in reported and session.hex.encode() not in reported
