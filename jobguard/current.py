"""The interface of jobguard for a running job: ``jobguard.current()`` and ``jobguard.lock()``."""

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
"""Seconds between two attempts to take a lock."""


class Claimed(Protocol):
    """The claim of a running job, as far as the job can use it. No method raises."""

    def predecessor(self) -> UUID | None:
        """Return the worker whose claim was voided last."""

    def lock(self, name: str) -> bool:
        """Take a lock for this claim; return True if this claim has the lock now."""

    def unlock(self, name: str) -> None:
        """Release the lock."""


class EffectLedger(Protocol):
    """The effects of a running job. Each method raises StoreUnavailable: no effect without the ledger."""

    def begin_effect(self, name: str, job_id: str | None, *, again: bool) -> tuple[str, str | None]:
        """Begin an effect; return the verdict and the stored result, see jobguard.once."""

    def finish_effect(self, name: str, result: str | None) -> None:
        """Store that the effect is done."""

    def forget_effect(self, name: str) -> None:
        """Delete an effect that was begun and is not done."""

    def seal_result(self, result: str | None) -> str | None:
        """Return a result as it is stored."""

    def unseal_result(self, stored: str | None) -> str | None:
        """Return a result as it was given."""

    def installation_id(self) -> str:
        """Return the identity of the ledger."""

    def effect_values(self, name: str, job_id: str | None) -> dict[str, str]:
        """Return the parameters with which the application's connection begins an effect."""


@dataclass(frozen=True, slots=True)
class CurrentJob:
    """The job that runs in this context; outside of a job, an empty one."""

    id: str | None = None
    attempt: int = 0
    _report: ReportProgress | None = field(default=None, repr=False)
    recovered: bool = False
    """True if an earlier run of the same delivery began and did not end."""
    crashes: int = 0
    """The number of workers that died while they ran this job."""
    attrs: dict[str, Any] = field(default_factory=dict, compare=False)
    """What this run has reported with ``progress``."""
    deadline: float | None = None
    """When the library stops this run, in seconds since the epoch; None: never, or not known."""
    _claim: Claimed | None = field(default=None, repr=False)
    _effects: EffectLedger | None = field(default=None, repr=False)
    _locks: dict[str, int] = field(default_factory=dict, repr=False, compare=False)

    def __bool__(self) -> bool:
        """Return True inside a job."""
        return self.id is not None

    def progress(self, done: float | None = None, **attrs: Any) -> bool:
        """Record the progress of the job (0 to 1) and attributes; return False if it was not recorded."""
        self.attrs.update(attrs)
        return self._report is not None and self._report(done, attrs)

    @property
    def previous_attempts(self) -> int:
        """The number of attempts of this job before this one, as its library counts them."""
        return max(0, self.attempt - 1)

    @property
    def predecessor(self) -> UUID | None:
        """The id of the last worker that died or left while it ran this job; None: none is known.

        Asks Postgres.
        """
        return None if self._claim is None or not self.recovered else self._claim.predecessor()

    @contextmanager
    def lock(self, name: str, *, wait: float = 0.0) -> Iterator[bool]:
        """Take a lock for this run inside the block; see jobguard.lock."""
        if self._claim is None:
            yield True
            return
        depth = self._locks.get(name, 0)
        if not depth and not self._take(self._claim, name, wait):
            yield False
            return
        self._locks[name] = depth + 1
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
    """Return the guarded job that runs in this context. Outside of a job its methods do nothing."""
    return _current.get()


@contextmanager
def lock(name: str, *, wait: float = 0.0) -> Iterator[bool]:
    """Take a lock of this name for the running job; the block gets True if the job has the lock.

    The lock belongs to the claim of the run: it is free again when the block ends, when the job ends, or
    when the worker dies. ``wait``: wait at most this many seconds for the lock. Names are separate for each
    source (one Redis of one library). The block gets False also if Postgres cannot be asked. Outside of a
    guarded job nothing is locked, and the block gets True.
    """
    with current().lock(name, wait=wait) as locked:
        yield locked


@contextmanager
def running(job: CurrentJob) -> Iterator[None]:
    """Make ``current()`` return this job inside."""
    before = _current.set(job)
    try:
        yield
    finally:
        _current.reset(before)
