"""One guarded run of a task, and the one report of how it ended.

What is published from inside a run is the run's own: its token follows from the run's and from the
job's id, so that a run that is started again sends the same again. A retry and a replacement carry
the id of the job itself: they take its place, and then there is nothing left to report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from jobguard.adapter import running_job
from jobguard.model import Claim, Outcome, Parent, Part

if TYPE_CHECKING:
    from jobguard.adapter import Session, Tracker

LONGEST_ERROR = 5_000


@dataclass(slots=True)
class _Joining:
    """A chord whose last part may have come."""

    group: str
    body: str | None
    over: bool = False


_current: ContextVar[Run | None] = ContextVar("jobguard_celery_run", default=None)
_joining: ContextVar[_Joining | None] = ContextVar("jobguard_celery_joining", default=None)


class Run:
    """A claim that this process holds, until its end is told: once, by whoever is first."""

    def __init__(
        self,
        tracker: Tracker,
        session: Session,
        claim: Claim,
        *,
        job_id: str,
        queue: str,
        task: str,
        attempt: int,
        left: Callable[[], None] | None = None,
    ) -> None:
        self.tracker, self.session, self.claim = tracker, session, claim
        self.job_id, self.queue, self.task = job_id, queue, task
        self.in_worker = left is not None
        """It runs in the worker's own process, which wants to know when it has left it."""
        self._left = left
        self.reported = False
        self.outcome: Outcome | None = None
        """How it ended, once that is told; None: something else has taken its place."""
        self.storing = False
        """All that comes after the function is sent: Celery is about to store what it returned."""
        self.part: Part | None = None
        """What its end is to a chord."""
        self.error: str | None = None
        self._attempt = attempt
        self._successor: UUID | None = None
        self._sent: dict[str, int] = {}
        self._inside: AbstractContextManager[None] | None = None

    # What is published from inside.

    def next_nth(self, job_id: str) -> int:
        """Return how often this run has sent this id before, and count this time."""
        nth = self._sent.get(job_id, 0)
        self._sent[job_id] = nth + 1
        return nth

    def parent(self) -> Parent:
        """Return what a delivery of this run's own job takes the place of."""
        if self._successor is not None:
            return Parent(self._successor)
        return Parent(self.claim.token, claim=self.claim.number or None, worker=self.session.id)

    def superseded_by(self, token: UUID | None) -> None:
        """Report nothing: what takes the place of this run is recorded, or was refused for a newer one."""
        if token is not None:
            self._successor = token
        if not self.reported:
            self.reported = True
            self.session.mark_superseded(self.claim)

    # From its start to its end.

    def enter(self) -> None:
        """From here on this thread, or greenlet, is in this run."""
        _current.set(self)
        self._inside = running_job(self.tracker, self.claim, self.job_id, attempt=self._attempt)
        self._inside.__enter__()

    def leave(self) -> None:
        """It is over here."""
        _current.set(None)
        inside, self._inside = self._inside, None
        if inside is not None:
            with suppress(ValueError):  # it may have been entered in the context of another thread
                inside.__exit__(None, None, None)

    def finish(self) -> None:
        """It is over, and told."""
        left, self._left = self._left, None
        if left is not None:
            left()

    def end(self, outcome: Outcome, error: str | None = None) -> None:
        """Report how it ended, unless that is told already."""
        if self.reported:
            return
        self.reported, self.outcome = True, outcome
        self.session.end(
            self.claim,
            outcome,
            job_id=self.job_id,
            queue=self.queue,
            task=self.task,
            error=error[-LONGEST_ERROR:] if error else None,
            part=self.part,
        )

    def hand_back(self) -> None:
        """The library puts this very delivery back into its queue."""
        if not self.reported:
            self.reported = True
            self.session.release(self.claim)


def current_run() -> Run | None:
    """Return the run that this thread, or greenlet, is in."""
    return _current.get()


@contextmanager
def joining(group: str, body: str | None) -> Iterator[None]:
    """Let what is sent inside under the body's id go on from this chord; None: what is sent first."""
    before = _joining.set(_Joining(group, body))
    try:
        yield
    finally:
        _joining.reset(before)


def no_longer_joining() -> str | None:
    """Return the chord that was about to go on, which it will not."""
    at = _joining.get()
    if at is None or at.over:
        return None
    at.over = True
    return at.group


def closes(job_id: str) -> str | None:
    """Return the chord of which this job is the body, if the library is just about to send that."""
    at = _joining.get()
    if at is None or at.over or at.body not in (None, job_id):
        return None
    at.over = at.body is None
    return at.group
