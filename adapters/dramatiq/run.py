"""One guarded run of a message, and the one report of its end.

A context variable names the current run. Dramatiq copies it to the event loop of its asyncio
actors, so that messages sent there are known as messages of this run too.
"""

from __future__ import annotations

import traceback
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import TYPE_CHECKING
from uuid import UUID

from jobguard.log import log_event
from jobguard.model import Claim, Outcome, Parent, Part, derived_token, token_at

if TYPE_CHECKING:
    from jobguard.adapter import Session, Tracker


class Run:
    """The claim of a worker thread, until its end is reported once."""

    def __init__(
        self,
        tracker: Tracker,
        session: Session,
        claim: Claim,
        *,
        job_id: str,
        queue: str,
        task: str,
        sent_at: float,
        join: str | None = None,
    ):
        self.tracker, self.session = tracker, session
        self.claim = claim
        self.job_id, self.queue, self.task = job_id, queue, task
        self.join = join
        """The group of the message, if something waits for that group."""
        self.after = False
        """True after the actor has returned or failed; from then on Dramatiq itself sends messages."""
        self.error: BaseException | None = None
        self.skipped = False
        self.broken = False
        """True if a continuation of the run could not be sent and Dramatiq suppressed the error."""
        self.superseded = False
        self.spooled = False
        """True if the superseding record waits for PostgreSQL; until it is written the claim stays ours."""
        self.reported = False
        self.current: AbstractContextManager[None] | None = None
        """The context in which jobguard.current() knows the run."""
        self._sent_at = sent_at
        self._sent: dict[str, int] = {}

    @property
    def token(self) -> UUID:
        """The delivery that runs."""
        return self.claim.token

    def derive(self, job_id: str) -> UUID:
        """Return the token of a message that this run sends under that id; a second run gets the same."""
        nth = self._sent.get(job_id, 0)
        self._sent[job_id] = nth + 1
        return derive(self.token, job_id, nth, sent_at=self._sent_at)

    def parent(self) -> Parent:
        """Return the parent for a retry of this run."""
        return Parent(self.token, claim=self.claim.number or None, worker=self.session.id)

    def leave(self) -> None:
        """Mark that this thread no longer runs it."""
        current, self.current = self.current, None
        if current is not None:
            error = self.error
            current.__exit__(type(error) if error else None, error, None)

    def end(self, *, failed: bool) -> None:
        """Report the end, unless it is reported already; ``failed`` means it goes to the dead letters."""
        if self.reported:
            return
        self.reported = True
        self.leave()
        if self.superseded and not self.spooled:
            self.session.mark_superseded(self.claim)
        elif self.broken and not (failed or self.superseded):
            log_event("continuation_lost", job_id=self.job_id)
            self.session.release(self.claim, interrupted=True)
            self.tracker.leave_to_outbox([self.token])
        else:
            outcome = self._outcome(failed)
            self.session.end(
                self.claim,
                outcome,
                job_id=self.job_id,
                queue=self.queue,
                task=self.task,
                error=None if self.superseded else _text(self.error),
                part=Part(self.join) if self.join and outcome is Outcome.COMPLETED else None,
            )
        self.error = None  # the frames of the error use much memory

    def _outcome(self, failed: bool) -> Outcome:
        if self.superseded:
            return Outcome.SUPERSEDED
        if failed or (self.error is not None and not self.skipped):
            return Outcome.FAILED
        return Outcome.CANCELLED if self.skipped else Outcome.COMPLETED


_run: ContextVar[Run | None] = ContextVar("jobguard_dramatiq_run", default=None)


def current_run() -> Run | None:
    """Return the run to which this code belongs."""
    return _run.get()


def set_run(run: Run | None) -> None:
    """Set the run of this thread, or None after its end."""
    _run.set(run)


def derive(parent: UUID, job_id: str, nth: int, *, sent_at: float) -> UUID:
    """Return the token of a message that comes from a delivery.

    The ids of an unguarded producer are random and have no order. Then the token sorts by the time
    at which the message was made, in seconds since the epoch.
    """
    if parent.version == 7:
        return derived_token(parent, job_id, nth)
    return derived_token(token_at(sent_at), f"{parent.hex}\x00{job_id}", nth)


def _text(error: BaseException | None) -> str | None:
    if error is None:
        return None
    return "".join(traceback.format_exception(error))
