from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from jobguard.errors import ConfigurationError
from jobguard.timing import Timing, cron_of, jitter_of

BERLIN = ZoneInfo("Europe/Berlin")


def at(text: str, zone: ZoneInfo = BERLIN, *, fold: int = 0) -> float:
    """Return a local time in seconds since the epoch."""
    return datetime.fromisoformat(text).replace(tzinfo=zone, fold=fold).timestamp()


def slots(timing: Timing, begin: float, end: float) -> list[float]:
    """Return the slots between two times."""

    def each() -> Iterator[float]:
        slot = timing.after(begin)
        while slot is not None and slot <= end:
            yield slot
            slot = timing.after(slot)

    return list(each())


def test_a_slot_in_the_skipped_hour_comes_right_after_it() -> None:
    """In spring, 02:30 does not exist: the slot of that day is at 03:00."""
    timing = Timing(0.0, cron="30 2 * * *", timezone="Europe/Berlin")
    assert slots(timing, at("2026-03-28T12:00"), at("2026-03-30T12:00")) == [
        at("2026-03-29T03:00"),
        at("2026-03-30T02:30"),
    ]


def test_a_slot_in_the_repeated_hour_comes_once() -> None:
    """In autumn, 02:30 comes twice: the slot of that day is the first one."""
    timing = Timing(0.0, cron="30 2 * * *", timezone="Europe/Berlin")
    assert slots(timing, at("2026-10-24T12:00"), at("2026-10-26T12:00")) == [
        at("2026-10-25T02:30"),
        at("2026-10-26T02:30"),
    ]


@pytest.mark.parametrize("day", ["2026-03-29", "2026-10-25"])
def test_an_hourly_schedule_follows_the_real_hours(day: str) -> None:
    """Every hour means every 3600 seconds, also where the clocks change."""
    begin = at(f"{day}T00:00")
    timing = Timing(0.0, cron="@hourly", timezone="Europe/Berlin")
    assert slots(timing, begin, begin + 5 * 3600) == [begin + 3600 * n for n in range(1, 6)]


def test_an_interval_is_counted_from_its_start() -> None:
    """The slots of an interval are a grid; the start itself is the first one."""
    assert Timing(100.0, every=60).after(100.0) == 160.0
    assert Timing(100.0, every=60).after(1000.0) == 1060.0
    begun = Timing(100.0, every=60, start=500.0)
    assert (begun.after(0.0), begun.after(500.0)) == (500.0, 560.0)


def test_nothing_is_due_before_the_start_or_after_the_end() -> None:
    """Slots before the start and after the end do not exist; a slot at the start or the end does."""
    midnight = Timing(0.0, cron="0 0 * * *", start=at("2026-01-02", UTC), end=at("2026-01-03", UTC))  # type: ignore[arg-type]
    assert slots(midnight, 0.0, 2e9) == [midnight.start, midnight.end]


def test_missed_slots_are_listed_up_to_a_bound_and_the_newest_is_known() -> None:
    """After a year without a leader, the newest slot is found without all the slots between."""
    now = at("2027-01-01T00:00:30", UTC)  # type: ignore[arg-type]
    for timing in (Timing(0.0, cron="* * * * *"), Timing(0.0, every=60)):
        first = timing.after(now - 365 * 86400)
        assert first is not None
        due = timing.due(first, now)
        assert (len(due.slots), due.newest) == (1000, now - 30)
    few = Timing(0.0, every=60).due(now - 150, now)
    assert (few.slots, few.newest) == ([now - 150, now - 90, now - 30], now - 30)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"cron": "61 * * * *"}, "Bad minute"),
        ({"cron": "every day"}, "Wrong number of fields"),
        ({"cron": "* * * * *", "timezone": "Europe/Berlln"}, "Europe/Berlln"),
        ({"cron": "* * * * *", "timezone": "../../etc/passwd"}, "time zone"),
        ({"every": 0.5}, "1 second or more"),
        ({"every": float("nan")}, "1 second or more"),
        ({}, "one of cron, every and rule"),
        ({"every": 1.0, "cron": "* * * * *"}, "one of cron, every and rule"),
        ({"every": 1.0, "start": 2.0, "end": 1.0}, "before its start"),
    ],
)
def test_a_wrong_time_is_an_error_that_says_what_is_wrong(
    wrong: dict[str, object], says: str
) -> None:
    """A schedule that cannot be planned is refused."""
    with pytest.raises(ConfigurationError, match=says):
        Timing(0.0, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rule", "cron"),
    [
        ({"minute": [0, 30]}, "0,30 * * * *"),
        ({"hour": 9}, "0 9 * * *"),
        ({"hour": "9-17", "minute": "*/10"}, "*/10 9-17 * * *"),
        ({"weekday": ["MON", 5]}, "0 0 * * MON,5"),
        ({"day": 1}, "0 0 1 * *"),
        ({"month": 5}, "0 0 1 5 *"),
        ({"month": 5, "weekday": 1}, "0 0 * 5 1"),
        ({"second": [0, 30]}, "0,30 * * * * *"),
        ({"minute": " 0, 30 ", "hour": "9 - 17"}, "0,30 9-17 * * *"),
    ],
)
def test_a_rule_is_a_cron_expression(rule: dict[str, object], cron: str) -> None:
    """A field that is absent is free if it is coarser, and has its first value if it is finer."""
    assert cron_of(rule) == cron
    Timing(0.0, cron=cron)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"minutes": 1},
        {"minute": []},
        {"minute": 1.5},
        {"minute": "0 30"},
        {"day": 1, "weekday": 1},
    ],
)
def test_a_wrong_rule_is_an_error(wrong: dict[str, object]) -> None:
    """A rule with an unknown field or a value that is no number or text is refused."""
    with pytest.raises(ConfigurationError):
        cron_of(wrong)


def test_every_leader_gives_a_slot_the_same_jitter() -> None:
    """The jitter of a slot is within its bound, the same each time, and different for other slots."""
    drawn = [jitter_of("default/report", slot, 60.0) for slot in range(100)]
    assert drawn == [jitter_of("default/report", slot, 60.0) for slot in range(100)]
    assert 0 <= jitter_of("half a pair: \ud800", 1.0, 60.0) < 60
    assert 0 <= min(drawn) < max(drawn) < 60 and len(set(drawn)) == 100


def test_a_year_has_exactly_the_expected_slots() -> None:
    """Counted hour by hour through a year with two changes of the clocks."""
    timing = Timing(0.0, cron="15 */6 * * *", timezone="America/New_York")
    zone = ZoneInfo("America/New_York")
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    hours = (begin + timedelta(hours=n, minutes=15) for n in range(365 * 24))
    local = [(hour, hour.astimezone(zone)) for hour in hours]
    expected = [hour.timestamp() for hour, there in local if there.hour % 6 == 0]
    assert slots(timing, begin.timestamp() - 1, begin.timestamp() + 365 * 86400 - 1) == expected
