"""The application of the tests with real workers: every way in which a task can end."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import redis
from celery import Celery, Task, chord, group
from celery.exceptions import Ignore, Reject
from kombu.common import Broadcast
from kombu.entity import Queue

import jobguard

LEDGER = Path(os.environ["LEDGER"])
"""A file that jobguard never touches."""

app: Any = Celery("program", broker=os.environ["JOBGUARD_REDIS_URL"])
app.conf.update(
    {
        "result_backend": os.environ["JOBGUARD_REDIS_URL"],
        "broker_connection_retry_on_startup": True,
        "broker_transport_options": json.loads(os.environ.get("TRANSPORT", "{}")),
        "worker_hijack_root_logger": False,
    }
    | json.loads(os.environ.get("CONF", "{}"))
)
if os.environ.get("BROADCAST"):
    app.conf.task_queues = (Queue("celery"), Broadcast("everyone"))
if os.environ.get("UNGUARDED") != "1":
    jobguard.guard(app)


F = TypeVar("F", bound=Callable[..., Any])


def task(**options: Any) -> Callable[[F], F]:
    """Celery's own decorator, for a checker of types."""
    decorator: Callable[[F], F] = app.task(**options)
    return decorator


def a_call_of_ok(word: object) -> Any:
    """Return a signature."""
    return app.signature(f"{__name__}.ok", (word,), immutable=True)


def say(word: object) -> None:
    """Leave a word that only a run can leave."""
    with LEDGER.open("a") as file:
        file.write(f"{time.time():.3f} {os.getpid()} {word}\n")


class HasItsOwnSay(Task):  # type: ignore[misc]  # Celery has no types
    """A task class with a before_start that does not call Celery's."""

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        """Say so."""
        say("before")


@task()
def ok(word: object = "ok") -> object:
    """Return."""
    say(word)
    return word


@task(base=HasItsOwnSay)
def own(word: object = "own") -> None:
    """Return, after a before_start of its own."""
    say(word)


@task(track_started=True)
def fail(word: object = "fail") -> None:
    """Fail."""
    say(word)
    raise ValueError("as it must")


@task(bind=True, max_retries=3)
def again(self: Any, word: object = "again", times: int = 2, countdown: float = 0) -> None:
    """Be retried so many times."""
    say(word)
    if self.request.retries < times:
        raise self.retry(countdown=countdown)


@task(bind=True, max_retries=3)
def unstored(self: Any, word: object = "unstored", times: int = 0) -> object:
    """Be retried so many times; Redis fails when Celery stores what became of the first run."""
    say(word)
    if self.request.retries == 0:
        _fail_once(self.backend)
    if self.request.retries < times:
        raise self.retry(countdown=0)
    return word


def _fail_once(backend: Any) -> None:
    def fail(*args: object, **options: object) -> None:
        del backend.set  # what its class has is there again
        raise redis.ConnectionError("as it must")

    backend.set = fail


try:
    from celery_batches import Batches
except ImportError:
    Batches = None


if Batches is not None:

    @task(base=Batches, flush_every=3, flush_interval=0.5)
    def batch(requests: list[Any]) -> None:
        """Run several calls at once, as celery-batches does."""
        for request in requests:
            say(request.args[0])


@task()
def refuse(word: object = "refuse") -> None:
    """Have it put back, though its message was acknowledged before it began: Celery drops it."""
    say(word)
    raise Reject("as it must", requeue=True)


@task()
def slow(word: object = "slow", seconds: float = 5.0) -> object:
    """Take its time."""
    say(f"{word}-begins")
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.02)
    say(word)
    return word


@task(acks_late=True)
def late(word: object = "late", seconds: float = 5.0) -> None:
    """Take its time, and be acknowledged after it."""
    slow(word, seconds)


@task()
def busy(word: object = "busy", seconds: float = 5.0) -> None:
    """Compute, and give nobody else a turn that does not take it."""
    say(f"{word}-begins")
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        sum(range(1000))
    say(word)


@task()
def deaf(word: object = "deaf", seconds: float = 5.0) -> None:
    """Hold the GIL in a C call."""
    say(f"{word}-begins")
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))
    say(word)


@task()
def die(word: object = "die") -> None:
    """Be killed, but once only."""
    say(word)
    _die_once(word)


@task(acks_late=True, reject_on_worker_lost=True)
def die_late(word: object = "die_late") -> None:
    """The same, where Celery would run it again by itself."""
    say(word)
    _die_once(word)


@task()
def die_always(word: object = "die_always") -> None:
    """Be killed whenever it runs."""
    say(word)
    os.kill(os.getpid(), signal.SIGKILL)


def _die_once(word: object) -> None:
    if LEDGER.read_text().count(f" {word}\n") < 2:
        os.kill(os.getpid(), signal.SIGKILL)


class Stopped(BaseException):
    """What a library of the user's throws past every ``except Exception``."""


def _break_off(how: str) -> None:
    if how == "gevent.Timeout":
        from gevent import Timeout  # type: ignore[import-untyped]

        raise Timeout(1)
    if how == "GreenletExit":
        from greenlet import GreenletExit  # type: ignore[import-untyped]

        raise GreenletExit
    kinds: dict[str, type[BaseException]] = {
        "CancelledError": asyncio.CancelledError,
        "GeneratorExit": GeneratorExit,
        "KeyboardInterrupt": KeyboardInterrupt,
        "MemoryError": MemoryError,
        "SystemExit": SystemExit,
        "Stopped": Stopped,
    }
    raise kinds[how]


@task()
def broken(how: str) -> None:
    """Raise what is no Exception."""
    say(how)
    _break_off(how)


@task(acks_late=True)
def broken_late(how: str) -> None:
    """Raise it in the first run, and be acknowledged after it."""
    say(how)
    if LEDGER.read_text().count(f" {how}\n") < 2:
        _break_off(how)


@task(acks_late=True, reject_on_worker_lost=True)
def broken_requeued(how: str) -> None:
    """The same, where Celery queues again what its child took along."""
    broken_late(how)


@task()
def leave(word: object = "leave") -> None:
    """Call sys.exit()."""
    say(word)
    sys.exit(3)


@task(time_limit=1)
def too_long(word: object = "too_long") -> None:
    """Be killed for its hard time limit."""
    slow(word, 30)


@task(time_limit=1, acks_late=True)
def too_long_late(word: object = "too_long_late") -> None:
    """The same; where Celery is told so, it is queued again, and the second time it is quick."""
    say(word)
    if LEDGER.read_text().count(f" {word}\n") < 2:
        time.sleep(30)


@task(soft_time_limit=1)
def too_slow(word: object = "too_slow") -> None:
    """Be interrupted by its soft time limit."""
    slow(word, 30)


@task()
def ignore(word: object = "ignore") -> None:
    """Raise Ignore."""
    say(word)
    raise Ignore


@task(acks_late=True)
def reject(word: object = "reject") -> None:
    """Raise Reject."""
    say(word)
    raise Reject("no")


@task(acks_late=True)
def requeue(word: object = "requeue") -> None:
    """Ask to be queued again, five times: more often than a crash budget allows."""
    say(word)
    if LEDGER.read_text().count(f" {word}\n") < 6:
        raise Reject("not yet", requeue=True)


@task(bind=True)
def replaced(self: Any, word: object = "replaced") -> Any:
    """Be replaced by another task."""
    say(word)
    return self.replace(a_call_of_ok(f"{word}-by-another"))


@task()
def collect(results: list[object], word: object = "collect") -> object:
    """Be the body of a chord."""
    say(word)
    return sorted(map(str, results))


@task()
def fan(word: object = "fan", size: int = 3) -> None:
    """Send a chord from inside a task."""
    say(word)
    body = app.signature(f"{__name__}.collect", (f"{word}-all",))
    chord(group(a_call_of_ok(f"{word}-{n}") for n in range(size)), body).delay()
