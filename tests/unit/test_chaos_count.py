"""Counts of the chaos test, with losses, second completions and kills made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobguard.demo.ledger import Ledger
from tests.chaos import report
from tests.chaos.count import Count, count
from tests.chaos.kills import Kill, KillLog
from tests.chaos.run import Result

KILLED, PARENT, OTHER = 11, 10, 12


def line(what: str, number: int, at: float, pid: int = OTHER, more: object = "") -> str:
    """Write one line of a ledger."""
    if what == "enqueued":
        more = f"id-{number}"
    return f"{what} {number} {pid} {int(at * 1e9)} {more}"


def ledger(*lines: str) -> Ledger:
    """Return a ledger of these lines."""
    made = Ledger()
    for one in lines:
        made.add(one)
    return made


def enqueued(number: int, at: float = 10.0) -> list[str]:
    """Write the lines of a call of enqueue that returned."""
    return [line("call", number, at), line("enqueued", number, at + 0.01)]


def twice(first: str, *more: str) -> Ledger:
    """Return the ledger of one job whose first completion is this one."""
    return ledger(*enqueued(1), first, *(more or [line("end", 1, 30.0)]))


def test_a_job_that_ended_once_is_neither_lost_nor_done_twice() -> None:
    """Failed attempts before the completion do not count."""
    counted = count(
        ledger(
            *enqueued(1),
            line("start", 1, 11.0),
            line("fail", 1, 11.1),
            line("start", 1, 12.0),
            line("end", 1, 12.1),
        ),
        [],
    )
    assert (counted.enqueued, counted.executed) == (1, 1)
    assert counted.lost == counted.twice == counted.excused == ()


def test_a_failing_attempt_is_no_completion() -> None:
    """A job that failed and was never run again is lost."""
    counted = count(ledger(*enqueued(1), line("start", 1, 11.0), line("fail", 1, 11.1)), [])
    assert counted.lost == (1,)


def test_a_call_that_raised_or_was_cut_off_promised_nothing() -> None:
    """Such a job is not lost if it never runs."""
    counted = count(
        ledger(line("call", 1, 10.0), line("refused", 1, 10.1), line("call", 2, 10.0)),
        [Kill("producer_kill", OTHER, 10.1)],
    )
    assert (counted.refused, counted.unanswered, counted.recorded) == (1, 1, 0)
    assert counted.lost == ()


def test_of_a_chord_whose_producer_died_only_the_first_job_is_surely_recorded() -> None:
    """The others are recorded one after the other."""
    lines = [line("call", n, 10.0 + n / 1000, KILLED) for n in (1, 2, 3)]
    lines += [
        line("call", 4, 10.004, KILLED, "1,2,3"),
        line("start", 1, 10.1),
        line("end", 1, 10.2),
    ]
    counted = count(ledger(*lines), [Kill("after_record", KILLED, 10.05)])
    assert (counted.unanswered, counted.recorded, counted.lost) == (4, 1, ())
    assert count(ledger(*lines[:4]), [Kill("after_record", KILLED, 10.05)]).lost == (1,)


@pytest.mark.parametrize("place", ["after_record", "after_push"])
def test_a_committed_record_is_owed_although_the_producer_died(place: str) -> None:
    """The producer died at a failpoint after the record: the job must still run."""
    lines = [line("call", 1, 10.0), line("call", 2, 10.0, KILLED), line("call", 3, 11.0, KILLED)]
    kills = [Kill(place, KILLED, 11.1)]
    assert count(ledger(*lines), kills).lost == (2, 3)
    ran = line("end", 2, 12.0), line("end", 3, 12.0)
    assert count(ledger(*lines, *ran), kills).lost == ()
    # Without PostgreSQL there is no record before the answer.
    assert count(ledger(*lines), kills, [(11.0, 12.0)]).lost == ()
    assert count(ledger(*lines), kills, [(12.0, 13.0)]).lost == (2, 3)


@pytest.mark.parametrize(
    ("pid", "parent", "end", "excused"),
    [
        (KILLED, 0, 19.95, True),
        (KILLED, 0, 19.901, True),
        (KILLED, 0, 19.89, False),  # it had time to report
        (KILLED, 0, 20.01, False),  # after the kill: another process with the same pid
        (OTHER, 0, 19.95, False),  # it was not killed
        (OTHER, KILLED, 19.95, True),  # a work-horse, whose worker had to report for it
        (OTHER, PARENT, 19.95, False),
    ],
)
def test_a_second_completion_is_excused_by_the_death_of_the_first_alone(
    pid: int, parent: int, end: float, excused: bool
) -> None:
    """The first end has the killed pid and is at most 100 ms before the kill."""
    counted = count(twice(line("end", 1, end, pid, parent)), [Kill("after_return", KILLED, 20.0)])
    assert (counted.excused, counted.twice) == (((1,), ()) if excused else ((), (1,)))


@pytest.mark.parametrize(
    ("end", "outage", "excused"),
    [
        (19.7, (19.5, 22.0), True),  # its report waited for PostgreSQL
        (19.64, (19.5, 22.0), False),  # it had time to leave the report in Redis
        (19.7, (15.0, 19.9), False),
    ],
)
def test_a_report_waits_for_postgres_once(
    end: float, outage: tuple[float, float], excused: bool
) -> None:
    """In an outage a report takes as long as one call of PostgreSQL may take."""
    counted = count(
        twice(line("end", 1, end, KILLED)), [Kill("worker_kill", KILLED, 20.0)], [outage]
    )
    assert (counted.excused, counted.twice) == (((1,), ()) if excused else ((), (1,)))


def test_a_third_completion_needs_a_death_of_its_own() -> None:
    """One kill does not excuse two more runs."""
    first, third = line("end", 1, 19.99, KILLED), line("end", 1, 40.0)
    kill = Kill("worker_kill", KILLED, 20.0)
    assert count(twice(first, line("end", 1, 30.0), third), [kill]).twice == (1,)
    second_kill = Kill("after_return", OTHER, 30.05)
    assert count(twice(first, line("end", 1, 30.0), third), [kill, second_kill]).excused == (1,)


def test_a_continuation_counts_like_any_other_job() -> None:
    """It was accepted with its members: it is lost if it never runs."""
    lines = [*enqueued(1), line("call", 2, 10.0, more="1"), line("enqueued", 2, 10.1)]
    counted = count(ledger(*lines, line("end", 1, 11.0)), [])
    assert (counted.enqueued, counted.lost, counted.early) == (2, (2,), ())


@pytest.mark.parametrize(
    ("ends", "early"),
    [
        ([line("end", 1, 11.0), line("end", 2, 12.0)], False),
        ([line("end", 1, 11.0), line("end", 2, 13.0)], True),
        ([line("end", 1, 11.0)], True),
        # A second completion comes after the start of the continuation.
        ([line("end", 1, 11.0), line("end", 2, 12.0), line("end", 1, 20.0)], False),
    ],
)
def test_a_continuation_begins_when_all_members_have_ended(ends: list[str], early: bool) -> None:
    """Only the first end of each member counts."""
    promised = [*enqueued(1), *enqueued(2), line("call", 3, 10.0, more="1,2")]
    lines = [*promised, line("enqueued", 3, 10.1), line("start", 3, 12.5), line("end", 3, 12.6)]
    assert count(ledger(*lines, *ends), []).early == ((3,) if early else ())


def test_completions_are_judged_in_the_order_of_their_time() -> None:
    """The order of the lines does not count, because a slow process may write its line late."""
    late = line("end", 1, 30.0), line("end", 1, 19.95, KILLED)
    counted = count(ledger(*enqueued(1), *late), [Kill("worker_kill", KILLED, 20.0)])
    assert counted.excused == (1,)


def test_kills_are_kept_while_failpoints_rest_and_retire(tmp_path: Path) -> None:
    """Every kill stays on record; a resting or retired place has no file, so that no process dies."""
    log = KillLog(tmp_path, ["here", "there"])
    assert not log.armed.exists()
    log.arm()
    with (log.armed / "here").open("a") as file:
        file.write("here 7 1000000000\n")
    log.note("worker_kill", 8)
    log.retire("here")
    assert (log.hits("here"), log.hits("there")) == (1, 0)
    assert not (log.armed / "here").exists()
    assert (log.armed / "there").exists()
    log.disarm()
    assert not log.armed.exists()
    assert {(kill.what, kill.pid) for kill in log.all()} == {("here", 7), ("worker_kill", 8)}
    log.arm()
    assert log.hits("here") == 1


def result(counted: Count, **hits: int) -> Result:
    """Return the result of a run."""
    return Result("rq", 1, counted, [], [], hits, restarts=0, extra={}, seconds=1.0)


FINE = Count(1, 1, 0, 0, 0, lost=(), twice=(), excused=(4,))


def test_the_report_fails_for_every_broken_promise() -> None:
    """It fails for a loss, an unexcused second completion, or a failpoint with too few hits."""
    assert report.problems([result(FINE, here=20)], hits=20) == []
    assert report.problems([result(FINE, here=10)] * 2, hits=20) == []
    assert len(report.problems([result(FINE, here=19)], hits=20)) == 1
    assert report.problems([result(FINE, here=19)], hits=0) == []
    lost = Count(1, 0, 0, 0, 0, lost=(1,), twice=(), excused=())
    assert len(report.problems([result(lost)], hits=20)) == 1
    again = Count(1, 1, 0, 0, 0, lost=(), twice=(1,), excused=())
    early = Count(1, 1, 0, 0, 0, lost=(), twice=(), excused=(), early=(1,))
    assert len(report.problems([result(early)], hits=20)) == 1
    assert len(report.problems([result(again)], hits=20)) == 1
