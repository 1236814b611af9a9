"""Counts of the demo, with losses and duplicates made by hand."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest

from jobguard.demo.figures import Figures, RedisKill, WorkerKill, count
from jobguard.demo.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Sequence

KILLED, OTHER, MAIN = 11, 12, 10


def line(what: str, number: int, at: float, pid: int = OTHER, parent: int = 0) -> str:
    """Write one line of a ledger."""
    more = f" id-{number}" if what == "enqueued" else f" {parent}" if parent else ""
    return f"{what} {number} {pid} {int(at * 1e9)}{more}"


def ledger(*lines: str) -> Ledger:
    """Return a ledger of these lines."""
    made = Ledger()
    for one in lines:
        made.add(one)
    return made


def done(number: int, at: float) -> list[str]:
    """Return the lines of a job that completed once."""
    return [line("enqueued", number, at), line("start", number, at), line("end", number, at + 0.1)]


def figures(
    of: Ledger,
    redis_kills: Sequence[RedisKill] = (),
    worker_kills: Sequence[WorkerKill] = (),
) -> Figures:
    """Count the figures of this ledger."""
    return count(of, library="rq", redis_kills=redis_kills, worker_kills=worker_kills)


def test_a_quiet_run_has_lost_nothing() -> None:
    """Every enqueued job is executed once."""
    counted = figures(ledger(*done(1, 10.0), *done(2, 11.0)))
    assert (counted.enqueued, counted.executed, counted.lost) == (2, 2, 0)
    assert (counted.duplicated, counted.excused, counted.restarted) == (0, 0, 0)
    assert counted.promise_is_kept
    assert counted.seconds == pytest.approx(1.1)


def test_a_promised_job_that_never_ended_is_lost() -> None:
    """The job is lost whether or not it was started."""
    counted = figures(
        ledger(
            *done(1, 10.0),
            line("enqueued", 2, 10.0),
            line("enqueued", 3, 10.0),
            line("start", 3, 10.0),
        )
    )
    assert (counted.enqueued, counted.executed, counted.lost) == (3, 1, 2)
    assert not counted.promise_is_kept


def test_a_refused_job_is_not_lost() -> None:
    """An enqueue that raised accepted no job, whether or not the job ran."""
    counted = figures(
        ledger(
            line("refused", 1, 10.0),
            line("refused", 2, 10.0),
            line("start", 2, 10.0),
            line("end", 2, 10.1),
            *done(3, 11.0),
        )
    )
    assert (counted.enqueued, counted.executed, counted.lost) == (1, 1, 0)
    assert (counted.refused, counted.duplicated) == (2, 0)


def test_a_job_that_ends_before_its_producer_wrote_is_counted_once() -> None:
    """The order of the lines of two processes does not count."""
    backwards = ledger(
        line("start", 1, 10.0), line("end", 1, 10.1), line("enqueued", 1, 10.2), *done(2, 11.0)
    )
    assert backwards.executed == figures(backwards).executed == 2
    assert backwards.running == {}


def test_two_ends_are_a_duplicate() -> None:
    """With more ends, it is still one duplicated job."""
    counted = figures(
        ledger(*done(1, 10.0), line("end", 1, 11.0), line("end", 1, 12.0), *done(2, 10.0))
    )
    assert (counted.executed, counted.duplicated) == (2, 1)
    assert not counted.promise_is_kept


@pytest.mark.parametrize(
    ("first_pid", "first_end", "excused"),
    [
        (KILLED, 19.95, 1),
        (KILLED, 20.0, 1),
        (KILLED, 19.89, 0),  # it had time to report
        (KILLED, 20.01, 0),  # after the kill: another process with the same pid
        (OTHER, 19.95, 0),  # it was not killed
    ],
)
def test_only_a_worker_killed_before_its_report_excuses_a_second_run(
    first_pid: int, first_end: float, excused: int
) -> None:
    """If a worker is killed between the end of the task and the report, the end cannot be known."""
    counted = figures(
        ledger(
            line("enqueued", 1, 10.0),
            line("start", 1, 19.0, first_pid),
            line("end", 1, first_end, first_pid),
            line("start", 1, 36.0),
            line("end", 1, 36.1),
        ),
        worker_kills=[WorkerKill(at=20.0, pid=KILLED, number=1)],
    )
    assert (counted.excused, counted.duplicated) == (excused, 1 - excused)
    assert counted.restarted == 0


def test_a_third_run_is_never_excused() -> None:
    """One death excuses one second run only."""
    counted = figures(
        ledger(
            line("enqueued", 1, 10.0),
            line("end", 1, 19.99, KILLED),
            line("end", 1, 36.0),
            line("end", 1, 37.0),
        ),
        worker_kills=[WorkerKill(at=20.0, pid=KILLED, number=1)],
    )
    assert (counted.excused, counted.duplicated) == (0, 1)


def test_the_job_of_a_killed_worker_is_restarted() -> None:
    """Such a job has two starts and one end; the time runs from the kill to the second start."""
    counted = figures(
        ledger(
            line("enqueued", 1, 10.0),
            line("start", 1, 19.8, KILLED),
            *done(2, 19.0),
            line("start", 1, 36.5),
            line("end", 1, 37.0),
        ),
        worker_kills=[WorkerKill(at=20.0, pid=KILLED, number=1)],
    )
    assert (counted.restarted, counted.restart_seconds) == (1, 16.5)
    assert (counted.lost, counted.duplicated) == (0, 0)


def test_a_worker_is_killed_with_its_children() -> None:
    """A job of the worker's child is restarted, or excused, like a job of the worker itself."""
    counted = figures(
        ledger(
            line("enqueued", 1, 10.0),
            line("start", 1, 19.8, KILLED, MAIN),
            line("enqueued", 2, 10.0),
            line("start", 2, 19.8, KILLED + 5, MAIN),
            line("end", 2, 19.95, KILLED + 5, MAIN),
            line("start", 1, 36.5),
            line("end", 1, 37.0),
            line("start", 2, 36.5),
            line("end", 2, 37.0),
        ),
        worker_kills=[WorkerKill(at=20.0, pid=MAIN, number=1)],
    )
    assert (counted.restarted, counted.restart_seconds) == (1, 16.5)
    assert (counted.excused, counted.duplicated) == (1, 0)


def test_jobs_at_once_are_counted_from_their_lines() -> None:
    """At most three jobs ran at once; a killed run has no length, and its second run counts once."""
    counted = figures(
        ledger(
            *(line("start", number, 10.0 + number / 10) for number in (1, 2, 3)),
            *(line("end", number, 11.0 + number / 10) for number in (1, 2, 3)),
            line("start", 4, 10.0, KILLED),
            line("start", 4, 11.15),
            line("end", 4, 12.0),
            line("start", 5, 12.0),
            line("end", 5, 12.5),
        )
    )
    assert counted.concurrency == 3


def test_a_second_start_without_a_kill_is_no_restart() -> None:
    """Only the job of a killed worker counts as restarted."""
    counted = figures(
        ledger(line("start", 1, 9.0, KILLED + 5), *done(1, 10.0)),
        worker_kills=[WorkerKill(at=20.0, pid=KILLED, number=1)],
    )
    assert (counted.restarted, counted.restart_seconds) == (0, None)


def test_a_job_that_waited_during_a_kill_of_redis_is_recovered() -> None:
    """Jobs that were done before, running, lost, or accepted later do not count as recovered."""
    counted = figures(
        ledger(
            *done(1, 10.0),
            line("enqueued", 2, 10.0),  # waits, and comes back
            line("start", 2, 25.0),
            line("end", 2, 25.1),
            line("enqueued", 3, 10.0),  # running
            line("start", 3, 19.9),
            line("end", 3, 20.3),
            line("enqueued", 4, 10.0),  # lost
            *done(5, 22.0),
        ),
        redis_kills=[RedisKill(at=20.0, up_at=20.6), RedisKill(at=24.0, up_at=24.6)],
    )
    assert (counted.recovered, counted.lost) == (1, 1)


def test_the_worst_kill_is_shown() -> None:
    """Detection counts from the kill; recovery counts from the moment when Redis accepts again."""
    counted = figures(
        ledger(*done(1, 10.0)),
        redis_kills=[
            RedisKill(at=20.0, up_at=20.5, detected_at=20.75, recovered_at=24.5),
            RedisKill(at=30.0, up_at=30.5, detected_at=31.0, recovered_at=32.0),
        ],
    )
    assert (counted.detect_seconds, counted.recover_seconds) == (1.0, 4.0)


def test_a_kill_that_was_never_recovered_from_is_not_hidden_by_the_others() -> None:
    """If one kill was never recovered from, the figure is "never"."""
    counted = figures(
        ledger(*done(1, 10.0)),
        redis_kills=[
            RedisKill(at=20.0, up_at=20.5, detected_at=20.75, recovered_at=24.5),
            RedisKill(at=30.0, up_at=30.5),
        ],
    )
    assert (counted.detect_seconds, counted.recover_seconds) == (None, None)


def test_the_public_figures_are_these() -> None:
    """The keys of `--json` do not change."""
    counted = figures(ledger(*done(1, 10.0)))
    assert list(counted.public()) == [
        *("library", "enqueued", "executed", "lost", "duplicated", "restarted", "recovered"),
        *("detect_seconds", "recover_seconds", "seconds"),
    ]
    assert dataclasses.replace(counted, lost=3).public()["lost"] == 3
