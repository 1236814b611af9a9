"""Chaos knows where each library keeps its jobs: what a fault is dealt to is there, and then gone."""

from __future__ import annotations

import celery
import pytest
import redis
import rq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.message import Message

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
def test_one_waiting_job_is_found_told_of_and_deleted(library: str, redis_url: str) -> None:
    """As the library itself has put it there."""
    layout = LIBRARIES[library].layout
    with redis.Redis.from_url(redis_url) as client:
        job_id = SENDERS[library](redis_url, client)
        lists = layout.lists(client, QUEUES)
        ((key, (member,)),) = ((key, members) for key, members in lists.items() if members)
        assert any(layout.about(client, QUEUES, job_id).values())
        assert layout.delete(client, key, member)
        assert layout.delete(client, key, member) is None
        assert not any(layout.about(client, QUEUES, job_id).values())
