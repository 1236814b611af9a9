"""One guarded run of a job, and the single report of its end.

RQ's worker forks a work-horse for each job. The horse opens no connection to Postgres to report: it
writes a line to a pipe, and the parent, which has the session, reads the line when the horse is gone.
If the parent is gone, the horse reports by itself. A worker that does not fork opens no pipe.
"""

from __future__ import annotations

import json
import os
import select
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from uuid import UUID

from jobguard.fork import OwnerProcess
from jobguard.host_safety import contain_errors
from jobguard.log import log_event
from jobguard.model import Claim, Outcome, Parent
from jobguard.redact import redact

if TYPE_CHECKING:
    from jobguard.adapter import Session

_VARIABLE = "JOBGUARD_RQ_RUN"


class Run:
    """A claim of a worker until its end is reported. Only the first report counts."""

    def __init__(
        self, session: Session | None, claim: Claim, *, job_id: str, queue: str, task: str
    ):
        self.claim = claim
        self.job_id, self.queue, self.task = job_id, queue, task
        self.returned = False
        """The function returned; a later error does not come from the function."""
        self.began = False
        """The function was called, in this process."""
        self.raised = False
        """The function, or RQ's code after it, raised: this is never a worker's death."""
        self.killed = False
        """The horse was killed, and not by RQ itself."""
        self.unbegun = ""
        """Why the function was not called: the error of Redis, which is no fault of the job."""
        self.outcome: Outcome | None = None
        self.reported = False
        self._session = session
        self._successor: UUID | None = None
        self._owner = OwnerProcess() if session is not None else None
        self._reader = self._writer = -1
        self._horse = False

    @property
    def _is_in_parent(self) -> bool:
        """Return True in the process that claimed the job, False in its horse."""
        return self._owner is not None and self._owner.is_current

    def parent(self, outcome: Outcome) -> Parent:
        """Return the parent for the next delivery of this job."""
        if self._successor is not None:  # recorded, but its push was aborted: RQ tries again
            return Parent(self._successor)
        worker = self._session.id if self._session is not None else None
        return Parent(self.claim.token, claim=self.claim.number, outcome=outcome, worker=worker)

    def superseded_by(self, token: UUID) -> None:
        """Report no outcome: a delivery that supersedes this one is recorded."""
        self._successor = token
        self._report_end(None, None)

    def end(self, outcome: Outcome, error: str | None = None) -> None:
        """Report the end of the run, unless it is reported already."""
        self._report_end(outcome, error or None)

    def note_raised(self) -> None:
        """Report that the function raised, before RQ handles the error: the horse may die during that."""
        if self.reported or self.raised:
            return
        self.raised = True
        if not self._is_in_parent:
            self._write({"raised": True})

    @property
    def horse_died(self) -> bool:
        """Return True in the parent if the horse is gone and reported neither an end nor an error."""
        known = self.reported or self.raised or self.unbegun
        return self._horse and self._is_in_parent and not known

    def abandon(self) -> None:
        """Give up a killed or unstarted run: the leader restores the job, as after a worker's death."""
        if not self._is_in_parent or self._session is None:
            self.drop_claim()  # the parent has the claim
            return
        self.reported = True
        self._session.abandon(self.claim)

    def give_back(self, error: str) -> None:
        """Give back a run whose function was not called, because Redis failed before."""
        if self.reported:
            return
        self.reported, self.unbegun = True, error
        if self._is_in_parent and self._session is not None:
            self._session.give_back(self.claim, job_id=self.job_id, error=error)
        elif not self._write({"unbegun": error}):
            self._send_report(None, None)  # the parent is gone: the leader decides

    def drop_claim(self) -> None:
        """Drop the claim: the end is unknown, and the leader decides by the state of Redis."""
        self._report_end(None, None)

    def _report_end(self, outcome: Outcome | None, error: str | None) -> None:
        if self.reported:
            return
        self.reported, self.outcome = True, outcome
        with contain_errors("report the end of a job", job_id=self.job_id):
            if self._is_in_parent or not self._write_end(outcome, error):
                self._send_report(outcome, error)

    def _send_report(self, outcome: Outcome | None, error: str | None) -> None:
        if self._session is None:
            log_event("end_lost", job_id=self.job_id)
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
        if not self._is_in_parent:
            self._session.flush()  # the horse leaves by os._exit

    # The pipe from the horse to its parent.

    def open_pipe(self, *, for_spawn: bool = False) -> None:
        """Open the pipe, in the parent, before it starts the horse."""
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        if for_spawn:
            os.set_inheritable(self._writer, True)
            claim = self.claim
            worker = self._session.id.hex if self._session is not None else ""
            fields = [worker, os.getpid(), claim.token.hex, claim.number, claim.crashes]
            os.environ[_VARIABLE] = json.dumps([*fields, self._writer, self.job_id])

    def take_over_beats(self) -> None:
        """Prepare the horse to send the beats if the parent dies or leaves."""
        # The horse's copy of the reader would keep the pipe open without the parent.
        self._reader = _close(self._reader)
        if self._session is not None and self._writer >= 0:
            self._session.take_over_beats(self.claim, self._parent_is_gone)

    def _parent_is_gone(self) -> bool:
        """Wait until no process has the other end of the pipe; return False if this cannot be known."""
        poller = select.poll()
        poller.register(self._writer, 0)  # poll always reports an error or a hang-up
        while True:
            for _, event in poller.poll():
                return not event & select.POLLNVAL

    def close_writer(self) -> None:
        """Close the parent's writer after the start of the horse: now only the horse can write."""
        self._horse = True
        os.environ.pop(_VARIABLE, None)
        self._writer = _close(self._writer)

    def drain(self) -> None:
        """Read, in the parent, the reports of the horse."""
        if self._reader < 0 or not self._is_in_parent:
            return
        try:
            lines = os.read(self._reader, 1 << 16).splitlines()
        except BlockingIOError:
            return
        for fields in map(json.loads, lines):
            if fields.get("raised"):
                self.raised = True
            elif fields.get("unbegun"):
                self.unbegun = fields["unbegun"]
            elif not self.reported:
                outcome = Outcome(fields["outcome"]) if fields["outcome"] else None
                if fields["successor"]:
                    self._successor = UUID(hex=fields["successor"])
                self._report_end(outcome, fields["error"])

    def close(self) -> None:
        """Close the pipe, in the parent, at the end of the run."""
        self._reader, self._writer = _close(self._reader), _close(self._writer)

    def _write_end(self, outcome: Outcome | None, error: str | None) -> bool:
        successor = self._successor.hex if self._successor else None
        # The parent reads the report later, so it must fit into the pipe (64 kB): redact cuts it.
        text = redact(error) if error else None
        return self._write({"outcome": outcome, "error": text, "successor": successor})

    def _write(self, line: dict[str, Any]) -> bool:
        """Write a line to the pipe, in the horse; return False if no parent will read it."""
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
        """Return, in a spawned horse, the run that its parent started.

        ``session_of`` creates the session of that parent from its id and its pid.
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
        run._owner, run._writer = None, writer
        os.set_inheritable(writer, False)
        return run


def _close(descriptor: int) -> int:
    if descriptor >= 0:
        with suppress(OSError):
            os.close(descriptor)
    return -1
