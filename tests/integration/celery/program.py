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
from billiard import process as multiprocessing
from celery import Celery, Task, chord, group, signals
from celery.exceptions import Ignore, Reject
from kombu.common import Broadcast
from kombu.entity import Queue

import jobguard

LEDGER = Path(os.environ["LEDGER"])
"""A file that jobguard never touches."""
HURRY = LEDGER.with_suffix(".hurry")
"""When this file exists, slow tasks end."""

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
if os.environ.get("GUARD_AT"):
    receiver: Any = lambda **_: jobguard.guard(app)  # noqa: E731
    getattr(signals, os.environ["GUARD_AT"]).connect(receiver, weak=False)
elif os.environ.get("UNGUARDED") != "1":
    jobguard.guard(app)


F = TypeVar("F", bound=Callable[..., Any])


def task(**options: Any) -> Callable[[F], F]:
    """Return Celery's own decorator, with types for the type checker."""
    decorator: Callable[[F], F] = app.task(**options)
    return decorator


def a_call_of_ok(word: object) -> Any:
    """Return a signature."""
    return app.signature(f"{__name__}.ok", (word,), immutable=True)


def write(word: object) -> None:
    """Write a word into the ledger file, which only a run can do."""
    with LEDGER.open("a") as file:
        file.write(f"{time.time():.3f} {os.getpid()} {word}\n")


class OwnBeforeStart(Task):  # type: ignore[misc]  # Celery has no types
    """A task class with a before_start that does not call Celery's."""

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        """Write that it was called."""
        write("before")


@task()
def ok(word: object = "ok") -> object:
    """Return."""
    write(word)
    return word


@task(base=OwnBeforeStart)
def own(word: object = "own") -> None:
    """Return, after a before_start of its own."""
    write(word)


@task(track_started=True)
def fail(word: object = "fail") -> None:
    """Fail."""
    write(word)
    raise ValueError("as it must")


@task(bind=True, max_retries=3)
def again(self: Any, word: object = "again", times: int = 2, countdown: float = 0) -> None:
    """Be retried so many times."""
    write(word)
    if self.request.retries < times:
        raise self.retry(countdown=countdown)


@task(bind=True, max_retries=3)
def unstored(self: Any, word: object = "unstored", times: int = 0) -> object:
    """Be retried so many times; Redis fails when Celery stores the result of the first run."""
    write(word)
    if self.request.retries == 0:
        _fail_once(self.backend)
    if self.request.retries < times:
        raise self.retry(countdown=0)
    return word


def _fail_once(backend: Any) -> None:
    def fail(*args: object, **options: object) -> None:
        del backend.set  # the method of the class is used again
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
            write(request.args[0])


@task()
def refuse(word: object = "refuse") -> None:
    """Reject with requeue, although the message was acknowledged before the run: Celery drops it."""
    write(word)
    raise Reject("as it must", requeue=True)


@task()
def slow(word: object = "slow", seconds: float = 5.0) -> object:
    """Sleep for so many seconds, or until the test is in a hurry."""
    write(f"{word}-begins")
    until = time.monotonic() + seconds
    while time.monotonic() < until and not HURRY.exists():
        time.sleep(0.02)
    write(word)
    return word


@task(acks_late=True)
def late(word: object = "late", seconds: float = 5.0) -> None:
    """Sleep for so many seconds, and be acknowledged afterwards."""
    slow(word, seconds)


@task()
def busy(word: object = "busy", seconds: float = 5.0) -> None:
    """Compute, and never yield the processor voluntarily."""
    write(f"{word}-begins")
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        sum(range(1000))
    write(word)


@task()
def deaf(word: object = "deaf", seconds: float = 5.0) -> None:
    """Hold the GIL in a C call."""
    write(f"{word}-begins")
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))
    write(word)


@task()
def die(word: object = "die") -> None:
    """Be killed, but only once."""
    write(word)
    _die_once(word)


@task(acks_late=True, reject_on_worker_lost=True)
def die_late(word: object = "die_late") -> None:
    """Be killed once, where Celery would run the task again itself."""
    write(word)
    _die_once(word)


@task()
def die_always(word: object = "die_always") -> None:
    """Be killed at every run."""
    write(word)
    os.kill(os.getpid(), signal.SIGKILL)


@task()
def die_with_the_worker(word: object = "die_with_the_worker") -> None:
    """Kill the main process of this worker, when the other tasks have begun."""
    write(word)
    time.sleep(1)
    in_a_child = multiprocessing.current_process().name != "MainProcess"
    os.kill(os.getppid() if in_a_child else os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _die_once(word: object) -> None:
    if LEDGER.read_text().count(f" {word}\n") < 2:
        os.kill(os.getpid(), signal.SIGKILL)


class Stopped(BaseException):
    """An exception of a user's library that passes every ``except Exception``."""


def _break_off(how: str) -> None:
    if how == "gevent.Timeout":
        from gevent import Timeout  # type: ignore[import-untyped]

        raise Timeout(1)
    if how == "GreenletExit":
        from greenlet import GreenletExit

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
    """Raise a BaseException that is no Exception."""
    write(how)
    _break_off(how)


@task(acks_late=True)
def broken_late(how: str) -> None:
    """Raise it in the first run, and be acknowledged afterwards."""
    write(how)
    if LEDGER.read_text().count(f" {how}\n") < 2:
        _break_off(how)


@task(acks_late=True, reject_on_worker_lost=True)
def broken_requeued(how: str) -> None:
    """Raise it, where Celery queues the message of a dead child again."""
    broken_late(how)


@task()
def leave(word: object = "leave") -> None:
    """Call sys.exit()."""
    write(word)
    sys.exit(3)


@task(time_limit=1)
def too_long(word: object = "too_long") -> None:
    """Be killed at the hard time limit."""
    slow(word, 30)


@task(time_limit=1, acks_late=True)
def too_long_late(word: object = "too_long_late") -> None:
    """Be killed at the hard time limit; if Celery is so configured, be queued again, and then be quick."""
    write(word)
    if LEDGER.read_text().count(f" {word}\n") < 2:
        time.sleep(30)


@task(soft_time_limit=1)
def too_slow(word: object = "too_slow") -> None:
    """Be interrupted by the soft time limit."""
    slow(word, 30)


@task()
def ignore(word: object = "ignore") -> None:
    """Raise Ignore."""
    write(word)
    raise Ignore


@task(acks_late=True)
def reject(word: object = "reject") -> None:
    """Raise Reject."""
    write(word)
    raise Reject("no")


@task(acks_late=True)
def requeue(word: object = "requeue") -> None:
    """Ask to be queued again, five times: more often than a crash budget allows."""
    write(word)
    if LEDGER.read_text().count(f" {word}\n") < 6:
        raise Reject("not yet", requeue=True)


@task(bind=True)
def replaced(self: Any, word: object = "replaced") -> Any:
    """Be replaced by another task."""
    write(word)
    return self.replace(a_call_of_ok(f"{word}-by-another"))


@task()
def collect(results: list[object], word: object = "collect") -> object:
    """Be the body of a chord."""
    write(word)
    return sorted(map(str, results))


@task()
def fan(word: object = "fan", size: int = 3) -> None:
    """Send a chord from inside a task."""
    write(word)
    body = app.signature(f"{__name__}.collect", (f"{word}-all",))
    chord(group(a_call_of_ok(f"{word}-{n}") for n in range(size)), body).delay()
