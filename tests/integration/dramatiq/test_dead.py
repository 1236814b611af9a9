"""A message whose crash budget is spent: a worker sends its failure callback once, and it never runs."""

from __future__ import annotations

import time
from typing import Any
from uuid import uuid4

import dramatiq
import redis

from jobguard.adapter import Source
from jobguard.adapters.dramatiq.broker import DramatiqBroker
from jobguard.guard import JobGuard
from jobguard.model import Outcome
from jobguard.store.leader import PostgresLeaderStore
from jobguard.store.protocols import Closing
from tests.integration.dramatiq.stage import KEYS, Stage


def test_its_failure_callback_is_sent_once(
    stage: Stage, guard: JobGuard, source: Source, database: str, redis_url: str
) -> None:
    """The failure callback of a dead message is sent once, also if a copy of the message comes later."""
    declare: Any = dramatiq.actor
    called: list[tuple[Any, Any]] = []

    def hear(message: Any, error: Any) -> None:
        called.append((message["message_id"], error["type"]))

    declare(hear, broker=stage.broker, actor_name="hear")
    declare(stage.say, broker=stage.broker, actor_name="doomed", on_failure="hear")
    message: Any = stage.broker.actors["doomed"].send("ran")
    rid = message.options["redis_message_id"]

    store = PostgresLeaderStore(lambda: database, "default", uuid4(), guard.settings)
    term = store.elect(lease=60)
    assert term is not None
    (owed,) = store.page(source.id, after=None, limit=10)
    dead = store.envelopes(source.id, [owed.token])
    store.close_owed(term, source.id, [Closing(owed.token, Outcome.DEAD, "its budget is spent")])
    with redis.Redis.from_url(redis_url) as client:
        broker = DramatiqBroker(source, client)
        broker.bury([owed], deadline=time.time() + 60)
        broker.report(dead, deadline=time.time() + 60)
        store.close()

        stage.work()
        assert called == [(message.message_id, "WorkersDied")]
        assert stage.said() == []
        assert client.hexists(f"{KEYS}.XQ.msgs", rid)

        client.hset(f"{KEYS}.msgs", rid, message.encode())
        client.rpush(KEYS, rid)
        stage.work()
        assert len(called) == 1
        assert stage.said() == []
