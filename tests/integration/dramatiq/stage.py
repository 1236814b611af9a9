"""A small application of Dramatiq, for tests in this process and for worker processes.

Each run writes a word into the ledger, a file that jobguard never touches. A worker command imports
this module; run as a program, it is a worker without the command.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import dramatiq
from dramatiq import Worker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import AsyncIO, GroupCallbacks, default_middleware
from dramatiq.rate_limits.backends import RedisBackend
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend as ResultsInRedis

import jobguard
from jobguard.host import beat_process
from tests.databases import rows
from tests.support import eventually

LEDGER = "STAGE_LEDGER"
QUEUE = "default"
KEYS = f"dramatiq:{QUEUE}"


def a_broker(url: str, **options: Any) -> RedisBroker:
    """Return a broker with all the middleware of Dramatiq."""
    make: Any = RedisBroker
    broker: RedisBroker = make(url=url, middleware=[m() for m in default_middleware], **options)
    barriers: Any = RedisBackend
    results: Any = ResultsInRedis
    keeps: Any = Results
    others: list[Any] = [
        GroupCallbacks(barriers(url=url)),
        keeps(backend=results(url=url)),
        AsyncIO(),
    ]
    for middleware in others:
        broker.add_middleware(middleware)
    return broker


class Stage:
    """A broker, its actors and their ledger."""

    def __init__(self, broker: RedisBroker, ledger: Path) -> None:
        self.broker, self.ledger = broker, ledger
        self.client: Any = broker.client
        declare: Any = dramatiq.actor
        at_once = {"min_backoff": 1, "max_backoff": 1}
        for actor in (
            self.say,
            self.wait,
            self.fail,
            self.flaky,
            self.hold,
            self.resend,
            self.echo,
        ):
            declare(actor, broker=broker, actor_name=actor.__name__, max_retries=0, **at_once)
        declare(self.later, broker=broker, actor_name="later", max_retries=0)
        declare(self.add, broker=broker, actor_name="add", max_retries=0, store_results=True)

    # -- actors ------------------------------------------------------------------------------------

    def note(self, word: object) -> None:
        """Write a word to the ledger."""
        with self.ledger.open("a") as file:
            file.write(f"{word}\n")

    def say(self, word: object, *_: object) -> None:
        """Write the word."""
        self.note(word)

    def add(self, one: int, other: int) -> int:
        """Return a result."""
        self.note("add")
        return one + other

    def echo(self, word: object) -> object:
        """Return the argument."""
        self.note(word)
        return word

    def wait(self, word: object) -> None:
        """Run until the test opens the gate."""
        self.note(f"{word}:begun")
        while not self.gate(word).exists():
            time.sleep(0.01)
        self.note(word)

    def fail(self, word: object) -> None:
        """Fail."""
        self.note(word)
        raise ValueError("fails on purpose")

    def flaky(self, word: object) -> None:
        """Fail the first time."""
        self.note(word)
        if self.said().count(str(word)) == 1:
            raise ValueError("the first time")

    def resend(self, word: object) -> None:
        """Send another message."""
        self.note(f"{word}:resend")
        self.broker.actors["say"].send(word)

    async def later(self, word: object) -> None:
        """Run on the event loop, and send from there."""
        await asyncio.sleep(0)
        self.note(word)
        self.broker.actors["say"].send(f"{word}:sent")

    def hold(self, word: object, seconds: float) -> None:
        """Stay in one C call that blocks all other threads."""
        self.note(f"{word}:begun")
        ctypes.PyDLL(None).usleep(int(seconds * 1e6)) if seconds < 1 else ctypes.PyDLL(None).sleep(
            int(seconds)
        )
        self.note(word)

    # -- the test ----------------------------------------------------------------------------------

    def gate(self, word: object) -> Path:
        """Return the file that lets a waiting job continue."""
        return Path(f"{self.ledger}.{word}")

    def said(self) -> list[str]:
        """Return every word, in order."""
        return self.ledger.read_text().split() if self.ledger.exists() else []

    def actor(self, name: str) -> Any:
        """Return an actor."""
        return self.broker.actors[name]

    def message(self, name: str, *args: object, **options: Any) -> Any:
        """Return a message that is not sent yet."""
        return self.actor(name).message_with_options(args=args, **options)

    def group(self, members: Sequence[Any]) -> Any:
        """Return a group that is not run yet."""
        make: Any = dramatiq.group
        return make(members, broker=self.broker)

    def pipeline(self, steps: Sequence[Any]) -> Any:
        """Return a pipeline that is not run yet."""
        make: Any = dramatiq.pipeline
        return make(steps, broker=self.broker)

    @contextmanager
    def worker(self, **options: Any) -> Iterator[Worker]:
        """Run a worker in this process."""
        worker = Worker(self.broker, worker_timeout=20, **{"worker_threads": 1, **options})
        worker.start()
        try:
            yield worker
        finally:
            worker.stop(timeout=5000)

    def is_idle(self) -> bool:
        """Return True if Redis has nothing but dead letters."""
        return not self.client.exists(KEYS, f"{KEYS}.msgs", f"{KEYS}.DQ", f"{KEYS}.DQ.msgs")

    def work(self, **options: Any) -> None:
        """Run all messages."""
        with self.worker(**options):
            eventually(self.is_idle, 20)


def open_joins(database: str) -> int:
    """Return the number of groups without a continuation: a leader would have it sent again."""
    return len(rows(database, "select from jobguard.joins where closed_at is null"))


@contextmanager
def program(*arguments: str, environ: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run this Python with these arguments, in its own process group."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env=dict(environ),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait(10)


def the_stage() -> Stage:
    """Return the application that the environment describes, guarded."""
    broker = a_broker(os.environ["JOBGUARD_REDIS_URL"])
    if os.environ.get("STAGE_NO_BEAT_PROCESS"):
        without: Any = beat_process.BeatProcess
        without._begin = lambda _: None
    if os.environ.get("STAGE_GUARD", "1") == "1":
        jobguard.guard(broker)
    return Stage(broker, Path(os.environ[LEDGER]))


if __name__ == "__main__":
    Worker(the_stage().broker, worker_timeout=100, worker_threads=int(sys.argv[1])).start()
    while True:
        time.sleep(60)
