"""The demo's knowledge of a queue library: how to start its workers, and where Redis has its jobs.

The faults and the ledger are the same for all libraries. The differences are in a `Library` of this
folder, and in the code that a user of that library would write, in `jobguard.demo.apps`.
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
    """How many jobs run at once, and in which processes."""

    workers: int  # a worker is the process that beats, and that is killed
    processes: int = 1  # of each worker, that run jobs
    threads: int = 1  # of each such process

    @property
    def at_once(self) -> int:
        """The number of jobs that all workers run at the same time."""
        return self.workers * self.processes * self.threads


class Library(ABC):
    """A queue library, as the demo sees it."""

    name: ClassVar[str]
    title: ClassVar[str]
    jobs_a_second: ClassVar[float]
    """The highest rate of all workers together at which one guarded producer is still faster."""
    overhead_seconds: ClassVar[float]
    """Time that the library itself takes from a worker for each job, about."""
    orphan_signal: ClassVar[signal.Signals] = signal.SIGKILL
    """The signal that ends a worker command with all its children, if the demo is killed."""

    @abstractmethod
    def worker_pool(self, workers: int | None, cores: int) -> WorkerPool:
        """Return so many workers; for None, as many as are usual on so many cores."""

    @abstractmethod
    def commands(self, worker_pool: WorkerPool) -> Sequence[Sequence[str]]:
        """Return the commands that start them, without the name of this Python."""

    @abstractmethod
    def workers_known(self, client: Any) -> int:
        """Count the workers that are registered in Redis."""

    @abstractmethod
    def waiting(self, client: Any) -> int:
        """Count the jobs in the queue."""

    @abstractmethod
    def present(self, client: Any) -> set[str]:
        """Return the ids of all jobs that Redis has: waiting, scheduled, or fetched by a worker."""

    @abstractmethod
    def worker_of(self, mark: Mark) -> int:
        """Return the process that is the worker which ran this, as jobguard sees it."""


def named(name: str) -> Library:
    """Return the library of this name. Raise ModuleNotFoundError if it is not installed."""
    if importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    library: Library = importlib.import_module(f"{__name__}.{name}").LIBRARY
    return library
