"""What a running job can know and say of itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

Say = Callable[[float | None, dict[str, Any]], bool]


@dataclass(frozen=True, slots=True)
class CurrentJob:
    """The job that is running here; outside a job, one that says nothing."""

    id: str | None = None
    attempt: int = 0
    _say: Say | None = field(default=None, repr=False)

    def __bool__(self) -> bool:
        """Whether there is a job at all."""
        return self.id is not None

    def progress(self, done: float | None = None, **attrs: Any) -> bool:
        """Note how far the job is (0 to 1) and anything else worth knowing; False if nobody heard it."""
        return self._say is not None and self._say(done, attrs)


_NONE = CurrentJob()
_current: ContextVar[CurrentJob] = ContextVar("jobguard_current_job", default=_NONE)


def current() -> CurrentJob:
    """The guarded job that runs in this context. A no-op outside of one."""
    return _current.get()


@contextmanager
def running(job: CurrentJob) -> Iterator[None]:
    """Let ``current()`` answer with this job inside."""
    before = _current.set(job)
    try:
        yield
    finally:
        _current.reset(before)
