"""When a schedule is due: a cron expression or an interval, between a start and an end.

A *slot* is one moment at which a schedule is due, in seconds since the epoch. This module has no clock:
the leader gives it the time of the database. Cron expressions are read in the time zone of the schedule.
At a change of the clocks they follow Debian's cron: a slot in the skipped hour comes right after it, and a
slot in the repeated hour comes once, unless the expression says every hour or every minute.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from string import whitespace
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from jobguard.errors import ConfigurationError

LEAST_INTERVAL = 1.0
"""Seconds: the smallest interval of a schedule."""
_MOST = 1_000
"""Missed slots that are computed one by one."""
_BACK = timedelta(hours=3)
"""Longer than any change of the clocks."""
_ALIASES = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
_FIELDS = ("second", "minute", "hour", "day", "month", "weekday")
_AROUND = re.compile(r"\s*([,/-])\s*")
_LEAST = {"second": "0", "minute": "0", "hour": "0", "day": "1", "month": "1"}


@dataclass(frozen=True, slots=True)
class Due:
    """The slots of a schedule that have come."""

    slots: list[float]
    """The oldest first, at most 1,000."""
    newest: float | None
    """The newest one, also if it is not in the list."""


@dataclass(frozen=True, slots=True)
class Timing:
    """The slots of one schedule. Raises ConfigurationError if they cannot be computed."""

    anchor: float
    """The slots of an interval are counted from here, in seconds since the epoch."""
    cron: str | None = None
    every: float | None = None
    timezone: str = "UTC"
    start: float | None = None
    end: float | None = None

    def __post_init__(self) -> None:
        self._zone()
        if (self.cron is None) == (self.every is None):
            raise ConfigurationError("a schedule has one of cron, every and rule")
        if self.every is not None and not LEAST_INTERVAL <= self.every < math.inf:
            raise ConfigurationError(
                f"every must be {LEAST_INTERVAL:.0f} second or more, not {self.every:g}"
            )
        if self.start is not None and self.end is not None and self.end < self.start:
            raise ConfigurationError("the end of a schedule must not be before its start")
        if self.cron is not None:
            self._search(datetime.fromtimestamp(0.0, UTC))

    def after(self, at: float) -> float | None:
        """Return the first slot after this time; None: there is no further one."""
        if self.start is not None:
            at = max(at, self.start - 0.001)  # a slot at the start counts
        if self.every is not None:
            base = self.anchor if self.start is None else self.start
            slot = base + max(0, math.floor((at - base) / self.every) + 1) * self.every
            while slot <= at:  # the division was rounded
                slot += self.every
        else:
            found = next((slot for slot in self._iterate(at) if slot > at), None)
            if found is None:
                return None
            slot = found
        return None if self.end is not None and slot > self.end else slot

    def due(self, first: float, now: float) -> Due:
        """Return the slots from ``first``, which is a slot, to ``now``."""
        slots: list[float] = []
        slot: float | None = first
        while slot is not None and slot <= now and len(slots) < _MOST:
            slots.append(slot)
            slot = self.after(slot)
        complete = slot is None or slot > now
        newest = (slots[-1] if slots else None) if complete else self._newest(slots[-1], now)
        return Due(slots, newest)

    def _newest(self, known: float, now: float) -> float:
        if self.end is not None:
            now = min(now, self.end)
        if self.every is not None:
            return known + math.floor((now - known) / self.every) * self.every
        # A search backwards begins close to the newest slot, and the search forwards decides.
        at = datetime.fromtimestamp(math.floor(now) + 1, UTC).astimezone(self._zone())
        back = next(self._search(at, reverse=True), None)
        slot: float | None = known
        if back is not None:
            slot = self.after(max(known, (back - _BACK).timestamp()))
        while slot is not None and slot <= now:
            known, slot = slot, self.after(slot)
        return known

    def _iterate(self, at: float) -> Iterator[float]:
        zone = self._zone()
        for found in self._search(datetime.fromtimestamp(at, UTC).astimezone(zone)):
            yield found.timestamp()

    def _search(self, at: datetime, *, reverse: bool = False) -> Iterator[datetime]:
        from cronsim import CronSim, CronSimError

        cron = self.cron or ""
        try:
            return CronSim(_ALIASES.get(cron.strip().lower(), cron), at, reverse=reverse)
        except CronSimError as error:
            raise ConfigurationError(f"the cron expression {cron!r} is wrong: {error}") from None

    def _zone(self) -> tzinfo:
        try:
            return ZoneInfo(self.timezone)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ConfigurationError(f"no time zone {self.timezone!r} is known") from None


def cron_of(rule: Mapping[str, Any]) -> str:
    """Return the cron expression of a rule: a mapping of fields to a number, a text, or a list of them.

    The fields are second, minute, hour, day, month and weekday (0 is Sunday). A field that is absent and
    finer than the others has its first value; one that is coarser is free. Raises ConfigurationError.
    """
    unknown = set(rule) - set(_FIELDS)
    if unknown or not rule:
        wrong = ", ".join(sorted(map(str, unknown))) or "none"
        raise ConfigurationError(f"a rule has the fields {', '.join(_FIELDS)}, not {wrong}")
    if "day" in rule and "weekday" in rule:
        raise ConfigurationError(
            "a rule has a day or a weekday: for both, add two schedules, or give a cron expression"
        )
    finest = next(nth for nth, name in enumerate(_FIELDS) if name in rule)
    fields = [
        _field(name, rule[name]) if name in rule else _LEAST.get(name, "*") if nth < finest else "*"
        for nth, name in enumerate(_FIELDS)
    ]
    if "weekday" in rule:
        fields[_FIELDS.index("day")] = "*"
        if finest > _FIELDS.index("month"):
            fields[_FIELDS.index("month")] = "*"
    return " ".join(fields if "second" in rule else fields[1:])


def _field(name: str, value: Any) -> str:
    several = value if isinstance(value, list | tuple | set | frozenset) else [value]
    if not several or any(isinstance(v, bool) or not isinstance(v, int | str) for v in several):
        raise ConfigurationError(
            f"the field {name} of a rule is a number, a text, or a list of them, not {value!r}"
        )
    texts = [_AROUND.sub(r"\1", str(v).strip()) for v in several]
    if any(set(text) & set(whitespace) for text in texts):
        raise ConfigurationError(
            f"the field {name} of a rule is {value!r}: separate several values by commas, or give a list"
        )
    return ",".join(texts)


def jitter_of(schedule: str, slot: float, most: float) -> float:
    """Return the delay of a slot, in seconds: random, but the same for every leader."""
    digest = hashlib.sha256(f"{schedule}\x00{slot!r}".encode(errors="surrogatepass")).digest()
    return most * int.from_bytes(digest[:4]) / (1 << 32)
