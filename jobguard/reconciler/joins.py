"""Joins: jobs that wait for other jobs whose end the library has forgotten.

A library releases a waiting job when it sees the end of the last job that it depends on. If the
record of that end or the release itself was lost, the library never sees it again. Then the ledger
decides: the waiting job is released when all jobs that it depends on have ended as required.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from uuid import UUID

from jobguard.log import log_event
from jobguard.model import Join, LastOutcome, Observation, Outcome, Owed

_FORGET = 3600.0
"""Seconds after which a waiting job that is not inspected any more (it has ended) is forgotten."""


class Met(StrEnum):
    """Whether the dependencies of a job have ended."""

    YES = "yes"
    NOT_YET = "not yet"
    """Some of them are still owed, or have ended in a way that keeps the job waiting for ever."""
    UNKNOWN = "unknown"
    """The ledger has no record of some of them: they were never recorded, or too long ago."""


def met(join: Join, last_outcomes: Mapping[str, LastOutcome], ended: Mapping[UUID, Outcome]) -> Met:
    """Return whether all dependencies of a job have ended as required."""
    if any(ended.get(token) is not Outcome.COMPLETED for token in join.doubtful):
        return Met.NOT_YET
    good = {Outcome.COMPLETED}
    if join.failure_will_do:
        good |= {Outcome.FAILED, Outcome.DEAD}
    known = [last_outcomes.get(job_id, LastOutcome()) for job_id in join.job_ids]
    if any(last.owed or (last.outcome and last.outcome not in good) for last in known):
        return Met.NOT_YET
    return Met.UNKNOWN if any(last.outcome is None for last in known) else Met.YES


class Joins:
    """Remembers jobs that wait for finished dependencies: only a job that is seen twice is released."""

    def __init__(
        self,
        last_outcomes: Callable[[Sequence[str]], Mapping[str, LastOutcome]],
        ended: Callable[[Sequence[UUID]], Mapping[UUID, Outcome]],
        *,
        grace: float,
        patience: float,
        clock: Callable[[], float],
    ) -> None:
        self._last_outcomes = last_outcomes
        self._ended = ended
        self._grace = grace
        self._patience = patience
        self._clock = clock
        self._seen: dict[UUID, tuple[float, Met]] = {}
        # Jobs that were logged as waiting for unknown jobs, and when they were last seen so.
        self._wait_for_unknown: dict[UUID, float] = {}

    @property
    def pending(self) -> bool:
        """True if a job has to be inspected once more before it is released."""
        return any(answer is Met.YES for _, answer in self._seen.values())

    def over(
        self, page: Sequence[tuple[Owed, Observation]], *, reports_complete: bool
    ) -> Sequence[UUID]:
        """Return the jobs of this page that are to be released.

        The library needs a moment for the release itself: ``grace``. A dependency that was never
        recorded counts as ended, as in RQ, when every record had time to arrive (``patience``) and
        every worker has flushed its reports. This does not hold if the waiting job itself was lost
        and restored.
        """
        now = self._clock()
        waiting = [(owed, seen.joins) for owed, seen in page if seen.joins is not None]
        for owed, seen in page:
            if seen.joins is None:
                self._seen.pop(owed.token, None)
        if not waiting:
            return []
        ids = sorted({job_id for _, join in waiting for job_id in join.job_ids})
        last_outcomes = self._last_outcomes(ids) if ids else {}
        doubtful = [token for _, join in waiting for token in join.doubtful]
        ended = self._ended(doubtful) if doubtful else {}
        released = []
        for owed, join in waiting:
            answer = met(join, last_outcomes, ended)
            if answer is Met.UNKNOWN and owed.recoveries:
                # The job was restored after a loss. A dependency that was never recorded may be
                # lost as well, and not have run.
                self._keep_waiting(owed, join, last_outcomes)
                continue
            if answer is Met.NOT_YET or (answer is Met.UNKNOWN and not reports_complete):
                self._seen.pop(owed.token, None)
                continue
            since = self._seen.get(owed.token, (now, answer))[0]
            self._seen[owed.token] = (since, answer)
            if now - since >= (self._grace if answer is Met.YES else self._patience):
                released.append(owed.token)
                del self._seen[owed.token]
        self._seen = {token: it for token, it in self._seen.items() if now - it[0] < _FORGET}
        self._wait_for_unknown = {
            token: at for token, at in self._wait_for_unknown.items() if now - at < _FORGET
        }
        return released

    def _keep_waiting(
        self, owed: Owed, join: Join, last_outcomes: Mapping[str, LastOutcome]
    ) -> None:
        self._seen.pop(owed.token, None)
        if owed.token not in self._wait_for_unknown:
            unknown = [
                id
                for id in join.job_ids
                if not (last := last_outcomes.get(id)) or last == LastOutcome()
            ]
            log_event("job_waits_for_unknown", job_id=owed.job_id, waits_for=unknown)
        self._wait_for_unknown[owed.token] = self._clock()
