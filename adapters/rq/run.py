"""One guarded run of a job, and the one report of how it ended.

RQ's worker forks a work-horse for each job. The horse opens no connection to Postgres to report: it
writes a line into a pipe, and the parent, which holds the session, reads it when the horse is gone.
A horse whose parent is gone reports for itself. A worker that does not fork opens no pipe.
"""

from __future__ import annotations

import json
import logging
import os
import select
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from uuid import UUID

from jobguard.errors import is_host_interrupt
from jobguard.model import Claim, Outcome, Parent

if TYPE_CHECKING:
    from jobguard.adapter import Session

log = logging.getLogger("jobguard")

LONGEST_ERROR = 5_000
"""Characters; a report must fit into a pipe that nobody reads yet (64 kB)."""
_VARIABLE = "JOBGUARD_RQ_RUN"


class Run:
    """A claim that a worker holds, until its end is told: once, by whoever is first."""

    def __init__(
        self, session: Session | None, claim: Claim, *, job_id: str, queue: str, task: str
    ):
        self.claim = claim
        self.job_id, self.queue, self.task = job_id, queue, task
        self.returned = False
        """The function returned; whatever fails from here on is not its fault."""
        self.began = False
        """The function was called, in this process."""
        self.raised = False
        """The function raised, or what RQ does after its return did: that is no death, whatever follows."""
        self.killed = False
        """Its horse was killed, and nobody had asked for that."""
        self.outcome: Outcome | None = None
        self.reported = False
        self._session = session
        self._successor: UUID | None = None
        self._pid = os.getpid() if session is not None else 0
        self._reader = self._writer = -1
        self._horse = False

    def parent(self, outcome: Outcome) -> Parent:
        """Return what the next delivery of this job takes the place of."""
        if self._successor is not None:  # recorded, but its push was aborted: RQ tries again
            return Parent(self._successor)
        worker = self._session.id if self._session is not None else None
        return Parent(self.claim.token, claim=self.claim.number, outcome=outcome, worker=worker)

    def superseded_by(self, token: UUID) -> None:
        """Report nothing: a delivery that takes the place of this one is recorded."""
        self._successor = token
        self._tell(None, None)

    def end(self, outcome: Outcome, error: str | None = None) -> None:
        """Report how it ended, unless that is told already."""
        self._tell(outcome, error[-LONGEST_ERROR:] if error else None)

    def note_raised(self) -> None:
        """Say that it raised, before RQ does anything about it: the horse may not live to say more."""
        if self.reported or self.raised:
            return
        self.raised = True
        if os.getpid() != self._pid:
            self._write({"raised": True})

    @property
    def horse_died(self) -> bool:
        """In the parent: whether its horse is gone, and had told neither an end nor that it raised."""
        return self._horse and os.getpid() == self._pid and not (self.reported or self.raised)

    def abandon(self) -> None:
        """It was killed, or never began: whoever leads brings the job back, as a dead worker's."""
        if os.getpid() != self._pid or self._session is None:
            self.drop_claim()  # the parent holds the claim
            return
        self.reported = True
        self._session.abandon(self.claim)

    def drop_claim(self) -> None:
        """Stop to hold the claim: nobody knows how it ended, and Redis and the leader decide."""
        self._tell(None, None)

    def _tell(self, outcome: Outcome | None, error: str | None) -> None:
        if self.reported:
            return
        self.reported, self.outcome = True, outcome
        try:
            if os.getpid() == self._pid or not self._write_end(outcome, error):
                self._report(outcome, error)
        except Exception as error:
            if is_host_interrupt(error):
                raise
            log.exception("jobguard could not report the end of job %s", self.job_id)

    def _report(self, outcome: Outcome | None, error: str | None) -> None:
        if self._session is None:
            log.error("the worker of job %s is gone, and its end with it", self.job_id)
            return
        if outcome is None:
            self._session.mark_superseded(self.claim)
        else:
            self._session.end(
                self.claim,
                outcome,
                job_id=self.job_id,
                queue=self.queue,
                task=self.task,
                error=error,
            )
        if os.getpid() != self._pid:
            self._session.flush()  # the horse leaves by os._exit

    # The pipe between the horse and its parent.

    def open_pipe(self, *, for_spawn: bool = False) -> None:
        """In the parent, before the horse is made."""
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        if for_spawn:
            os.set_inheritable(self._writer, True)
            claim = self.claim
            worker = self._session.id.hex if self._session is not None else ""
            fields = [worker, os.getpid(), claim.token.hex, claim.number, claim.crashes]
            os.environ[_VARIABLE] = json.dumps([*fields, self._writer, self.job_id])

    def take_over_beats(self) -> None:
        """In the horse: beat in the parent's stead, should it die or turn away."""
        # Our copy of the reader would keep the pipe alive without the parent.
        self._reader = _close(self._reader)
        if self._session is not None and self._writer >= 0:
            self._session.take_over_beats(self.claim, self._parent_is_gone)

    def _parent_is_gone(self) -> bool:
        """Wait until nobody holds the other end of the pipe; False: it cannot be known."""
        poller = select.poll()
        poller.register(self._writer, 0)  # an error or a hang-up is told unasked
        while True:
            for _, event in poller.poll():
                return not event & select.POLLNVAL

    def close_writer(self) -> None:
        """In the parent, when the horse is made: the horse alone can write now."""
        self._horse = True
        os.environ.pop(_VARIABLE, None)
        self._writer = _close(self._writer)

    def drain(self) -> None:
        """In the parent: take what the horse told."""
        if self._reader < 0 or os.getpid() != self._pid:
            return
        try:
            lines = os.read(self._reader, 1 << 16).splitlines()
        except BlockingIOError:
            return
        for fields in map(json.loads, lines):
            if fields.get("raised"):
                self.raised = True
            elif not self.reported:
                outcome = Outcome(fields["outcome"]) if fields["outcome"] else None
                if fields["successor"]:
                    self._successor = UUID(hex=fields["successor"])
                self._tell(outcome, fields["error"])

    def close(self) -> None:
        """In the parent, at the very end."""
        self._reader, self._writer = _close(self._reader), _close(self._writer)

    def _write_end(self, outcome: Outcome | None, error: str | None) -> bool:
        successor = self._successor.hex if self._successor else None
        return self._write({"outcome": outcome, "error": error, "successor": successor})

    def _write(self, line: dict[str, Any]) -> bool:
        """In the horse: whether the parent will hear it."""
        if self._writer < 0:
            return False
        text = json.dumps(line, ensure_ascii=False) + "\n"
        try:
            os.write(self._writer, text.encode(errors="replace"))
        except OSError:  # BrokenPipeError: the parent is gone
            return False
        return True

    @classmethod
    def inherited(
        cls,
        session_of: Callable[[UUID, int], Session | None],
        job_id: str,
        *,
        queue: str,
        task: str,
    ) -> Run | None:
        """In a horse that was spawned, not forked: the run that its parent began.

        ``session_of`` makes the session of that parent, by its id and its pid.
        """
        fields = os.environ.pop(_VARIABLE, None)  # not for the children of the job
        if not fields:
            return None
        worker, parent, token, number, crashes, writer, theirs = json.loads(fields)
        if theirs != job_id:
            return None
        claim = Claim(UUID(hex=token), number, crashes)
        run = cls(
            session_of(UUID(hex=worker), parent), claim, job_id=job_id, queue=queue, task=task
        )
        run._pid, run._writer = 0, writer
        os.set_inheritable(writer, False)
        return run


def _close(descriptor: int) -> int:
    if descriptor >= 0:
        try:
            os.close(descriptor)
        except OSError:
            log.debug("descriptor %d was closed already", descriptor)
    return -1
