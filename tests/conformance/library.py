"""The operations of a queue library that the suite needs. The tests of an adapter subclass this."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from uuid import UUID

import pytest
import redis

from jobguard.model import Presence
from tests.support import keyspace

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Mapping

    from jobguard.adapter import Adapter
    from jobguard.guard import JobGuard
    from jobguard.job_keys import Sent

QUEUE = "mail"
OTHER = "other"


class Library(ABC):
    """A queue library on an empty Redis, with the tasks of tests.conformance.tasks by name.

    The first argument of every task is the ledger, a file that jobguard never touches.
    """

    adapter: ClassVar[Adapter]
    one_body_per_id: ClassVar[bool]
    """True if Redis keeps one body of a job id, so that a newer delivery replaces an older one."""
    delayed_jobs_are_moved: ClassVar[bool] = True
    """True if a delayed job waits elsewhere, and is pushed to its queue when it is due."""
    shows_runs: ClassVar[bool] = True
    """True if Redis shows that a job runs."""
    reports_end_again: ClassVar[bool] = True
    """True if the end of a job can be written to Redis again after Redis forgot it."""
    remembers: ClassVar[Mapping[str, Presence]] = {
        "say": Presence.FINISHED,
        "fail": Presence.FAILED,
    }
    """The presence of a task that has ended; ABSENT if the library keeps nothing of it."""

    def __init__(self, redis_url: str, ledger: Path) -> None:
        self.redis_url, self.ledger = redis_url, ledger
        self.client = redis.Redis.from_url(redis_url)

    def close(self) -> None:
        """Close the connections of the test."""
        self.client.close()

    # -- what is guarded ---------------------------------------------------------------------------

    @abstractmethod
    def target(self, queue: str | None = None) -> object:
        """Return the target for guard(): this queue, or all queues."""

    @abstractmethod
    def doubles(self) -> Mapping[str, object]:
        """Return the targets that must be inert: test doubles, eager modes."""

    @abstractmethod
    def bare(self) -> AbstractContextManager[None]:
        """Remove every hook from the library inside the block."""

    @abstractmethod
    def hooks(self) -> object:
        """Return all parts of the library that an adapter may replace, to be compared."""

    # -- the host's program ------------------------------------------------------------------------

    @abstractmethod
    def send(
        self,
        task: str = "say",
        *words: object,
        queue: str = QUEUE,
        job_id: str | None = None,
        delay: float | None = None,
        retries: int = 0,
        retry_delay: float = 0.0,
        at_front: bool = False,
    ) -> str:
        """Send a job as an application does, with retries if it fails; return its id."""

    @abstractmethod
    def cancel(self, job_id: str) -> None:
        """Cancel a job with the library's own call."""

    def drop_push(self) -> None:
        """Begin a push, and do not complete it."""
        pytest.skip("the library cannot begin a push without completing it")

    @abstractmethod
    def send_with_read(self) -> None:
        """Send a job whose push reads Redis."""

    @abstractmethod
    def task(self) -> object:
        """Return the task ``say`` as JobGuard.send takes it."""

    @abstractmethod
    def send_with_options(self, options: Mapping[str, object]) -> None:
        """Send the task ``say`` by the library's own call, with options of jobguard."""

    def keyed(self, guard: JobGuard) -> Callable[..., Sent]:
        """Return a function that sends the task ``say`` with a word and a key."""

        def send(word: str, **options: Any) -> Sent:
            return guard.send(self.task(), str(self.ledger), word, queue=QUEUE, **options)

        return send

    @abstractmethod
    def work(self, queue: str = QUEUE) -> None:
        """Run all waiting jobs on a guarded worker in this process, and return when none is left."""

    @abstractmethod
    def move_delayed(self) -> None:
        """Let the library move every delayed job to its queue, as if it were due."""

    @abstractmethod
    def start_worker(self, environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start a guarded worker process; a job that kills its process kills the whole worker."""

    def start_crowded_worker(self, environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start a worker process that runs several jobs at once, if the library can do that."""
        return self.start_worker(environ)

    def start_scheduling_worker(self, environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start a worker process that also moves delayed jobs."""
        return self.start_worker(environ)

    @abstractmethod
    def delayed_copies(self) -> int:
        """Return the number of delayed jobs that a worker has or waits for, as far as Redis shows it."""

    # -- Redis -------------------------------------------------------------------------------------

    @abstractmethod
    def waiting(self, queue: str = QUEUE) -> list[str]:
        """Return the ids that wait, in their order, after those that were fetched and not started."""

    @abstractmethod
    def body(self, job_id: str) -> object:
        """Return the data of a job in Redis; None if there is none."""

    @abstractmethod
    def token(self, job_id: str) -> UUID | None:
        """Return the token of a job in Redis; None if it has none."""

    @abstractmethod
    def forget(self, job_id: str) -> None:
        """Delete this one job from Redis, wherever it is."""

    @abstractmethod
    def is_a_jobs(self, key: str) -> bool:
        """Return True if a key contains owed jobs: no result, no worker, no lock."""

    def jobs(self) -> dict[str, Any]:
        """Return every key that contains owed jobs, with its value."""
        return {key: value for key, value in keyspace(self.client).items() if self.is_a_jobs(key)}

    # -- the ledger --------------------------------------------------------------------------------

    def said(self) -> list[str]:
        """Return the words that the jobs have written, in order."""
        return self.ledger.read_text().split() if self.ledger.exists() else []
