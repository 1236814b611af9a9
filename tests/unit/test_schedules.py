"""What ``guard.schedules.add`` refuses before it asks the ledger."""

from __future__ import annotations

from datetime import date, datetime
from typing import Any, cast

import pytest

from jobguard.adapter import Adapter
from jobguard.errors import ConfigurationError
from jobguard.schedules import Schedules
from tests.fakes.world import NAMESPACE, SOURCE

HOURLY = {"every": 3600}


class Ledger:
    """Keeps what is added."""

    def __init__(self) -> None:
        self.added: list[dict[str, Any]] = []

    def add_schedule(self, _namespace: str, definition: dict[str, Any]) -> bool:
        """Keep the definition."""
        self.added.append(definition)
        return True


def schedules(ledger: Ledger) -> Schedules:
    """Return the schedules of a source."""
    return Schedules(
        lambda: cast(Any, ledger), NAMESPACE, SOURCE, cast(Adapter, None), register=lambda: None
    )


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"name": 5, **HOURLY}, "name .* is a text"),
        ({"cron": 5}, "cron .* is a text"),
        ({"every": True}, "every .* is a number of seconds or a timedelta"),
        ({"every": "60"}, "every .* is a number"),
        ({"every": float("inf")}, "every must be"),
        ({"timezone": None, **HOURLY}, "timezone .* is a text"),
        ({"start": "2026-01-01", **HOURLY}, "start .* is a datetime"),
        ({"end": date(2026, 1, 1), **HOURLY}, "end .* is a datetime"),
        ({"args": "ada@example.org", **HOURLY}, "args .* is a list"),
        ({"kwargs": {1: 2}, **HOURLY}, "names of kwargs are texts"),
        ({"catch_up": "some", **HOURLY}, "'one', 'all' or 'skip'"),
        ({"jitter": -1, **HOURLY}, "less than a day"),
        ({"jitter": 86400, **HOURLY}, "less than a day"),
        ({"jitter": float("nan"), **HOURLY}, "less than a day"),
        ({"rule": [1]}, "rule .* is a mapping"),
        ({"rule": {"minute": "0 30"}}, "separate several values by commas"),
        ({"max_attempts": 2.5, **HOURLY}, "max_attempts .* is a number"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_an_error_that_names_it(wrong: dict[str, Any], says: str) -> None:
    """It becomes neither an error of SQL nor a call with other arguments or at other times."""
    ledger = Ledger()
    with pytest.raises(ConfigurationError, match=says):
        schedules(ledger).add(**{"name": "s", "task": "app.task", "queue": "q", **wrong})
    assert ledger.added == []


def test_a_right_schedule_is_added() -> None:
    """Its times without a zone are in the zone of the schedule."""
    ledger = Ledger()
    at = datetime(2026, 1, 1)
    assert schedules(ledger).add(
        "s", "app.task", queue="q", rule={"minute": "0, 30"}, args=("a",), start=at, timezone="EST"
    )
    (added,) = ledger.added
    assert (added["args"], added["starts_at"].utcoffset().total_seconds()) == (["a"], -5 * 3600)
