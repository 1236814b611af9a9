"""Schedules of one guarded source, from code: ``guard.schedules``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args
from zoneinfo import ZoneInfo

from jobguard.adapter import Adapter, Source
from jobguard.errors import ConfigurationError
from jobguard.timing import Timing, cron_of

if TYPE_CHECKING:
    from jobguard.store.protocols import Ledger

CatchUp = Literal["one", "all", "skip"]

_DAY = 86400
_KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "name": ("a text", (str,)),
    "cron": ("a text", (str, NoneType)),
    "every": ("a number of seconds or a timedelta", (int, float, timedelta, NoneType)),
    "rule": ("a mapping", (Mapping, NoneType)),
    "queue": ("a text", (str, NoneType)),
    "args": ("a list", (list, tuple)),
    "kwargs": ("a mapping", (Mapping, NoneType)),
    "start": ("a datetime", (datetime, NoneType)),
    "end": ("a datetime", (datetime, NoneType)),
    "timezone": ("a text", (str,)),
    "catch_up": ("a text", (str,)),
    "jitter": ("a number of seconds or a timedelta", (int, float, timedelta)),
    "priority": ("a number", (int,)),
    "max_attempts": ("a number", (int, NoneType)),
}
"""What the arguments of a schedule are: a wrong one must not become an error of SQL, or other calls."""


class Schedules:
    """Add, list and change the schedules of a namespace. Every method may raise StoreUnavailable."""

    def __init__(
        self,
        ledger: Callable[[], Ledger],
        namespace: str,
        source: Source,
        adapter: Adapter,
        register: Callable[[], None],
    ) -> None:
        self._ledger = ledger
        self._namespace = namespace
        self._source = source
        self._adapter = adapter
        self._register = register

    def add(
        self,
        name: str,
        task: object,
        *,
        cron: str | None = None,
        every: float | timedelta | None = None,
        rule: Mapping[str, Any] | None = None,
        queue: str | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        start: datetime | None = None,
        end: datetime | None = None,
        timezone: str = "UTC",
        catch_up: CatchUp = "one",
        jitter: float | timedelta = 0.0,
        priority: int = 0,
        max_attempts: int | None = None,
    ) -> bool:
        """Add a schedule, or change the one of this name; return True if anything changed.

        The same call again changes nothing, so that every process of an application may make it.
        ``task``: a task of the library, or its name. ``every`` and ``jitter`` are seconds. ``start`` and
        ``end``: a time without a zone is in ``timezone``. ``catch_up`` decides about slots that were
        missed while no reconciler led: fire the last one, all of them, or none that is more than 30
        seconds late. ``args`` and ``kwargs`` must have a JSON form. Raises ConfigurationError.
        """
        _check(
            **{"name": name, "cron": cron, "every": every, "rule": rule, "queue": queue},
            **{"args": args, "kwargs": kwargs, "start": start, "end": end, "timezone": timezone},
            **{"catch_up": catch_up, "jitter": jitter, "priority": priority},
            max_attempts=max_attempts,
        )
        task_name, its_queue = (
            (task, None) if isinstance(task, str) else self._adapter.task_of(task)
        )
        queue = queue or its_queue
        if queue is None:
            raise ConfigurationError(f"name the queue of the schedule {name!r}")
        check_timing(
            cron=cron, every=_seconds(every), rule=rule, timezone=timezone, start=start, end=end
        )
        definition = {
            "name": name,
            "library": self._source.library,
            "source": str(self._source.id),
            "queue": queue,
            "task": task_name,
            "args": list(args),
            "kwargs": dict(kwargs or {}),
            "cron": cron,
            "every": _seconds(every),
            "rule": rule,
            "timezone": timezone,
            "starts_at": in_zone(start, timezone),
            "ends_at": in_zone(end, timezone),
            "catch_up": catch_up,
            "jitter": _seconds(jitter),
            "priority": priority,
            "max_attempts": max_attempts,
        }
        try:
            json.dumps([definition["args"], definition["kwargs"], rule], allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(
                f"the arguments of the schedule {name!r} have no JSON form: {error}"
            ) from None
        self._register()
        return self._ledger().add_schedule(self._namespace, definition)

    def list(self) -> Sequence[Mapping[str, Any]]:
        """Return the schedules of the namespace by name, with their state and their next slot."""
        return self._ledger().schedules(self._namespace)

    def remove(self, name: str) -> None:
        """Remove a schedule. Raises ConfigurationError if there is none of this name."""
        self._ledger().change_schedule(self._namespace, name, "remove")

    def pause(self, name: str) -> None:
        """Stop a schedule until it is resumed: slots in between are not made up for."""
        self._ledger().change_schedule(self._namespace, name, "pause")

    def resume(self, name: str) -> None:
        """Continue a schedule with its next slot."""
        self._ledger().change_schedule(self._namespace, name, "resume")

    def run_now(self, name: str) -> str:
        """Ask for one run now, beside the slots, and return the id of the job."""
        return str(self._ledger().change_schedule(self._namespace, name, "run"))


class NoSchedules:
    """The schedules of an inert guard: there are none, and none is added."""

    def add(self, name: str, task: object, **_: Any) -> bool:
        """Do nothing."""
        return False

    def list(self) -> Sequence[Mapping[str, Any]]:
        """Return nothing."""
        return []

    def remove(self, name: str) -> None:
        """Do nothing."""

    def pause(self, name: str) -> None:
        """Do nothing."""

    def resume(self, name: str) -> None:
        """Do nothing."""

    def run_now(self, name: str) -> str:
        """Do nothing."""
        return ""


def check_timing(
    *,
    cron: str | None,
    every: float | None,
    rule: Mapping[str, Any] | None,
    timezone: str,
    start: datetime | None,
    end: datetime | None,
) -> None:
    """Raise ConfigurationError if the leader could not plan a schedule with these times."""
    if sum(given is not None for given in (cron, every, rule)) != 1:
        raise ConfigurationError("a schedule has one of cron, every and rule")
    Timing(0.0, cron=cron_of(rule) if rule is not None else cron, every=every, timezone=timezone)
    begins, ends = in_zone(start, timezone), in_zone(end, timezone)
    if begins is not None and ends is not None and ends < begins:
        raise ConfigurationError("the end of a schedule must not be before its start")


def in_zone(at: datetime | None, timezone: str) -> datetime | None:
    """Return this time; one without a zone is in that time zone."""
    return at.replace(tzinfo=ZoneInfo(timezone)) if at is not None and at.tzinfo is None else at


def _check(**given: Any) -> None:
    for what, value in given.items():
        words, kinds = _KINDS[what]
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ConfigurationError(f"{what} of a schedule is {words}, not {value!r}")
    if given["catch_up"] not in get_args(CatchUp):
        raise ConfigurationError(f"catch_up is 'one', 'all' or 'skip', not {given['catch_up']!r}")
    if not all(isinstance(key, str) for key in given["kwargs"] or {}):
        raise ConfigurationError("the names of kwargs are texts")
    jitter = _seconds(given["jitter"])
    if jitter is None or not 0 <= jitter < _DAY:
        raise ConfigurationError(f"jitter is 0 or more, and less than a day, not {jitter} seconds")


def _seconds(given: float | timedelta | None) -> float | None:
    return given.total_seconds() if isinstance(given, timedelta) else given
