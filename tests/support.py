"""Helpers for the tests of every folder."""

from __future__ import annotations

import faulthandler
import multiprocessing
import socket
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any, TypeVar

from jobguard.model import Owed

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.process import BaseProcess
    from uuid import UUID

    import redis

T = TypeVar("T")

SLOWEST = 90.0
"""Seconds after which an expected event counts as missing, even on a slow and busy machine."""

PATIENT = {
    "JOBGUARD_CONNECT_TIMEOUT": "10",
    "JOBGUARD_CALL_TIMEOUT": "10",
    "JOBGUARD_RECORD_TIMEOUT": "20",
}
"""For processes of tests without an outage of Postgres: a busy machine must not look like an outage."""


def newly_owed(token: UUID, *, job_id: str, queue: str, task: str = "") -> Owed:
    """Return an owed delivery that is not yet claimed, suspected or recovered."""
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
    predicate: Callable[[], T], timeout: float = SLOWEST, *, message: str | None = None
) -> T:
    """Wait until the predicate returns a true value, and return that value.

    An AssertionError of the predicate counts as "not yet", and is the cause of the final AssertionError.
    """
    timeout = max(timeout, SLOWEST)  # a smaller one is an estimate for an idle machine
    deadline = time.monotonic() + timeout
    pause = 0.01
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
        time.sleep(pause)
        pause = min(0.05, pause * 1.2)  # what is waited for needs the processor, too


def keyspace(redis_client: redis.Redis) -> dict[str, object]:
    """Return all data of a Redis, for comparison."""
    client: Any = redis_client  # redis-py types its answers as sync and async at once
    readers: dict[str, Callable[[bytes], object]] = {
        "hash": lambda key: dict(client.hgetall(key)),
        "list": lambda key: client.lrange(key, 0, -1),
        "set": lambda key: set(client.smembers(key)),
        "zset": lambda key: dict(client.zrange(key, 0, -1, withscores=True)),
        "string": client.get,
        "stream": client.xrange,
    }
    return {key.decode(): readers[client.type(key).decode()](key) for key in client.scan_iter()}


def ended_fork(work: Callable[[], object]) -> BaseProcess:
    """Run this in a forked child, and return the child when it has ended.

    A child that inherits a lock which a thread of this process held may never begin: then another one is
    forked. A child that hangs writes the stacks of its threads to stderr, and ends with 1.
    """
    context = multiprocessing.get_context("fork")
    begun, begins = context.Pipe(duplex=False)

    def in_child() -> None:
        begins.send(None)
        faulthandler.dump_traceback_later(SLOWEST, exit=True)
        work()

    for _ in range(3):
        child = context.Process(target=in_child)
        child.start()
        if begun.poll(SLOWEST / 3):
            break
        child.kill()
    child.join(2 * SLOWEST)
    return child


def free_port() -> int:
    """Return a port that nothing listens at."""
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
