"""Operations of the Celery adapter's tests on Redis and on a broker."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import redis

from jobguard.adapters.celery.broker import CeleryBroker
from jobguard.model import Delivery, Observation, Owed, Recorded, Restored
from tests.fakes import adapters
from tests.fakes.adapters import lost, owed

Message = dict[str, Any]


class FakeTracker(adapters.FakeTracker):
    """A tracker that remembers the state that each join was opened with."""

    joins: dict[str, bytes]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.joins = {}

    def open_join(self, join: str, size: int, state: bytes = b"") -> Recorded:
        """Remember the state of a join."""
        self.joins[join] = state
        return super().open_join(join, size, state)


def lists(client: redis.Redis) -> dict[str, list[Message]]:
    """Return every waiting message by list, from the head, without the random delivery tag."""
    found = {}
    any_client: Any = client
    for key in sorted(any_client.scan_iter()):
        if any_client.type(key) == b"list":
            messages = [json.loads(raw) for raw in any_client.lrange(key, 0, -1)]
            for message in messages:
                message["properties"].pop("delivery_tag")
            found[key.decode()] = messages
    return found


def bare(messages: dict[str, list[Message]]) -> dict[str, list[Message]]:
    """Return the same messages as an unguarded app sends them."""
    for message in (one for several in messages.values() for one in several):
        message["headers"].pop("jobguard", None)
    return messages


def observe(broker: CeleryBroker, delivery: Delivery, **known: Any) -> Observation:
    """Observe one delivery."""
    return broker.presence([aged(delivery, **known)])[delivery.token]


def aged(delivery: Delivery, age: float = 0.0, **known: Any) -> Owed:
    """Return a delivery in the form that an inspection needs."""
    return replace(owed(delivery), age=age, **known)


def put_back(broker: CeleryBroker, *deliveries: Delivery, **changes: Any) -> list[Restored]:
    """Restore these deliveries, with enough time."""
    done = broker.restore(
        [lost(delivery, **changes) for delivery in deliveries], deadline=time.time() + 60
    )
    return [done[delivery.token] for delivery in deliveries]


def take(client: redis.Redis, key: str = "celery", *, worker: str = "", tag: str = "") -> str:
    """Take a message as a worker does, guarded or not; return its tag."""
    there: Any = client
    message = json.loads(there.rpop(key))
    if worker:
        message["headers"]["jobguard-worker"] = worker
    tag = tag or message["properties"]["delivery_tag"]
    there.zadd("unacked_index", {tag: time.time()})
    there.hset("unacked", tag, json.dumps([message, "", key]))
    return tag
