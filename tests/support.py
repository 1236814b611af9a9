"""Helpers for the tests of every folder."""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import time
import traceback
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from jobguard.model import Owed

if TYPE_CHECKING:
    from collections.abc import Callable
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


class EndedFork(NamedTuple):
    """A child that has ended."""

    pid: int
    exitcode: int
    """Minus the number of the signal that ended it, if it was one."""


def ended_fork(work: Callable[[], object]) -> EndedFork:
    """Run this in a forked child, and return when it has ended.

    multiprocessing does not fork it: that runs functions of other libraries in the child first, and one of
    kombu waits for pools of connections that threads of this process may use. A child that hangs writes
    the stacks of its threads to stderr, and ends with 1.
    """
    pid = os.fork()
    if not pid:
        try:
            faulthandler.dump_traceback_later(SLOWEST, exit=True)
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    deadline = time.monotonic() + 2 * SLOWEST
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise AssertionError("a forked child did not end")
        time.sleep(0.01)
    return EndedFork(pid, os.waitstatus_to_exitcode(ended[1]))


def free_port() -> int:
    """Return a port that nothing listens at."""
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
