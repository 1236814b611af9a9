"""The jobs that the tests run."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import time
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry as Retrying
from rq import Retry
from rq.job import Job, get_current_job

from jobguard.adapters.rq.broker import RQBroker
from jobguard.model import Restorable


def say(path: str, word: str = "ran") -> str:
    """Write a line, which proves that the job ran."""
    with Path(path).open("a") as ledger:
        ledger.write(f"{word}\n")
    return word


def add(left: int, right: int = 0) -> int:
    """Return the sum."""
    return left + right


def fail(path: str | None = None) -> None:
    """Raise an error."""
    if path:
        say(path)
    raise ValueError("as it must")


def ask_again(path: str, times: int) -> Any:
    """Return a Retry until the job has run this often."""
    say(path)
    return Retry(max=times) if len(Path(path).read_text().splitlines()) <= times else "done"


def die(path: str | None = None) -> None:
    """Kill the process as the kernel does."""
    if path:
        say(path)
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(path: str) -> None:
    """Kill the worker too, in the first run."""
    deaths = Path(f"{path}.deaths")
    if not deaths.exists():
        deaths.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    say(path)


def call_back(job: Any, *_: Any) -> None:
    """Write a line: a callback of any kind, for a job whose first argument is the ledger."""
    say(job.args[0], "called")


class Backwards:
    """A serializer with a format that no other program reads."""

    @staticmethod
    def dumps(value: Any) -> bytes:
        """Return the pickle with its bytes in reverse order."""
        return pickle.dumps(value)[::-1]

    @staticmethod
    def loads(raw: bytes) -> Any:
        """Load a reversed pickle."""
        return pickle.loads(raw[::-1])


def kill_parent(path: str) -> None:
    """Kill the worker, and continue."""
    parent = os.getppid()
    os.kill(parent, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and os.getppid() == parent:
        time.sleep(0.01)
    say(path)


RESTORED: list[Any] = []
"""The delivery that the reconciler would restore, and its source."""


def flush(path: str) -> None:
    """Delete all data, as a broken Redis does, and restore the delivery in ``RESTORED`` if it is set."""
    current = get_current_job()
    assert current is not None
    current.connection.flushdb()
    if RESTORED:
        delivery, source = RESTORED
        lost = Restorable(
            token=delivery.token,
            job_id=delivery.job_id,
            queue=delivery.queue,
            envelope=delivery.envelope,
            due_at=delivery.due_at,
            expires_at=delivery.expires_at,
        )
        RQBroker(source, current.connection).restore([lost], deadline=time.time() + 60)
    say(path)


def return_retry(path: str) -> Any:
    """Always return a Retry."""
    say(path)
    return Retry(max=1)


def fail_at_length() -> None:
    """Raise an error with a text of one megabyte."""
    raise ValueError("\x00é" * 500_000 + "the end")


def break_redis(path: str) -> None:
    """Return without an error, in a worker whose Redis is gone."""
    current = get_current_job()
    assert current is not None
    say(path)
    gone = redis.Redis(port=1, retry=Retrying(NoBackoff(), 0))
    current.connection.connection_pool = gone.connection_pool


def sleep(seconds: float) -> None:
    """Sleep for this time."""
    time.sleep(seconds)


def leave(code: int) -> None:
    """Exit the process without a report."""
    os._exit(code)


def note_failure(job: Any, *_: Any) -> None:
    """Write a line to the path in the job's meta: a failure callback."""
    say(job.meta["ledger"], "failed")


def say_meta(path: str) -> None:
    """Write the job's meta to the ledger."""
    current = get_current_job()
    assert current is not None
    say(path, current.meta["word"])


def on_success(job: Any, connection: Any, result: Any) -> None:
    """Write a line: the success callback."""
    say(job.args[0], "succeeded")


def on_failure(job: Any, connection: Any, *_: Any) -> None:
    """Write a line: the failure callback."""
    say(job.args[0], "failed")


def broken(*_: Any) -> None:
    """Raise an error: a callback that fails."""
    raise RuntimeError("the callback fails")


def too_long(path: str) -> None:
    """Run for longer than a second."""
    say(path)
    time.sleep(30)


class Reversed:
    """A serializer of the application."""

    @staticmethod
    def dumps(value: Any) -> bytes:
        """Return the pickle, reversed."""
        return pickle.dumps(value)[::-1]

    @staticmethod
    def loads(value: bytes) -> Any:
        """Load a reversed pickle."""
        return pickle.loads(value[::-1])


def ask_redis() -> None:
    """Send a command to a Redis that does not exist."""
    redis.Redis(port=1, retry=Retrying(NoBackoff(), 0)).ping()


def say_and_wait(path: str) -> None:
    """Write a line, and return when a second file exists."""
    say(path)
    go_on = Path(path).with_suffix(".go")
    deadline = time.monotonic() + 30
    while not go_on.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def raise_it(path: str, name: str) -> None:
    """Raise the named error; some of these classes are not subclasses of Exception."""
    say(path)
    kinds = {"SystemExit": SystemExit, "KeyboardInterrupt": KeyboardInterrupt}
    kinds["CancelledError"] = asyncio.CancelledError
    if name == "unwritable":
        raise ValueError("\ud800")  # no traceback with it can be encoded
    raise kinds.get(name, ValueError)(name)


def die_at_once(path: str, code: int | None = None) -> None:
    """End the process by a signal or with an exit code."""
    say(path)
    if code is None:
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        os._exit(code)


def return_unwritable(path: str) -> Any:
    """Return a value that no serializer accepts."""
    say(path)
    return lambda: None


def dying(*_: Any) -> None:
    """Kill the process: a callback that is killed."""
    os.kill(os.getpid(), signal.SIGKILL)


def handler_that_raises(*_: Any) -> None:
    """Raise an error: an exception handler that fails."""
    raise RuntimeError("the handler fails")


def run_through_a_loss(path: str) -> None:
    """Delete all data, restore this job as running, and wait until RQ's registries show the run again."""
    current = get_current_job()
    assert current is not None
    client, job_id = current.connection, current.id
    client.flushdb()
    delivery, source = RESTORED
    shown = Restorable(
        token=delivery.token,
        job_id=delivery.job_id,
        queue=delivery.queue,
        envelope=delivery.envelope,
        due_at=None,
        expires_at=None,
        running=True,
    )
    RQBroker(source, client).restore([shown], deadline=time.time() + 60)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        again = Job.fetch(job_id, connection=client)
        entries = again.started_job_registry.get_job_ids(cleanup=False)
        if again.worker_name and again.get_executions() and entries == [job_id]:
            say(path)
            return
        time.sleep(0.05)


def save_progress(path: str) -> None:
    """Save the progress of the job in its own meta."""
    current = get_current_job()
    assert current is not None
    current.meta["progress"] = 0.5
    current.save_meta()  # type: ignore[no-untyped-call]
    current.save()
    say(path)
