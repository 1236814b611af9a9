"""One guarded run of a message, and the one report of how it ended.

It is known by a context variable, which Dramatiq carries along to the event loop of its asyncio
actors: what a run sends is known as its own there, too.
"""

from __future__ import annotations

import logging
import traceback
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import TYPE_CHECKING
from uuid import UUID

from jobguard.model import Claim, Outcome, Parent, Part, derived_token, token_at

if TYPE_CHECKING:
    from jobguard.adapter import Session, Tracker

log = logging.getLogger("jobguard")

LONGEST_ERROR = 5_000
"""Characters; what the ledger keeps of an error."""


class Run:
    """A claim that a worker thread holds, until its end is told, once."""

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
        """The group that it is a member of, and that something waits for."""
        self.after = False
        """The actor has returned or failed; what is sent now is Dramatiq's own doing."""
        self.error: BaseException | None = None
        self.skipped = False
        self.broken = False
        """Something that goes on from it could not be sent, and Dramatiq does not mind."""
        self.superseded = False
        self.spooled = False
        """What supersedes it waits for Postgres: until then it is still ours to hold."""
        self.reported = False
        self.current: AbstractContextManager[None] | None = None
        """What lets jobguard.current() know of it."""
        self._sent_at = sent_at
        self._sent: dict[str, int] = {}

    @property
    def token(self) -> UUID:
        """The delivery that runs."""
        return self.claim.token

    def derive(self, job_id: str) -> UUID:
        """Return the token of what this run sends under that id: the same when it is run again."""
        nth = self._sent.get(job_id, 0)
        self._sent[job_id] = nth + 1
        return derive(self.token, job_id, nth, sent_at=self._sent_at)

    def parent(self) -> Parent:
        """Return what its retry takes the place of."""
        return Parent(self.token, claim=self.claim.number or None, worker=self.session.id)

    def leave(self) -> None:
        """It is not what runs in this thread any more."""
        current, self.current = self.current, None
        if current is not None:
            current.__exit__(None, None, None)

    def end(self, *, failed: bool) -> None:
        """Report how it ended, unless that is told already; ``failed``: it goes to the dead letters."""
        if self.reported:
            return
        self.reported = True
        self.leave()
        if self.superseded and not self.spooled:
            self.session.mark_superseded(self.claim)
        elif self.broken and not (failed or self.superseded):
            log.error("what goes on from message %s could not be sent: it runs again", self.job_id)
            self.session.release(self.claim)
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
        self.error = None  # its frames hold much in memory

    def _outcome(self, failed: bool) -> Outcome:
        if self.superseded:
            return Outcome.SUPERSEDED
        if failed or (self.error is not None and not self.skipped):
            return Outcome.FAILED
        return Outcome.CANCELLED if self.skipped else Outcome.COMPLETED


_run: ContextVar[Run | None] = ContextVar("jobguard_dramatiq_run", default=None)


def current_run() -> Run | None:
    """Return the run that this code is part of."""
    return _run.get()


def set_run(run: Run | None) -> None:
    """Begin a run in this thread, or be done with it."""
    _run.set(run)


def derive(parent: UUID, job_id: str, nth: int, *, sent_at: float) -> UUID:
    """Return the token of what comes of a delivery.

    An unguarded producer's ids are random, and would sort anywhere: then it sorts by when its message
    was made, in seconds since the epoch.
    """
    if parent.version == 7:
        return derived_token(parent, job_id, nth)
    return derived_token(token_at(sent_at), f"{parent.hex}\x00{job_id}", nth)


def _text(error: BaseException | None) -> str | None:
    if error is None:
        return None
    return "".join(traceback.format_exception(error))[-LONGEST_ERROR:]
