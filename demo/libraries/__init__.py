"""What the demo must know of a queue library: how its workers are run, and where Redis has its jobs.

One storm passes over all of them, and one ledger is counted. What differs is a `Library` in this
folder, and beside it what a user of that library would write, in `jobguard.demo.apps`.
"""

from __future__ import annotations

import importlib
import importlib.util
import signal
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jobguard.demo.ledger import Mark

NAMES = ("celery", "dramatiq", "rq")


@dataclass(frozen=True, slots=True)
class WorkerPool:
    """How many jobs are run at once, and by whom."""

    workers: int  # a worker is what beats, and what is killed
    processes: int = 1  # of each worker, that run jobs
    threads: int = 1  # of each such process

    @property
    def at_once(self) -> int:
        """How many jobs all of them run at the same time."""
        return self.workers * self.processes * self.threads


class Library(ABC):
    """A queue library, as the demo sees it."""

    name: ClassVar[str]
    title: ClassVar[str]
    jobs_a_second: ClassVar[float]
    """What all workers together may do at most, for one guarded producer to be faster."""
    overhead_seconds: ClassVar[float]
    """What the library itself takes of a worker's time for each job, about."""
    orphan_signal: ClassVar[signal.Signals] = signal.SIGKILL
    """What has a worker command end with all its children, should the demo be killed."""

    @abstractmethod
    def worker_pool(self, workers: int | None, cores: int) -> WorkerPool:
        """Give so many workers; None: as many as are usual on so many cores."""

    @abstractmethod
    def commands(self, worker_pool: WorkerPool) -> Sequence[Sequence[str]]:
        """Give what one types to start them, without the name of this Python."""

    @abstractmethod
    def workers_known(self, client: Any) -> int:
        """Count the workers that have made themselves known in Redis."""

    @abstractmethod
    def waiting(self, client: Any) -> int:
        """Count the jobs that stand in the queue."""

    @abstractmethod
    def present(self, client: Any) -> set[str]:
        """Give the ids of all jobs that Redis has: waiting, for later, or in a worker's hands."""

    @abstractmethod
    def worker_of(self, mark: Mark) -> int:
        """Give the process that is the worker which ran this, as jobguard sees it."""


def named(name: str) -> Library:
    """Give what is known of a library. Raises ModuleNotFoundError if it is not installed."""
    if importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    library: Library = importlib.import_module(f"{__name__}.{name}").LIBRARY
    return library
