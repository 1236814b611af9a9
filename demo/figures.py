"""The figures of a run, computed only from the ledger and the list of kills."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from jobguard.demo.ledger import Ledger, Mark

# A worker that is killed after its task returned and before its report was committed has done
# the job, and no other process can know that. "At least once" allows this one second run.
REPORT_SECONDS = 0.1


@dataclass(slots=True)
class RedisKill:
    """One kill of Redis. All times are of the wall clock; None means that it has not happened (yet)."""

    at: float  # just before the signal: events in the meantime count against us
    up_at: float | None = None  # accepts connections again, empty
    detected_at: float | None = None  # the time in the incident row
    recovered_at: float | None = None  # every owed job was seen present


@dataclass(frozen=True, slots=True)
class WorkerKill:
    """One kill of a worker in the middle of a job."""

    at: float  # when it was gone: it cannot have written anything later
    pid: int
    number: int


@dataclass(frozen=True, slots=True)
class Figures:
    """The counts of one run."""

    library: str
    enqueued: int
    executed: int
    lost: int
    duplicated: int
    excused: int  # second runs that "at least once" allows; see REPORT_SECONDS
    restarted: int
    # From a worker's kill until its job started again. This is the time that jobguard took to see
    # the death and to restore the job, plus the wait of the job in the queue.
    restart_seconds: float | None
    recovered: int
    refused: int  # calls of enqueue that raised: nothing was promised, so nothing is lost
    redis_kills: int
    detect_seconds: float | None
    recover_seconds: float | None
    seconds: float
    concurrency: int

    @property
    def promise_is_kept(self) -> bool:
        """True if no job was lost, and none completed twice without excuse."""
        return not (self.lost or self.duplicated)

    def public(self) -> dict[str, Any]:
        """Return the values that `--json` prints."""
        more = ("excused", "restart_seconds", "refused", "redis_kills", "concurrency")
        return {name: value for name, value in asdict(self).items() if name not in more}


def count(
    ledger: Ledger,
    *,
    library: str,
    redis_kills: Sequence[RedisKill],
    worker_kills: Sequence[WorkerKill],
) -> Figures:
    """Count one run."""
    twice = [marks for marks in ledger.ends.values() if len(marks) > 1]
    excused = sum(_excused(marks, worker_kills) for marks in twice)
    restarts = [seconds for kill in worker_kills for seconds in _restart(ledger, kill)]
    return Figures(
        library=library,
        enqueued=len(ledger.enqueued),
        executed=len(ledger.enqueued.keys() & ledger.ends.keys()),
        lost=len(ledger.owed()),
        duplicated=len(twice) - excused,
        excused=excused,
        restarted=len(restarts),
        restart_seconds=max(restarts, default=None),
        recovered=sum(_ran_after_death(ledger, number, redis_kills) for number in ledger.enqueued),
        refused=len(ledger.refused),
        redis_kills=len(redis_kills),
        detect_seconds=_worst((kill.at, kill.detected_at) for kill in redis_kills),
        recover_seconds=_worst((kill.up_at, kill.recovered_at) for kill in redis_kills),
        seconds=_span(ledger),
        concurrency=_concurrency(ledger),
    )


def _excused(ends: Sequence[Mark], worker_kills: Sequence[WorkerKill]) -> bool:
    """Return True if there was one second run, and the first one ended just before its worker died."""
    first = ends[0]
    return len(ends) == 2 and any(
        first.is_of(kill.pid) and 0 <= kill.at - first.at <= REPORT_SECONDS for kill in worker_kills
    )


def _restart(ledger: Ledger, kill: WorkerKill) -> list[float]:
    """Return, for each job that this kill interrupted, the time until it was started again.

    Usually this is one job; if the library prefetches, there may be more.
    """
    return [
        round(min(again) - kill.at, 3)
        for number, starts in ledger.starts.items()
        if any(mark.is_of(kill.pid) for mark in starts)
        and not any(mark.is_of(kill.pid) for mark in ledger.ends.get(number, ()))
        and (
            again := [mark.at for mark in starts if not mark.is_of(kill.pid) and mark.at > kill.at]
        )
    ]


def _ran_after_death(ledger: Ledger, number: int, redis_kills: Sequence[RedisKill]) -> bool:
    """Return True if the job was promised before a kill of Redis, first started after it, and done.

    Without jobguard there are a few such jobs too: a worker had fetched them and was about to
    start.
    """
    if number not in ledger.ends or number not in ledger.starts:
        return False
    promised_at, started_at = ledger.enqueued[number].at, ledger.starts[number][0].at
    return any(
        kill.up_at is not None and promised_at < kill.at and kill.up_at <= started_at
        for kill in redis_kills
    )


def _worst(spans: Iterable[tuple[float | None, float | None]]) -> float | None:
    """Return the longest span; None if one of them has no end, or if there was none."""
    lengths = []
    for start, stop in spans:
        if start is None or stop is None:
            return None
        lengths.append(stop - start)
    return round(max(lengths), 3) if lengths else None


def _span(ledger: Ledger) -> float:
    """Measure from the first call of enqueue to the last end of a job.

    The time that the demo waits after that, to see whether more jobs run, is not counted.
    """
    calls = [*ledger.enqueued.values(), *ledger.refused.values()]
    ends = [mark for marks in ledger.ends.values() for mark in marks]
    if not calls or not ends:
        return 0.0
    return round(max(mark.at for mark in ends) - min(mark.at for mark in calls), 3)


def _concurrency(ledger: Ledger) -> int:
    """Count the jobs that ran at once, at most; runs that never ended are left out."""
    steps = []
    for number, starts in ledger.starts.items():
        ends = list(ledger.ends.get(number, ()))
        for start in starts:
            end = next((mark for mark in ends if mark.pid == start.pid), None)
            if end is not None:
                ends.remove(end)
                steps += [(start.at, 1), (end.at, -1)]
    running = itertools.accumulate(step for _, step in sorted(steps))
    return max(running, default=0)
