from __future__ import annotations

import os
import threading
from typing import Any

import pytest

from jobguard import log
from jobguard.log import EVENTS, log_event
from jobguard.log_bounds import CHANGE, ENDS, LIMITED, REMIND, LineBounds
from tests.fakes.world import Clock


@pytest.fixture
def clock() -> Clock:
    """Return a clock that the test moves."""
    return Clock()


@pytest.fixture
def bounds(clock: Clock) -> LineBounds:
    """Return a separate table for each test."""
    return LineBounds(clock)


def written(bounds: LineBounds, event: str, **fields: Any) -> list[tuple[str, Any]]:
    """Log this; return the events that are written now, each with its suppressed count."""
    return [(name, given.get("suppressed")) for name, given, _ in bounds.passes(event, fields)]


def test_a_repeated_event_is_one_line_and_a_reminder_a_minute(
    bounds: LineBounds, clock: Clock
) -> None:
    """50,000 equal events of one outage make one line a minute, with their count."""
    assert written(bounds, "spool_full", size=1) == [("spool_full", None)]
    for _ in range(50_000):
        assert written(bounds, "spool_full", size=1) == []
    clock.advance(REMIND)
    assert written(bounds, "spool_full", size=1) == [("spool_full", 49_999)]
    assert written(bounds, "spool_full", size=1) == []


def test_a_reminder_needs_no_further_event(bounds: LineBounds, clock: Clock) -> None:
    """A loop, or the end of the process, writes the last suppressed event."""
    written(bounds, "record_lost", error="a")
    written(bounds, "record_lost", error="a")
    assert bounds.due() == []
    clock.advance(REMIND)
    assert [event for event, _, _ in bounds.due()] == ["record_lost"]
    written(bounds, "record_lost", error="a")
    assert [event for event, _, _ in bounds.rest()] == ["record_lost"]
    assert bounds.rest() == []


def test_another_error_is_another_line(bounds: LineBounds) -> None:
    """A changed error is written; other numbers, ids and quoted names in it are no change."""
    assert written(bounds, "postgres_away", error="timeout after 251 ms")
    assert not written(bounds, "postgres_away", error="timeout after 270 ms")
    assert written(bounds, "postgres_away", error="connection refused")


def test_errors_of_many_shapes_are_bounded(bounds: LineBounds) -> None:
    """Errors with a random word in their text make at most five lines."""
    shapes = ["".join(chr(97 + (n >> i & 1)) for i in range(12)) for n in range(1000)]
    lines = [line for shape in shapes for line in written(bounds, "guest_failed", error=shape)]
    assert len(lines) <= 5


def test_the_end_of_a_state_has_the_suppressed_counts(bounds: LineBounds, clock: Clock) -> None:
    """The line that Postgres is back has the counts; the next outage is a change again."""
    written(bounds, "postgres_away")
    for _ in range(400):
        written(bounds, "start_unclaimed", error="BreakerOpen")
    clock.advance(20)
    assert written(bounds, "postgres_back") == [("postgres_back", {"start_unclaimed": 399})]
    clock.advance(CHANGE)
    assert written(bounds, "postgres_away") == [("postgres_away", None)]
    assert written(bounds, "start_unclaimed", error="BreakerOpen") == [("start_unclaimed", None)]


def test_a_state_that_flaps_is_a_line_in_ten_seconds(bounds: LineBounds, clock: Clock) -> None:
    """A circuit that opens and closes every second does not write two lines every second."""
    lines: list[Any] = []
    for _ in range(60):
        lines += written(bounds, "postgres_away")
        clock.advance(0.5)
        lines += written(bounds, "postgres_back")
        clock.advance(0.5)
    assert 4 <= len(lines) <= 24


def test_the_last_state_is_always_written(bounds: LineBounds, clock: Clock) -> None:
    """A suppressed change is written as soon as it is due; an outdated change is never written."""
    for _ in range(3):
        written(bounds, "postgres_away")
        written(bounds, "postgres_back")
    assert written(bounds, "postgres_away") == []
    clock.advance(CHANGE)
    assert [event for event, _, _ in bounds.due()] == ["postgres_away"]
    written(bounds, "postgres_back")
    written(bounds, "postgres_back")  # suppressed
    written(bounds, "postgres_away")
    clock.advance(REMIND)
    assert "postgres_back" not in [event for event, _, _ in bounds.due()]


def test_sources_are_distinguished(bounds: LineBounds) -> None:
    """An event of one Redis does not suppress the same event of another Redis."""
    assert written(bounds, "redis_away", source="a")
    assert written(bounds, "redis_away", source="b")
    assert not written(bounds, "redis_away", source="a")
    assert written(bounds, "redis_back", source="a")
    assert not written(bounds, "redis_away", source="b")


def test_the_table_is_bounded(bounds: LineBounds) -> None:
    """With more keys than slots in the table, every first event is still written."""
    for n in range(10_000):
        assert written(bounds, "redis_away", source=f"redis-{n}")


def test_children_share_what_was_written(bounds: LineBounds) -> None:
    """A forked child does not repeat a line of its parent, and the parent has the child's count."""
    written(bounds, "start_unclaimed", error="a")
    child = os.fork()
    if child == 0:
        bounds.after_fork()
        os._exit(0 if written(bounds, "start_unclaimed", error="a") == [] else 1)
    assert os.waitpid(child, 0)[1] == 0
    bounds._clock.advance(REMIND)  # type: ignore[attr-defined]
    assert written(bounds, "start_unclaimed", error="a") == [("start_unclaimed", 1)]


def test_threads_lose_no_count(bounds: LineBounds, clock: Clock) -> None:
    """Of 8 times 500 events at once, one is written. The reminder counts the others except itself."""
    lines: list[Any] = []

    def work() -> None:
        for _ in range(500):
            lines.extend(written(bounds, "spool_full"))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lines) == 1
    clock.advance(REMIND)
    assert written(bounds, "spool_full") == [("spool_full", 3998)]


def test_a_locked_table_costs_no_line(bounds: LineBounds) -> None:
    """A signal handler that interrupts this code writes its line after a short wait."""
    with bounds._lock:
        assert written(bounds, "spool_full") == [("spool_full", None)]
        assert written(bounds, "spool_full") == [("spool_full", None)]


def test_a_suppressed_line_keeps_no_stack(bounds: LineBounds) -> None:
    """A suppressed line has neither an exception nor its traceback."""
    for _ in range(2):
        bounds.passes(
            "guest_failed", {"where": "x", "error": ValueError("boom")}, ValueError("boom")
        )
    ((_, fields, exc_info),) = bounds.rest()
    assert (fields["error"], exc_info) == ("ValueError: boom", None)


def test_every_bounded_event_exists() -> None:
    """The bounds name only events of the table."""
    assert LIMITED.keys() | ENDS.keys() <= EVENTS.keys()
    assert {name for names in ENDS.values() for name in names} <= LIMITED.keys()


def test_log_event_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    """The lines of log_event() pass through the bounds."""
    for _ in range(100):
        log_event("spool_full", size=1)
    assert len(caplog.records) == 1
    log._last_reminders()
    assert vars(caplog.records[-1])["jobguard"]["suppressed"] == 98
