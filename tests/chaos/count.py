"""The figures of a run, computed only from the ledger and from the log of kills."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobguard.demo.figures import REPORT_SECONDS
from jobguard.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from jobguard.demo.ledger import Ledger, Mark
    from tests.chaos.kills import Kill

RECORDED = ("after_record", "after_push")
"""A process that dies at these has committed its record: the job is owed, without an answer."""
_OF_THIS_CALL = 5.0


@dataclass(frozen=True, slots=True)
class Count:
    """The figures of one run."""

    enqueued: int
    executed: int
    refused: int  # calls of enqueue that raised: their jobs were not accepted
    unanswered: int  # calls whose producer was killed during the call: their jobs were not accepted
    recorded: int  # the unanswered ones whose record was committed: these jobs must run
    lost: tuple[int, ...]
    twice: tuple[int, ...]  # completed more than once, and not excused
    excused: tuple[int, ...]
    early: tuple[int, ...] = ()  # begun before all jobs that the library had to run first had ended


def count(
    ledger: Ledger, kills: Sequence[Kill], outages: Sequence[tuple[float, float]] = ()
) -> Count:
    """Count one run, after everything has ended; ``outages``: the times without PostgreSQL."""
    unanswered = ledger.called.keys() - ledger.enqueued.keys() - ledger.refused.keys()
    recorded = _recorded(ledger, unanswered, kills, outages)
    again = {number: marks for number, marks in ledger.ends.items() if len(marks) > 1}
    excused = {number for number, marks in again.items() if is_excused(marks, kills, outages)}
    return Count(
        enqueued=len(ledger.enqueued),
        executed=len(ledger.enqueued.keys() & ledger.ends.keys()),
        refused=len(ledger.refused),
        unanswered=len(unanswered),
        recorded=len(recorded),
        lost=tuple(sorted(ledger.owed() | (recorded - ledger.ends.keys()))),
        twice=tuple(sorted(again.keys() - excused)),
        excused=tuple(sorted(excused)),
        early=tuple(sorted(number for number in ledger.follows if _is_early(ledger, number))),
    )


def _is_early(ledger: Ledger, number: int) -> bool:
    starts = [mark.at for mark in ledger.starts.get(number, ())]
    ends = [[mark.at for mark in ledger.ends.get(one, ())] for one in ledger.follows[number]]
    return bool(starts) and not all(min(marks, default=math.inf) <= min(starts) for marks in ends)


def is_excused(
    ends: Sequence[Mark], kills: Sequence[Kill], outages: Sequence[tuple[float, float]] = ()
) -> bool:
    """Return True if every completion except the last was by a worker that was killed before its report.

    An end carries the pid of the process that ran the job and, for a work-horse, of the worker that
    reports for the horse. An end excuses nothing if it was after the kill, or earlier before the
    kill than a report takes. While PostgreSQL is away, a process waits for it once.
    """

    def takes(kill: Kill) -> float:
        away = any(began <= kill.at <= ended for began, ended in outages)
        return REPORT_SECONDS + (Settings().call_timeout if away else 0.0)

    return all(
        any(
            kill.pid in (end.pid, end.parent) and 0 <= kill.at - end.at <= takes(kill)
            for kill in kills
        )
        for end in sorted(ends, key=lambda end: end.at)[:-1]
    )


def _recorded(
    ledger: Ledger,
    unanswered: Collection[int],
    kills: Sequence[Kill],
    outages: Sequence[tuple[float, float]],
) -> set[int]:
    """Return the jobs of producers that died between the record and the answer.

    While PostgreSQL is away there is no record before the answer. Jobs of one chord are recorded one by
    one: the producer may have died at the first one.
    """
    deaths = {kill.pid: kill.at for kill in kills if kill.what in RECORDED}
    found = {
        number
        for number in unanswered
        if (mark := ledger.called[number]).pid in deaths
        and 0 <= deaths[mark.pid] - mark.at <= _OF_THIS_CALL
        and not any(began <= deaths[mark.pid] <= ended for began, ended in outages)
    }
    of_chords = {one for number, before in ledger.follows.items() for one in (number, *before)}
    later = {
        number
        for number in found & of_chords
        if any(
            other < number and ledger.called[other].pid == ledger.called[number].pid
            for other in found & of_chords
        )
    }
    return found - later
