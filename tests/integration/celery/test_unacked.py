"""The reports of a worker about its taken messages: renewed, or dropped."""

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


class QoS:
    """The table that kombu keeps for one connection."""

    visibility_timeout = HOUR

    def __init__(self, *tags: str) -> None:
        self._delivered = dict.fromkeys(tags)
        self.channel = SimpleNamespace(closed=False, connection=SimpleNamespace(client=self))


@pytest.fixture
def session() -> UUID:
    """Return the id of a worker."""
    return uuid4()


@pytest.fixture
def unacked(app: celery.Celery, tracker: FakeTracker, session: UUID) -> Unacked:
    """Give the taken messages of one worker."""
    return Unacked(app, tracker.source, session=lambda: session, is_ours=lambda _: True, runs=set)


@pytest.fixture
def taken(
    app: celery.Celery, tracker: FakeTracker, client: redis.Redis
) -> Callable[[UUID], tuple[str, Any]]:
    """Return a function that sends a task and takes it as a worker; it returns the tag and the delivery."""

    def send(worker: UUID) -> tuple[str, Any]:
        app.tasks["add"].delay(1)
        return take(client, worker=worker.hex), tracker.recorded[-1]

    return send


def break_off(qos: Any) -> None:
    """Close the connection of this table."""
    qos.channel.closed = True


def test_messages_of_a_broken_connection_are_dropped(
    unacked: Unacked, taken: Any, session: UUID, broker: CeleryBroker
) -> None:
    """Messages of a lost connection are reported as dropped, and no others."""
    tag, ours = taken(session)
    other = uuid4()
    others, theirs = taken(other)
    qos: Any = QoS(tag, others, "gone by now")
    unacked.add(qos)
    unacked.refresh()
    assert observe(broker, ours).taken_by == session.hex
    break_off(qos)
    unacked.refresh()
    assert observe(broker, ours).taken_by == DROPPED_BY_LIVE_WORKER
    assert observe(broker, theirs).taken_by == other.hex


def test_a_message_taken_again_by_another_connection_is_kept(
    unacked: Unacked, taken: Any, session: UUID, broker: CeleryBroker, client: redis.Redis
) -> None:
    """A message that was taken again is not reported, although it has the same tag."""
    tag, ours = taken(session)
    before, after = QoS(tag), QoS(tag)
    unacked.add(before)  # type: ignore[arg-type]
    time.sleep(0.001)  # let the clock advance
    unacked.add(after)  # type: ignore[arg-type]
    client.zadd("unacked_index", {tag: time.time()})
    break_off(before)
    unacked.refresh()
    assert observe(broker, ours).taken_by == session.hex


def test_another_channel_of_the_same_connection_is_no_later_one(
    unacked: Unacked, taken: Any, session: UUID, broker: CeleryBroker
) -> None:
    """Another channel of the same connection does not count as a later connection."""
    queue: Any = QoS()
    other: Any = QoS()
    other.channel.connection = queue.channel.connection
    unacked.add(queue)
    time.sleep(0.001)  # let the clock advance
    unacked.add(other)
    tag, ours = taken(session)
    queue._delivered[tag] = None
    break_off(queue)
    break_off(other)
    unacked.refresh()
    assert observe(broker, ours).taken_by == DROPPED_BY_LIVE_WORKER


def test_a_message_that_redis_may_have_moved_is_dropped_too(
    unacked: Unacked, taken: Any, session: UUID, broker: CeleryBroker
) -> None:
    """A message is reported if the connection broke while kombu wrote it: kombu does not know of it."""
    qos: Any = QoS()
    unacked.add(qos)
    tag, ours = taken(session)
    unacked.add_uncertain(qos, tag)
    break_off(qos)
    unacked.refresh()
    assert observe(broker, ours).taken_by == DROPPED_BY_LIVE_WORKER


def test_a_message_that_this_process_still_runs_is_kept_until_its_end(
    app: celery.Celery, tracker: FakeTracker, taken: Any, session: UUID, broker: CeleryBroker
) -> None:
    """The backlog of a pool of threads is not cleared, so its messages are not reported."""
    tag, ours = taken(session)
    backlog = {tag}
    unacked = Unacked(
        *(app, tracker.source),
        session=lambda: session,
        is_ours=lambda _: True,
        runs=lambda: backlog,
    )
    qos: Any = QoS(tag)
    unacked.add(qos)
    break_off(qos)
    unacked.refresh()
    assert observe(broker, ours).taken_by == session.hex
    backlog.clear()
    unacked.refresh()
    assert observe(broker, ours).taken_by == DROPPED_BY_LIVE_WORKER


def test_the_report_is_repeated_until_redis_takes_it(
    make_app: Any, taken: Any, session: UUID, tracker: FakeTracker, own_redis: RedisServer
) -> None:
    """A beat while Redis is still away reports later."""
    away = make_app(broker_url=own_redis.url)
    unacked = Unacked(
        away, tracker.source, session=lambda: session, is_ours=lambda _: True, runs=set
    )
    qos: Any = QoS("tag")
    unacked.add(qos)
    break_off(qos)
    entry = f'[{{"headers": {{"jobguard-worker": "{session.hex}"}}}}, "", "celery"]'
    with redis.Redis.from_url(own_redis.url) as client:
        client.ping()
        own_redis.kill()
        unacked.refresh()
        own_redis.start()
        client.hset("unacked", "tag", entry)
        client.zadd("unacked_index", {"tag": time.time()})
        unacked.refresh()
        reported = client.hget("unacked", "tag") or b""
    assert DROPPED_BY_LIVE_WORKER.encode() in reported and session.hex.encode() not in reported
