from __future__ import annotations

import os
import threading
from typing import Any

import pytest

from jobguard import log
from jobguard.log import EVENTS, log_event
from jobguard.log_bounds import CHANGE, ENDS, LIMITED, REMIND, Flood
from tests.fakes.world import Clock


@pytest.fixture
def clock() -> Clock:
    """A clock that moves by hand."""
    return Clock()


@pytest.fixture
def flood(clock: Clock) -> Flood:
    """A table of its own."""
    return Flood(clock)


def written(flood: Flood, event: str, **fields: Any) -> list[tuple[str, Any]]:
    """Say this; return the events that are written now, each with its suppressed count."""
    return [(name, given.get("suppressed")) for name, given, _ in flood.passes(event, fields)]


def test_a_repeated_event_is_one_line_and_a_reminder_a_minute(flood: Flood, clock: Clock) -> None:
    """50,000 equal events of one outage are one line a minute, with their count."""
    assert written(flood, "spool_full", size=1) == [("spool_full", None)]
    for _ in range(50_000):
        assert written(flood, "spool_full", size=1) == []
    clock.advance(REMIND)
    assert written(flood, "spool_full", size=1) == [("spool_full", 49_999)]
    assert written(flood, "spool_full", size=1) == []


def test_a_reminder_needs_no_further_event(flood: Flood, clock: Clock) -> None:
    """What was held back last is written by a loop, or at the end of the process."""
    written(flood, "record_lost", error="a")
    written(flood, "record_lost", error="a")
    assert flood.due() == []
    clock.advance(REMIND)
    assert [event for event, _, _ in flood.due()] == ["record_lost"]
    written(flood, "record_lost", error="a")
    assert [event for event, _, _ in flood.rest()] == ["record_lost"]
    assert flood.rest() == []


def test_another_error_is_another_line(flood: Flood) -> None:
    """A change of the error is written; numbers, ids and quoted names in it are none."""
    assert written(flood, "postgres_away", error="timeout after 251 ms")
    assert not written(flood, "postgres_away", error="timeout after 270 ms")
    assert written(flood, "postgres_away", error="connection refused")


def test_errors_of_ever_new_shapes_are_bounded(flood: Flood) -> None:
    """An error with a random word in it does not write a line each time."""
    shapes = ["".join(chr(97 + (n >> i & 1)) for i in range(12)) for n in range(1000)]
    lines = [line for shape in shapes for line in written(flood, "guest_failed", error=shape)]
    assert len(lines) <= 5


def test_the_end_of_a_state_says_what_was_not_written(flood: Flood, clock: Clock) -> None:
    """The line that Postgres is back carries the counts; the next outage is a change again."""
    written(flood, "postgres_away")
    for _ in range(400):
        written(flood, "start_unclaimed", error="BreakerOpen")
    clock.advance(20)
    assert written(flood, "postgres_back") == [("postgres_back", {"start_unclaimed": 399})]
    clock.advance(CHANGE)
    assert written(flood, "postgres_away") == [("postgres_away", None)]
    assert written(flood, "start_unclaimed", error="BreakerOpen") == [("start_unclaimed", None)]


def test_a_state_that_flaps_is_a_line_in_ten_seconds(flood: Flood, clock: Clock) -> None:
    """A circuit that opens and closes each second writes no pair of lines a second."""
    lines: list[Any] = []
    for _ in range(60):
        lines += written(flood, "postgres_away")
        clock.advance(0.5)
        lines += written(flood, "postgres_back")
        clock.advance(0.5)
    assert 4 <= len(lines) <= 24


def test_the_last_state_is_always_written(flood: Flood, clock: Clock) -> None:
    """A change that was held back is written as soon as its silence is over; a false one never."""
    for _ in range(3):
        written(flood, "postgres_away")
        written(flood, "postgres_back")
    assert written(flood, "postgres_away") == []
    clock.advance(CHANGE)
    assert [event for event, _, _ in flood.due()] == ["postgres_away"]
    written(flood, "postgres_back")
    written(flood, "postgres_back")  # held back
    written(flood, "postgres_away")
    clock.advance(REMIND)
    assert "postgres_back" not in [event for event, _, _ in flood.due()]


def test_sources_are_told_apart(flood: Flood) -> None:
    """What one Redis does hides nothing of another."""
    assert written(flood, "redis_away", source="a")
    assert written(flood, "redis_away", source="b")
    assert not written(flood, "redis_away", source="a")
    assert written(flood, "redis_back", source="a")
    assert not written(flood, "redis_away", source="b")


def test_the_table_is_bounded(flood: Flood) -> None:
    """Ten thousand keys fit into a table of a fixed size; no event is lost by that."""
    for n in range(10_000):
        assert written(flood, "redis_away", source=f"redis-{n}")


def test_children_share_what_was_written(flood: Flood) -> None:
    """A forked child does not repeat the line of its parent, and its count reaches the parent."""
    written(flood, "start_unclaimed", error="a")
    child = os.fork()
    if child == 0:
        flood.after_fork()
        os._exit(0 if written(flood, "start_unclaimed", error="a") == [] else 1)
    assert os.waitpid(child, 0)[1] == 0
    flood._clock.advance(REMIND)  # type: ignore[attr-defined]
    assert written(flood, "start_unclaimed", error="a") == [("start_unclaimed", 1)]


def test_threads_lose_no_count(flood: Flood, clock: Clock) -> None:
    """Of 8 times 500 events at once, one is written. The reminder is one of the others, and counts them."""
    lines: list[Any] = []

    def work() -> None:
        for _ in range(500):
            lines.extend(written(flood, "spool_full"))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lines) == 1
    clock.advance(REMIND)
    assert written(flood, "spool_full") == [("spool_full", 3998)]


def test_a_lock_that_is_held_costs_no_line(flood: Flood) -> None:
    """A signal handler that interrupts this very code writes its line, and waits for nothing."""
    with flood._lock:
        assert written(flood, "spool_full") == [("spool_full", None)]
        assert written(flood, "spool_full") == [("spool_full", None)]


def test_what_is_held_back_keeps_no_stack(flood: Flood) -> None:
    """A held line has neither an exception nor its traceback."""
    for _ in range(2):
        flood.passes(
            "guest_failed", {"where": "x", "error": ValueError("boom")}, ValueError("boom")
        )
    ((_, fields, exc_info),) = flood.rest()
    assert (fields["error"], exc_info) == ("ValueError: boom", None)


def test_every_bounded_event_exists() -> None:
    """The bounds name events of the table only."""
    assert LIMITED.keys() | ENDS.keys() <= EVENTS.keys()
    assert {name for names in ENDS.values() for name in names} <= LIMITED.keys()


def test_say_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    """The one way to write a line passes through the bounds."""
    for _ in range(100):
        log_event("spool_full", size=1)
    assert len(caplog.records) == 1
    log._last_reminders()
    assert vars(caplog.records[-1])["jobguard"]["suppressed"] == 98
