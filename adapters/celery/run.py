"""One guarded run of a task, and the single report of its end.

A task that is published inside of a run belongs to that run: its token is derived from the run's
token and from the job's id, so that a repeated run sends the same deliveries. A retry and a
replacement have the id of the job itself: they supersede the run, and the run then has nothing to
report.
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


@dataclass(slots=True)
class _Joining:
    """A chord whose last part may have come."""

    group: str
    body: str | None
    over: bool = False


_current: ContextVar[Run | None] = ContextVar("jobguard_celery_run", default=None)
_joining: ContextVar[_Joining | None] = ContextVar("jobguard_celery_joining", default=None)


class Run:
    """A claim of this process, until its end is reported; only the first report counts."""

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
        """It runs in the worker's own process, which must learn when the run leaves."""
        self._left = left
        self.reported = False
        self.outcome: Outcome | None = None
        """The end of the run, once it is reported; None if another delivery superseded the run."""
        self.storing = False
        """True once all follow-up tasks are sent: Celery is about to store the return value."""
        self.part: Part | None = None
        """The part that its end adds to a chord."""
        self.error: str | None = None
        self._attempt = attempt
        self._successor: UUID | None = None
        self._sent: dict[str, int] = {}
        self._inside: AbstractContextManager[None] | None = None

    # Tasks published inside of the run.

    def next_nth(self, job_id: str) -> int:
        """Return how often this run has sent this id before, and count this time."""
        nth = self._sent.get(job_id, 0)
        self._sent[job_id] = nth + 1
        return nth

    def parent(self) -> Parent:
        """Return the parent that a new delivery of this run's own job supersedes."""
        if self._successor is not None:
            return Parent(self._successor)
        return Parent(self.claim.token, claim=self.claim.number or None, worker=self.session.id)

    def superseded_by(self, token: UUID | None) -> None:
        """Report nothing: the superseding delivery is recorded, or was refused in favour of a newer one."""
        if token is not None:
            self._successor = token
        if not self.reported:
            self.reported = True
            self.session.mark_superseded(self.claim)

    # From the start of the run to its end.

    def enter(self) -> None:
        """Enter the run: this thread, or greenlet, is in the run from here on."""
        _current.set(self)
        self._inside = running_job(self.tracker, self.claim, self.job_id, attempt=self._attempt)
        self._inside.__enter__()

    def leave(self, error: BaseException | None = None) -> None:
        """Leave the run in this thread; ``error``: what the task raised."""
        _current.set(None)
        inside, self._inside = self._inside, None
        if inside is not None:
            with suppress(ValueError):  # it may have been entered in the context of another thread
                inside.__exit__(type(error) if error else None, error, None)

    def finish(self) -> None:
        """Finish the run after its end was reported."""
        left, self._left = self._left, None
        if left is not None:
            left()

    def end(self, outcome: Outcome, error: str | None = None) -> None:
        """Report how the run ended, unless that is reported already."""
        if self.reported:
            return
        self.reported, self.outcome = True, outcome
        self.session.end(
            self.claim,
            outcome,
            job_id=self.job_id,
            queue=self.queue,
            task=self.task,
            error=error or None,
            part=self.part,
        )

    def release(self, *, interrupted: bool = False) -> None:
        """Release the claim: the library puts this same delivery back into its queue; see Session."""
        if not self.reported:
            self.reported = True
            self.session.release(self.claim, interrupted=interrupted)


def current_run() -> Run | None:
    """Return the run of this thread or greenlet."""
    return _current.get()


@contextmanager
def joining(group: str, body: str | None) -> Iterator[None]:
    """Treat the push of this body inside of the block as the end of this chord; None: the first push."""
    before = _joining.set(_Joining(group, body))
    try:
        yield
    finally:
        _joining.reset(before)


def stop_joining() -> str | None:
    """Return the chord that was about to send its body; that body will not be sent."""
    at = _joining.get()
    if at is None or at.over:
        return None
    at.over = True
    return at.group


def closes(job_id: str) -> str | None:
    """Return the chord that this job is the body of, if the library is about to send that body."""
    at = _joining.get()
    if at is None or at.over or at.body not in (None, job_id):
        return None
    at.over = at.body is None
    return at.group
