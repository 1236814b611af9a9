"""Bounds on the lines of one event: one line at a change, a count, and a reminder every minute.

An event that is listed in ``LIMITED`` is logged once for each key. The key is the event, the listed fields
and the shape of its error. For a minute after that line, further events with the same key are only counted.
The next line of the key has the count in the field ``suppressed``. An event that is listed in ``ENDS``
means that the states of other events are over: it shows their counts, and the next of these events is a
change again.

The table is in memory that forked children share, so that a hundred children write one line and not a
hundred. The table has a fixed size. If two processes write at the same time, counts may be wrong by a few.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jobguard import os_threads

REMIND = 60.0
"""Seconds between two lines of one key."""
CHANGE = 10.0
"""Seconds between two lines of one key if its state ended in between and the state flaps."""
_FREE = 3
"""A state flaps if it began this many times within three times CHANGE."""

LIMITED: Mapping[str, tuple[str, ...]] = {
    "postgres_away": (),
    "not_migrated": (),
    "no_rights": (),
    "wrong_installation": (),
    "redis_away": ("source",),
    "redis_refuses": ("source",),
    "redis_evicted": ("source",),
    "value_unreadable": ("source", "key"),
    "guest_failed": ("where",),
    "settings_differ": ("source",),
    "record_spooled": (),
    "record_lost": (),
    "record_skipped": (),
    "row_refused": (),
    "envelopes_sealed": (),
    "keys_unreadable": (),
    "spool_full": (),
    "spool_replayed": (),
    "stream_drained": ("source",),
    "stream_refused": (),
    "stream_full": (),
    "stream_left": ("source",),
    "not_written": ("what",),
    "start_skipped": ("reason", "outcome"),
    "job_skipped": ("reason",),
    "task_skipped": ("reason",),
    "start_unclaimed": (),
    "start_unfenced": ("reason",),
    "claim_lost": ("reason",),
    "job_declined": (),
    "push_left": ("source",),
    "hook_failed": ("hook",),
    "hook_slow": ("hook",),
    "nobody_leads": (),
    "beat_unheard": ("store",),
    "source_differs": ("source",),
    "pulse_elsewhere": ("source",),
    "redis_recognized": ("redis",),
    "redis_unrecognized": ("redis",),
    "end_late": ("outcome",),
    "lease_unrenewed": (),
    "leader_lost": (),
    "step_failed": ("part",),
    "step_stuck": ("source",),
    "queue_untrusted": ("source", "queue"),
    "verifying": ("source", "cause"),
    "restore_failed": (),
    "job_not_restored": ("answer",),
    "would_restore": (),
    "postgres_back": (),
    "redis_back": ("source",),
    "redis_accepts": ("source",),
}
"""Events that can be repeated many times, and the fields that distinguish two states of one event."""

ENDS: Mapping[str, tuple[str, ...]] = {
    "postgres_back": (
        "postgres_away",
        "not_migrated",
        "no_rights",
        "record_spooled",
        "record_skipped",
        "start_unclaimed",
        "lease_unrenewed",
    ),
    "spool_replayed": ("spool_full",),
    "redis_back": ("redis_away",),
    "redis_accepts": ("redis_refuses",),
    "envelopes_unsealed": ("envelopes_sealed",),
}
"""Events that mean that the states of other events are over."""

_ENDED_BY: Mapping[str, str] = {name: end for end, names in ENDS.items() for name in names}
_SLOTS = 256
_SLOT = struct.Struct("=QQddQdQ")
_PROBES = 8
_SHAPES = 4
"""Number of error shapes in one scope that get a key of their own; the other shapes share one key."""
_LOCK_TIMEOUT = 0.1
_VARIES = re.compile(r"0x[0-9a-f]+|[0-9a-f]{8}[0-9a-f-]*|\d+|'[^']*'|\"[^\"]*\"", re.IGNORECASE)


class Slot(NamedTuple):
    """The state of one key."""

    key: int = 0
    scope: int = 0
    written_at: float = 0.0
    """Time of the last written line."""
    until: float = -1.0
    """Events before this time are only counted."""
    suppressed: int = 0
    """Number of events that were only counted."""
    since: float = float("-inf")
    lines: int = 0
    """Number of lines written since ``since``."""

    def written(self, now: float, silence: float) -> Slot:
        """Return the state after a line was written."""
        fresh = now - self.since >= _FREE * CHANGE
        since, lines = (now, 1) if fresh else (self.since, self.lines + 1)
        return self._replace(
            written_at=now, until=now + silence, suppressed=0, since=since, lines=lines
        )

    def ended(self) -> Slot:
        """Return the state after an event of ``ENDS``: the next line is a change."""
        free = self.written_at if self.lines < _FREE else self.written_at + CHANGE
        return self._replace(until=min(self.until, free), suppressed=0)


Line = tuple[str, dict[str, Any], Any]
"""An event, its fields and its exc_info."""


class LineBounds:
    """The table that decides which lines are written."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._table = mmap.mmap(-1, _SLOTS * _SLOT.size)
        self._lock = os_threads.lock()
        self._waiting: dict[
            int, tuple[int, Line]
        ] = {}  # the last suppressed line by key, and its scope

    def after_fork(self) -> None:
        """Forget the suppressed lines in a child: the parent writes them."""
        self._lock = os_threads.lock()
        self._waiting = {}

    def reset(self) -> None:
        """Forget everything, for tests."""
        self._table[:] = bytes(len(self._table))
        self._waiting = {}

    def passes(self, event: str, fields: dict[str, Any], exc_info: Any = None) -> list[Line]:
        """Return the lines to write now: this one if it is no repetition, and reminders that are due."""
        line = (event, fields, exc_info)
        # A signal handler may interrupt this code. Therefore the wait for the lock is bounded.
        if not self._lock.acquire(True, _LOCK_TIMEOUT):
            return [line]
        try:
            return self._passes(line)
        finally:
            self._lock.release()

    def _passes(self, line: Line) -> list[Line]:
        event, fields, exc_info = line
        now = self._clock()
        lines = self._due(now)
        fields = fields | self._end(event, fields)
        if event not in LIMITED:
            lines.append((event, fields, exc_info))
            return lines
        scope = _scope(event, fields)
        # The opposite state has begun, so that its suppressed line would be false now.
        if event in _ENDED_BY:
            self._drop(_scope(_ENDED_BY[event], fields))
        key = self._key(scope, fields, now)
        at, slot = self._slot(key)
        if now < slot.until:
            self._write(at, slot._replace(suppressed=slot.suppressed + 1))
            self._waiting[key] = (scope, (event, _without_exceptions(fields), None))
            return lines
        self._waiting.pop(key, None)
        now_written = slot._replace(key=key, scope=scope).written(now, REMIND)
        self._write(at, now_written.ended() if event in ENDS else now_written)
        lines.append(_counted((event, fields, exc_info), slot.suppressed))
        return lines

    def due(self) -> list[Line]:
        """Return the suppressed lines that are due now."""
        return self._reminders(self._clock()) if self._waiting else []

    def rest(self) -> list[Line]:
        """Return every suppressed line: this process ends."""
        return self._reminders(float("inf"))

    def _reminders(self, now: float) -> list[Line]:
        if not self._lock.acquire(True, _LOCK_TIMEOUT):
            return []
        try:
            return self._due(now)
        finally:
            self._lock.release()

    def _due(self, now: float) -> list[Line]:
        lines: list[Line] = []
        for key, (_, line) in list(self._waiting.items()):
            at, slot = self._slot(key)
            if now < slot.until:
                continue
            del self._waiting[key]
            if slot.suppressed:
                self._write(at, slot.written(self._clock(), REMIND))
                lines.append(_counted(line, slot.suppressed - 1))
        return lines

    def _end(self, event: str, fields: dict[str, Any]) -> dict[str, Any]:
        """End the states that this event ends, and return the number of suppressed lines of each."""
        over: dict[str, int] = {}
        for name in ENDS.get(event, ()):
            scope = _scope(name, fields)
            for at, slot in self._rows():
                if slot.key and slot.scope == scope:
                    over[name] = over.get(name, 0) + slot.suppressed
                    self._write(at, slot.ended())
            self._drop(scope)
        counts = {name: count for name, count in over.items() if count}
        return {"suppressed": counts} if counts else {}

    def _drop(self, scope: int) -> None:
        for key in [key for key, (there, _) in self._waiting.items() if there == scope]:
            del self._waiting[key]

    def _key(self, scope: int, fields: Mapping[str, Any], now: float) -> int:
        error = fields.get("error")
        if error is None:
            return scope
        shape = _VARIES.sub("#", str(error))[:100]
        key = hash((scope, shape)) & 0xFFFF_FFFF_FFFF_FFFF or 1
        _, slot = self._slot(key)
        if slot.key == key and slot.scope == scope and now < slot.until:
            return key  # Found without a walk over the table: each start in an outage comes here.
        same = {slot.key for _, slot in self._rows() if slot.scope == scope and now < slot.until}
        return key if len(same) < _SHAPES else scope

    def _slot(self, key: int) -> tuple[int, Slot]:
        """Return the slot of this key, a free slot, or the slot with the earliest ``until``."""
        best, best_until = key % _SLOTS, float("inf")
        for nth in range(_PROBES):
            at = (key + nth) % _SLOTS
            slot = Slot._make(_SLOT.unpack_from(self._table, at * _SLOT.size))
            if slot.key == key:
                return at, slot
            until = slot.until if slot.key else float("-inf")
            if until < best_until:
                best, best_until = at, until
        return best, Slot()

    def _rows(self) -> list[tuple[int, Slot]]:
        rows = _SLOT.iter_unpack(self._table[:])
        return [(at, Slot._make(row)) for at, row in enumerate(rows)]

    def _write(self, at: int, slot: Slot) -> None:
        _SLOT.pack_into(self._table, at * _SLOT.size, *slot)


def _scope(event: str, fields: Mapping[str, Any]) -> int:
    names = LIMITED.get(event, ())
    return (
        hash((event, *(str(fields.get(name, "")) for name in names))) & 0xFFFF_FFFF_FFFF_FFFF or 1
    )


def _without_exceptions(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return these fields with exceptions as text, because an exception keeps its whole stack alive."""
    return {
        name: f"{type(value).__name__}: {value}" if isinstance(value, BaseException) else value
        for name, value in fields.items()
    }


def _counted(line: Line, suppressed: int) -> Line:
    event, fields, exc_info = line
    if not suppressed:
        return line
    others = fields.get("suppressed")
    count = {**others, event: suppressed} if isinstance(others, dict) else suppressed
    return event, {**fields, "suppressed": count}, exc_info


LINE_BOUNDS = LineBounds()
os.register_at_fork(after_in_child=LINE_BOUNDS.after_fork)
