"""What the suite must be able to do with a queue library. An adapter's tests subclass this."""

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
    from collections.abc import Mapping

    from jobguard.adapter import Adapter

QUEUE = "mail"
OTHER = "other"


class Library(ABC):
    """A queue library on an empty Redis; the tasks are those of tests.conformance.tasks, by name.

    Every task is given the ledger, a file that jobguard never touches, as its first argument.
    """

    adapter: ClassVar[Adapter]
    one_body_per_id: ClassVar[bool]
    """Whether Redis keeps one body of a job id, so that a newer life takes an older one's place."""
    delayed_jobs_are_moved: ClassVar[bool] = True
    """Whether a delayed job waits elsewhere, and is pushed to its queue when it is due."""
    shows_runs: ClassVar[bool] = True
    """Whether Redis shows that a job runs."""
    tells_again_how_it_ended: ClassVar[bool] = True
    """Whether Redis can be told again how a job ended, after it has forgotten that."""
    remembers: ClassVar[Mapping[str, Presence]] = {
        "say": Presence.FINISHED,
        "fail": Presence.FAILED,
    }
    """What a look sees of a task that has ended; ABSENT: the library keeps nothing of it."""

    def __init__(self, redis_url: str, ledger: Path) -> None:
        self.redis_url, self.ledger = redis_url, ledger
        self.client = redis.Redis.from_url(redis_url)

    # -- what is guarded ---------------------------------------------------------------------------

    @abstractmethod
    def target(self, queue: str | None = None) -> object:
        """Return what guard() takes: this queue, or all there are."""

    @abstractmethod
    def doubles(self) -> Mapping[str, object]:
        """Return the targets that must be inert: test doubles, eager modes."""

    @abstractmethod
    def bare(self) -> AbstractContextManager[None]:
        """Have the library without any hook, whoever put one on."""

    @abstractmethod
    def hooks(self) -> object:
        """Return whatever of the library an adapter may replace, to be compared."""

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
        """Send a job as an application does, retried if it fails; return its id."""

    @abstractmethod
    def cancel(self, job_id: str) -> None:
        """Cancel a job in the library's own way."""

    def drop_push(self) -> None:
        """Begin a push, and never make it."""
        pytest.skip("the library has no way to begin a push and not to make it")

    @abstractmethod
    def work(self, queue: str = QUEUE) -> None:
        """Run what waits on a guarded worker in this process, and return when nothing does."""

    @abstractmethod
    def move_delayed(self) -> None:
        """Have the library move every delayed job to its queue, as if it were due."""

    @abstractmethod
    def start_worker(self, environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start a guarded worker as a process of its own; what a job does to it, it does to all of it."""

    def start_crowded_worker(self, environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """The same, with several jobs at once in its process, where the library can do that."""
        return self.start_worker(environ)

    def start_scheduling_worker(self, environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """The same, by a worker that sees to what is delayed."""
        return self.start_worker(environ)

    @abstractmethod
    def delayed_copies(self) -> int:
        """Return how many delayed jobs a worker holds, as far as Redis shows it, or waits for."""

    # -- Redis -------------------------------------------------------------------------------------

    @abstractmethod
    def waiting(self, queue: str = QUEUE) -> list[str]:
        """Return the ids that wait to be run, in their order, and what was taken and left lying."""

    @abstractmethod
    def body(self, job_id: str) -> object:
        """Return what Redis holds of a job; None: nothing."""

    @abstractmethod
    def token(self, job_id: str) -> UUID | None:
        """Return the token that Redis holds of a job; None: nothing of ours is in it."""

    @abstractmethod
    def forget(self, job_id: str) -> None:
        """Lose this one job of Redis, wherever it stands."""

    @abstractmethod
    def is_a_jobs(self, key: str) -> bool:
        """Whether a key holds jobs that are owed: no result, no worker, no lock."""

    def jobs(self) -> dict[str, Any]:
        """Return every key that holds jobs that are owed, with its value."""
        return {key: value for key, value in keyspace(self.client).items() if self.is_a_jobs(key)}

    # -- the ledger --------------------------------------------------------------------------------

    def said(self) -> list[str]:
        """Return what the jobs have said, in order."""
        return self.ledger.read_text().split() if self.ledger.exists() else []
