"""What tests of every room share."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, TypeVar

from jobguard.model import Owed

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    import redis

T = TypeVar("T")

PATIENT = {
    "JOBGUARD_CONNECT_TIMEOUT": "10",
    "JOBGUARD_CALL_TIMEOUT": "10",
    "JOBGUARD_RECORD_TIMEOUT": "20",
}
"""For processes of a test that rehearses no outage of Postgres: a busy machine shall not look like one."""


def newly_owed(token: UUID, *, job_id: str, queue: str, task: str = "") -> Owed:
    """Give a delivery as a look finds it that nobody has claimed, suspected or recovered yet."""
    return Owed(
        token=token,
        job_id=job_id,
        queue=queue,
        task=task,
        age=0.0,
        due_in=0.0,
        expired=False,
        crashes=0,
        recoveries=0,
        claims=0,
        backoff=0.0,
    )


def eventually(
    predicate: Callable[[], T], timeout: float = 10.0, *, message: str | None = None
) -> T:
    """Wait until the predicate holds, and give what it answered.

    An AssertionError of the predicate counts as "not yet", and is the cause of ours.
    """
    deadline = time.monotonic() + timeout
    while True:
        answer: T | None = None
        not_yet: AssertionError | None = None
        try:
            answer = predicate()
        except AssertionError as error:
            not_yet = error
        if answer:
            return answer
        if time.monotonic() >= deadline:
            what = message or getattr(predicate, "__qualname__", repr(predicate))
            last = not_yet if not_yet is not None else repr(answer)
            raise AssertionError(f"not within {timeout:g} s: {what} (last: {last})") from not_yet
        time.sleep(0.01)


def keyspace(redis_client: redis.Redis) -> dict[str, object]:
    """Return everything in a Redis, to be compared."""
    client: Any = redis_client  # whose answers redis-py types as sync or async at once
    readers: dict[str, Callable[[bytes], object]] = {
        "hash": lambda key: dict(client.hgetall(key)),
        "list": lambda key: client.lrange(key, 0, -1),
        "set": lambda key: set(client.smembers(key)),
        "zset": lambda key: dict(client.zrange(key, 0, -1, withscores=True)),
        "string": client.get,
        "stream": client.xrange,
    }
    return {key.decode(): readers[client.type(key).decode()](key) for key in client.scan_iter()}
