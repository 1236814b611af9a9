"""What a running job can ask and say about itself: ``jobguard.current()``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol
from uuid import UUID

ReportProgress = Callable[[float | None, dict[str, Any]], bool]

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0
"""Seconds between two tries to take a lock."""


class Claimed(Protocol):
    """The claim of a running job, as far as the job may ask about it. No method raises."""

    def predecessor(self) -> UUID | None:
        """Return the worker whose claim was taken away last."""

    def lock(self, name: str) -> bool:
        """Take a lock for this claim; True if it is held now."""

    def unlock(self, name: str) -> None:
        """Let go of it."""


@dataclass(frozen=True, slots=True)
class CurrentJob:
    """The job that is running here; outside a job, one that says nothing."""

    id: str | None = None
    attempt: int = 0
    _report: ReportProgress | None = field(default=None, repr=False)
    recovered: bool = False
    """An earlier run of this very delivery was begun and did not reach its end."""
    crashes: int = 0
    """How many workers have died while they ran this job."""
    _claim: Claimed | None = field(default=None, repr=False)
    _locks: dict[str, int] = field(default_factory=dict, repr=False, compare=False)

    def __bool__(self) -> bool:
        """Whether there is a job at all."""
        return self.id is not None

    def progress(self, done: float | None = None, **attrs: Any) -> bool:
        """Note how far the job is (0 to 1) and anything else worth knowing; False if nobody heard it."""
        return self._report is not None and self._report(done, attrs)

    @property
    def predecessor(self) -> UUID | None:
        """The id of the worker that died or left while it ran this job before; None: none is known.

        Asks Postgres.
        """
        return None if self._claim is None or not self.recovered else self._claim.predecessor()

    @contextmanager
    def lock(self, name: str, *, wait: float = 0.0) -> Iterator[bool]:
        """Hold a lock that belongs to this run; see jobguard.lock."""
        if self._claim is None:
            yield True
            return
        held = self._locks.get(name, 0)
        if not held and not self._take(self._claim, name, wait):
            yield False
            return
        self._locks[name] = held + 1
        try:
            yield True
        finally:
            self._locks[name] -= 1
            if not self._locks[name]:
                del self._locks[name]
                self._claim.unlock(name)

    @staticmethod
    def _take(claim: Claimed, name: str, wait: float) -> bool:
        until, pause = time.monotonic() + wait, _FIRST_PAUSE
        while not claim.lock(name):
            left = until - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(pause, left))
            pause = min(_LONGEST_PAUSE, 2 * pause)
        return True


_NONE = CurrentJob()
_current: ContextVar[CurrentJob] = ContextVar("jobguard_current_job", default=_NONE)


def current() -> CurrentJob:
    """The guarded job that runs in this context. A no-op outside of one."""
    return _current.get()


@contextmanager
def lock(name: str, *, wait: float = 0.0) -> Iterator[bool]:
    """Hold a lock of this name for the running job, and give whether it is held.

    The lock belongs to the claim of the run: it is free again when the block ends, when the job ends, and
    when the worker dies. Waits ``wait`` seconds for it at most. Names are those of the source (one Redis of
    one library). False also where Postgres cannot be asked. Outside of a guarded job nothing is locked, and
    the answer is True.
    """
    with current().lock(name, wait=wait) as held:
        yield held


@contextmanager
def running(job: CurrentJob) -> Iterator[None]:
    """Let ``current()`` answer with this job inside."""
    before = _current.set(job)
    try:
        yield
    finally:
        _current.reset(before)
