"""Tests of the chaos layouts: a job of each library can be found, and deleted."""

from __future__ import annotations

import json
from typing import Any

import celery
import pytest
import redis
import rq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.message import Message

from jobguard.model import DROPPED_BY_LIVE_WORKER
from tests.chaos.libraries import LIBRARIES, QUEUES


def send_to_rq(url: str, client: redis.Redis) -> str:
    """Enqueue one job."""
    return rq.Queue("mail", connection=client).enqueue("tests.chaos.tasks.work", 1, 0.1).id


def send_to_celery(url: str, client: redis.Redis) -> str:
    """Send one task."""
    app = celery.Celery(broker=url, backend=url)
    return str(app.send_task("work", (1, 0.1), queue="mail").id)


def send_to_dramatiq(url: str, client: redis.Redis) -> str:
    """Enqueue one message."""
    broker = RedisBroker(url=url)  # type: ignore[no-untyped-call]
    broker.declare_queue("mail")
    message: Message[None] = Message("mail", "work", (1, 0.1), {}, {})
    return str(broker.enqueue(message).message_id)


SENDERS = {"rq": send_to_rq, "celery": send_to_celery, "dramatiq": send_to_dramatiq}


@pytest.mark.parametrize("library", LIBRARIES)
def test_one_waiting_job_is_found_and_deleted(library: str, redis_url: str) -> None:
    """A waiting job is found and deleted in the place where the library itself pushed it."""
    layout = LIBRARIES[library].layout
    with redis.Redis.from_url(redis_url) as client:
        job_id = SENDERS[library](redis_url, client)
        lists = layout.lists(client, QUEUES)
        ((key, (member,)),) = ((key, members) for key, members in lists.items() if members)
        assert any(layout.about(client, QUEUES, job_id).values())
        assert layout.unfinished(client, QUEUES) == {job_id}
        assert layout.delete(client, key, member)
        assert layout.delete(client, key, member) is None
        assert not any(layout.about(client, QUEUES, job_id).values())


def test_a_message_that_a_celery_worker_took_is_found(redis_url: str) -> None:
    """A message that a worker took is only in `unacked`, until the worker acknowledges it."""
    layout = LIBRARIES["celery"].layout
    with (
        redis.Redis.from_url(redis_url) as client,
        celery.Celery(broker=redis_url).connection_for_read() as connection,
    ):
        job_id = send_to_celery(redis_url, client)
        message = connection.SimpleQueue("mail").get(timeout=10)
        assert not any(layout.lists(client, QUEUES).values())
        assert layout.unfinished(client, QUEUES) == {job_id}
        unacked: Any = client.hgetall("unacked")
        ((tag, entry),) = unacked.items()
        taken = json.loads(entry)
        taken[0]["headers"]["jobguard-worker"] = DROPPED_BY_LIVE_WORKER
        client.hset("unacked", tag, json.dumps(taken))
        assert layout.unfinished(client, QUEUES) == set()
        client.hset("unacked", tag, entry)
        message.ack()
        assert layout.unfinished(client, QUEUES) == set()
