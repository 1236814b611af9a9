"""Tell a webhook or a command about incidents, holds and dead jobs.

A thread of its own reads the ledger while this process leads, so that no step of the leader waits. A
notice may come twice after a change of the leader; its ``id`` is the same. What cannot be delivered after
some tries is dropped, with a log line. The URL may hold a secret: only its host is ever logged.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import tenacity

from jobguard.errors import ConfigurationError, JobguardError
from jobguard.log import log_event
from jobguard.model import Outcome
from jobguard.redact import redact

if TYPE_CHECKING:
    from jobguard.operations.read import ReadModel

_EVERY: Final = 5.0
_BACK: Final = timedelta(seconds=60)
"""How far a new leader looks back, so that a change of the leader hides nothing."""
_AT_ONCE: Final = 20
"""Notices of one reading; the rest is one notice with their number."""
_DEADLINE: Final = 10.0
"""Seconds of one try."""
_TRIES: Final = 5
_TEXT: Final = 500


@dataclass(frozen=True, slots=True)
class Notice:
    """One event, as the receiver gets it in JSON."""

    event: str
    """incident, incident_over, hold, paused, dead, or more."""
    id: str
    namespace: str
    at: str
    text: str
    """A sentence; chat services show it."""
    detail: Mapping[str, Any]

    def body(self) -> bytes:
        """Return the JSON."""
        return json.dumps(asdict(self), default=str).encode()


Send = Callable[[Notice], None]
"""Delivers a notice. Raises an exception if that failed."""


def webhook(url: str) -> Send:
    """Return a function that posts to a URL. Raises ConfigurationError for another scheme than http."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        known = False
    if not known:
        raise ConfigurationError("the URL of the notices is no http:// or https:// URL")

    def send(notice: Notice) -> None:
        request = urllib.request.Request(
            url,
            data=notice.body(),
            headers={"Content-Type": "application/json", "User-Agent": "jobguard"},
        )
        with urllib.request.urlopen(request, timeout=_DEADLINE) as answer:
            answer.read(1)

    return send


def program(command: str) -> Send:
    """Return a function that runs a command, without a shell, with the notice as its standard input."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigurationError(f"the command of the notices cannot be read: {error}") from None
    if not words:
        raise ConfigurationError("the command of the notices is empty")

    def send(notice: Notice) -> None:
        subprocess.run(
            words,
            input=notice.body(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_DEADLINE,
            check=True,
        )

    return send


class Watcher:
    """Finds what is new in the ledger since it looked last."""

    def __init__(self, model: ReadModel, namespace: str) -> None:
        self._model = model
        self._namespace = namespace
        self._begin(datetime.now(UTC) - _BACK)

    def _begin(self, since: datetime) -> None:
        self._since = since
        self._dead_since = since
        self._open: set[int] = set()
        self._told: set[int] = set()
        self._held: set[str] = set()
        self._paused = False

    def rest(self) -> None:
        """Look back a little the next time: another process leads and tells meanwhile."""
        self._begin(datetime.now(UTC) - _BACK)

    def look(self) -> list[Notice]:
        """Return the notices since the last time, a bounded number. Raises StoreUnavailable."""
        # Read everything first: a failure between two questions must not lose what the first one found.
        happened = self._model.incidents(self._namespace, limit=100)
        brake = self._model.state(self._namespace)["brake"]
        dead = self._model.dead(
            self._namespace, outcomes=[Outcome.DEAD], queue=None, limit=_AT_ONCE + 1
        )
        found = [*self._incidents(happened), *self._brake(brake), *self._dead(dead)]
        if len(found) <= _AT_ONCE:
            return found
        left = len(found) - _AT_ONCE
        more = self._notice("more", f"more-{found[-1].id}", f"{left} more notices", {"count": left})
        return [*found[:_AT_ONCE], more]

    def _incidents(self, page: Sequence[Mapping[str, Any]]) -> Iterator[Notice]:
        self._told &= {row["id"] for row in page}
        self._open &= self._told
        for row in reversed(page):
            if row["kind"] != "incident":
                continue
            what = f"{row['cause']} at {row['address']}: {row['detail']}"
            detail = {name: row[name] for name in ("cause", "missing", "restored", "library")}
            first, older = row["id"] not in self._told, row["opened_at"] < self._since
            self._told.add(row["id"])
            if first and not older:
                yield self._notice("incident", f"incident-{row['id']}", what, detail)
            # An earlier leader may have reported an older incident: this one reports its end.
            if row["closed_at"] is None:
                self._open.add(row["id"])
            elif row["id"] in self._open or (first and older and row["closed_at"] >= self._since):
                self._open.discard(row["id"])
                over = f"over: {what} ({row['restored']} of {row['missing']} put back)"
                yield self._notice("incident_over", f"incident-over-{row['id']}", over, detail)

    def _brake(self, brake: Mapping[str, Any]) -> Iterator[Notice]:
        held: Mapping[str, Mapping[str, Any]] = brake["held"]
        for key in sorted(set(held) - self._held):
            _, _, queue = key.partition("/")
            name = "every queue" if queue == "*" else f"queue {queue}"
            text = f"{name} is held: {held[key].get('reason', '')}; `jobguard resume`"
            yield self._notice(
                "hold", f"hold-{key}-{held[key].get('since')}", text, {"queue": queue}
            )
        self._held = set(held)
        if brake["paused_at"] and not self._paused:
            text = "recoveries are paused; `jobguard resume`"
            yield self._notice("paused", f"paused-{brake['paused_at']}", text, {})
        self._paused = bool(brake["paused_at"])

    def _dead(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[Notice]:
        fresh = [row for row in rows if row["ended_at"] > self._dead_since]
        for row in reversed(fresh):
            self._dead_since = row["ended_at"]
            error = (row["errors"] or [""])[-1] or ""
            detail = {name: row[name] for name in ("job_id", "queue", "task", "crashes")}
            detail["error"] = redact(error)[:_TEXT]
            text = f"job {row['job_id']} ({row['task']}) of queue {row['queue']} is dead"
            yield self._notice("dead", f"dead-{row['token']}", text, detail)

    def _notice(self, event: str, id: str, text: str, detail: Mapping[str, Any]) -> Notice:
        return Notice(
            event,
            id,
            self._namespace,
            datetime.now(UTC).isoformat(),
            f"jobguard {self._namespace}: {redact(text)[:_TEXT]}",
            detail,
        )


class Notifier:
    """Watches and delivers, in a thread of its own, while this process leads."""

    def __init__(
        self,
        watcher: Watcher,
        receivers: Sequence[tuple[str, Send]],
        leads: Callable[[], bool],
        *,
        every: float = _EVERY,
        backoff: float = 1.0,
    ) -> None:
        """``receivers``: each with a name that may be logged."""
        self._watcher = watcher
        self._receivers = receivers
        self._leads = leads
        self._every = every
        self._backoff = backoff
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="jobguard-notify", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop, without waiting for a try that is under way."""
        self._stop.set()
        self._thread.join(1.0)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                if self._leads():
                    for notice in self._watcher.look():
                        self._deliver(notice)
                else:
                    self._watcher.rest()
            except JobguardError as error:
                log_event("notices_unread", error=str(error))
            except Exception as error:
                log_event("step_failed", part="notify", error=redact(str(error)), exc_info=True)
            self._stop.wait(self._every)

    def _sleep(self, seconds: float) -> None:
        self._stop.wait(seconds)

    def _deliver(self, notice: Notice) -> None:
        for name, send in self._receivers:
            retrying = tenacity.Retrying(
                stop=tenacity.stop_after_attempt(_TRIES) | tenacity.stop_when_event_set(self._stop),
                wait=tenacity.wait_random_exponential(multiplier=self._backoff, max=30.0),
                sleep=self._sleep,
                reraise=True,
            )
            try:
                retrying(send, notice)
            except Exception as error:
                # Its text may have the URL or the arguments of the command.
                log_event("notice_lost", receiver=name, id=notice.id, error=type(error).__name__)


def receivers(url: str | None, command: str | None) -> list[tuple[str, Send]]:
    """Return what was configured. Raises ConfigurationError."""
    found: list[tuple[str, Send]] = []
    if url:
        send = webhook(url)
        found.append((f"webhook at {urlsplit(url).hostname}", send))
    if command:
        send = program(command)
        found.append((f"command {shlex.split(command)[0]}", send))
    return found
