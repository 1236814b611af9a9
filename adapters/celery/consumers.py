"""Who takes tasks from a broker: the guarded workers, which say so, and the others.

Of a worker kombu writes down the name alone, in the table of the exchange by which it is controlled;
not its queues, and not that it is gone. So a stranger counts for every queue; and if there is one, the
exchange is asked how many hear it: as many as there are guarded workers means that it was a dead one's
name. What is sent to ask is a control command for a worker that does not exist.
"""

from __future__ import annotations

import base64
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from jobguard.adapters.celery.layout import Layout
from jobguard.adapters.celery.results import Results
from jobguard.client_list import Consumers, Listeners
from jobguard.redis_values import json_in

if TYPE_CHECKING:
    import redis

    from jobguard.adapter import Source

_SILENT = 15
"""Seconds after which a guarded worker that has said nothing does not count among those that hear."""
_REMEMBER = 120.0
"""Seconds for which its name is known to be a guarded worker's: Redis may have lost what it said."""
_ASK_AGAIN = 5.0
_POP = "brpop"
_QUIET = 3
"""Seconds after which a consumer that can take more has asked for it again: kombu asks each second."""
_PIDBOX = ".pidbox"
_CONTROL = "celery"


@dataclass(frozen=True, slots=True)
class Announced:
    """What a guarded worker says of itself."""

    name: str
    queues: tuple[str, ...]
    control: str = ""
    """The exchange by which it is controlled; "": it is not."""


class Workers:
    """The workers of one broker, as Redis knows them."""

    def __init__(self, client: redis.Redis, source: Source, layout: Layout, *, db: int) -> None:
        self._client: Any = client
        self._listeners = Listeners(client, source)
        self._layout = layout
        self._db = db
        self._names: dict[str, float] = {}  # of guarded workers: when they were last heard of
        self._results: tuple[Results, ...] = ()
        self._asked_at = float("-inf")
        self._hear = 0

    def consumers(self) -> Consumers:
        """Return who takes from which queue."""
        announced, heard = self._read()
        by_queue: dict[str, set[str]] = {}
        for worker in announced:
            for queue in worker.queues:
                by_queue.setdefault(queue, set()).add(worker.name)
        controls = {worker.control for worker in announced if worker.control} | {_CONTROL}
        strangers = {
            control: self._bound(control).difference(self._names) for control in sorted(controls)
        }
        alive: set[str] = set()
        for control, names in strangers.items():
            ours = sum(worker.control == control for worker in heard)
            if names and self._count(control) > ours:
                alive |= names
        return Consumers(
            {queue: frozenset(names) for queue, names in by_queue.items()},
            frozenset(alive) | self._unexplained(),
            self._listeners.refused,
        )

    def _unexplained(self) -> frozenset[str]:
        """Return the connections that take tasks and are not guarded.

        kombu takes by a connection that does nothing else, so that its last command is a BRPOP, also
        while the worker is busy. A program that asks workers for a reply does the same for a moment, and
        may leave the connection open. But a worker that fetches nothing has something unacknowledged.
        """
        bare = [
            client
            for client in self._listeners.look()
            if client.here and client.command == _POP and not client.ours
        ]
        quiet = [client for client in bare if not client.blocked and client.idle > _QUIET]
        if quiet and not self._client.exists(self._layout.unacked):
            bare = [client for client in bare if client not in quiet]
        return frozenset(client.text for client in bare)

    def results(self) -> tuple[Results, ...]:
        """Return where guarded workers keep their results, as last heard; hardly ever several places."""
        if not self._results:
            self._read()
        return self._results

    def _read(self) -> tuple[list[Announced], list[Announced]]:
        """Return the guarded workers that are known, and those of them that spoke a moment ago."""
        with self._client.pipeline(transaction=False) as pipe:
            pipe.time()
            pipe.zrange(self._layout.workers, 0, -1, withscores=True)
            pipe.hgetall(self._layout.about)
            (seconds, _), said, about = pipe.execute()
        known, heard = [], []
        for session, at in said:
            worker = _announced(about.get(session))
            if worker is None:
                continue
            known.append(worker)
            if int(seconds) - at <= _SILENT:
                heard.append(worker)
        found_results = (_results(field) for field in about)
        self._results = (
            tuple(found for found in found_results if found is not None) or self._results
        )
        now = time.monotonic()
        self._names.update((worker.name, now) for worker in known)
        self._names = {name: at for name, at in self._names.items() if now - at < _REMEMBER}
        return known, heard

    def _bound(self, control: str) -> set[str]:
        """Return the names of all workers that ever listened to this exchange, but those that left."""
        rows = self._client.smembers(self._layout.binding(control + _PIDBOX))
        queues = (row.decode(errors="replace").split(self._layout.sep)[-1] for row in rows)
        return {queue.removesuffix(f".{control}{_PIDBOX}") for queue in queues}

    def _count(self, control: str) -> int:
        """Return how many workers hear this exchange."""
        if time.monotonic() - self._asked_at >= _ASK_AGAIN:
            self._hear = self._client.publish(
                self._layout.fanout(control + _PIDBOX, self._db), _nobody(control)
            )
            self._asked_at = time.monotonic()
        return self._hear


def _announced(raw: bytes | None) -> Announced | None:
    try:
        fields = json_in(raw or b"")
        return Announced(
            str(fields["name"]),
            tuple(map(str, fields["queues"])),
            str(fields.get("control") or ""),
        )
    except (ValueError, KeyError, TypeError):
        return None


def _results(field: bytes) -> Results | None:
    name, _, fields = field.partition(b" ")
    try:
        return Results.from_fields(json_in(fields)) if name == b"results" else None
    except (ValueError, KeyError, TypeError, OverflowError):
        return None


def _nobody(control: str) -> str:
    """Return a control command for nobody, as kombu would send it."""
    command = {"method": "ping", "arguments": {}, "destination": ["nobody@jobguard"]}
    return json.dumps(
        {
            "body": base64.b64encode(json.dumps(command).encode()).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {"clock": 0},
            "properties": {
                "delivery_mode": 2,
                "delivery_info": {"exchange": control + _PIDBOX, "routing_key": ""},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": str(uuid4()),
            },
        }
    )
