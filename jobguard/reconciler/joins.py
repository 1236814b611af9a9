"""Joins: jobs that wait for others whose end the library has forgotten.

A library moves a waiting job on when it sees the last of those it waits for end. It never sees that
again if it was lost in between: the record of the end, or the move. Then the ledger decides: what
waits goes on when all that it waits for has ended as it should.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from uuid import UUID

from jobguard.log import log_event
from jobguard.model import Join, LastOutcome, Observation, Outcome, Owed

_FORGET = 3600.0
"""Seconds after which what is looked at no more (it has ended) need not be remembered."""


class Met(StrEnum):
    """Whether what a job waits for has come."""

    YES = "yes"
    NOT_YET = "not yet"
    """Some of it is still to come, or has ended so that the job shall wait for ever."""
    UNKNOWN = "unknown"
    """Nothing is known of some of it: recorded by nobody, or long ago."""


def met(join: Join, last_outcomes: Mapping[str, LastOutcome], ended: Mapping[UUID, Outcome]) -> Met:
    """Tell whether all that a job waits for has ended as it should."""
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
    """Remembers what was seen to wait in vain: acted on is only what is seen so twice."""

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
        self._held: dict[UUID, float] = {}  # said to wait for what nobody knows, and last seen so

    @property
    def pending(self) -> bool:
        """Whether something is to be seen once more that then goes on."""
        return any(answer is Met.YES for _, answer in self._seen.values())

    def over(
        self, page: Sequence[tuple[Owed, Observation]], *, reports_complete: bool
    ) -> Sequence[UUID]:
        """Return which of these wait in vain.

        The library needs a moment for the move itself: ``grace``. Of what nobody has ever heard, it is
        believed that it has ended, as RQ does: when everything had the time to be recorded
        (``patience``), and no worker has anything to report. Not if the waiting job itself was lost and
        put back.
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
        vain = []
        for owed, join in waiting:
            answer = met(join, last_outcomes, ended)
            if answer is Met.UNKNOWN and owed.recoveries:
                # It was put back after a loss: what nobody recorded may be lost with it, and unrun.
                self._hold(owed, join, last_outcomes)
                continue
            if answer is Met.NOT_YET or (answer is Met.UNKNOWN and not reports_complete):
                self._seen.pop(owed.token, None)
                continue
            since = self._seen.get(owed.token, (now, answer))[0]
            self._seen[owed.token] = (since, answer)
            if now - since >= (self._grace if answer is Met.YES else self._patience):
                vain.append(owed.token)
                del self._seen[owed.token]
        self._seen = {token: it for token, it in self._seen.items() if now - it[0] < _FORGET}
        self._held = {token: at for token, at in self._held.items() if now - at < _FORGET}
        return vain

    def _hold(self, owed: Owed, join: Join, last_outcomes: Mapping[str, LastOutcome]) -> None:
        self._seen.pop(owed.token, None)
        if owed.token not in self._held:
            unknown = [
                id
                for id in join.job_ids
                if not (last := last_outcomes.get(id)) or last == LastOutcome()
            ]
            log_event("job_waits_for_unknown", job_id=owed.job_id, waits_for=unknown)
        self._held[owed.token] = self._clock()
