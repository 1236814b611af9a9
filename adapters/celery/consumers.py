"""Find out who takes tasks from a broker: the guarded workers, which announce themselves, and others.

kombu stores only the name of a worker, in the table of the exchange that controls the worker. It
stores neither the worker's queues nor its end. So an unknown worker counts for every queue. If
there is one, the leader asks the exchange how many workers listen to it. If that number equals the
number of guarded workers, the unknown name belongs to a dead worker. The request is a control
command for a worker that does not exist.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from jobguard.adapters.celery.envelope import holder_in
from jobguard.adapters.celery.layout import Layout
from jobguard.adapters.celery.results import Results
from jobguard.client_list import Consumers, Listeners
from jobguard.redis_values import json_in

if TYPE_CHECKING:
    import redis

    from jobguard.adapter import Source

_SILENT = 15
"""Seconds without an announcement after which a guarded worker does not count as a listener."""
_REMEMBER = 120.0
"""Seconds for which the name of a guarded worker is remembered: Redis may have lost its announcement."""
_ASK_AGAIN = 5.0
_POP = "brpop"
_MOST_UNACKED = 2_000
"""Unacknowledged messages that are read to find one of an unguarded worker."""
_LASTING = 10.0
"""Seconds for which a connection may take without a rest, and still be one that waits for replies."""
_QUIET = 3
"""Seconds after which an idle consumer counts as quiet: kombu sends its BRPOP each second."""
_PIDBOX = ".pidbox"
_CONTROL = "celery"


@dataclass(frozen=True, slots=True)
class Announced:
    """The announcement of a guarded worker."""

    name: str
    queues: tuple[str, ...]
    session: str = ""
    """The id in hex of its session, which other workers of its process share."""
    control: str = ""
    """The exchange that controls the worker; "" if it has none."""


class Workers:
    """The workers of one broker, as Redis shows them."""

    def __init__(self, client: redis.Redis, source: Source, layout: Layout, *, db: int) -> None:
        self._client: Any = client
        self._listeners = Listeners(client, source)
        self._layout = layout
        self._db = db
        # By the name of a guarded worker: the time of its last announcement.
        self._names: dict[str, float] = {}
        self._results: tuple[Results, ...] = ()
        self._asked_at = float("-inf")
        self._listening = 0
        self._taking: dict[str, float] = {}
        """By connection that takes and is not guarded: since when it has not rested."""
        self._waited: set[str] = set()
        """Such connections that waited for a reply when they were seen last."""

    def consumers(self) -> Consumers:
        """Return the consumers of each queue."""
        announced, recent = self._read()
        by_queue: dict[str, set[str]] = {}
        for worker in announced:
            for queue in worker.queues:
                by_queue.setdefault(queue, set()).add(worker.name)
        controls = {worker.control for worker in announced if worker.control} | {_CONTROL}
        unknown = {
            control: self._bound(control).difference(self._names) for control in sorted(controls)
        }
        alive: set[str] = set()
        for control, names in unknown.items():
            ours = sum(worker.control == control for worker in recent)
            if names and self._count(control) > ours:
                alive |= names
        unexplained, passing = self._unexplained(controls)
        return Consumers(
            {queue: frozenset(names) for queue, names in by_queue.items()},
            frozenset(alive) | unexplained,
            self._listeners.refused,
            # Only guarded workers announce themselves, and a worker of another ledger has a connection
            # that is not ours.
            proved=frozenset(worker.name for worker in announced),
            alive=frozenset(worker.name for worker in recent),
            passing=passing,
            sessions={worker.name: worker.session for worker in announced},
        )

    def _unexplained(self, controls: Iterable[str]) -> tuple[frozenset[str], frozenset[str]]:
        """Return the connections that take tasks and are not guarded, and which of them may not.

        kombu takes messages through a connection that does nothing else. So the last command of
        such a connection is a BRPOP, also while the worker is busy. A program that waits for
        replies of workers (Flower, an exporter of metrics, ``celery inspect``) does the same for a
        moment, and may leave the connection open. But a worker that fetches nothing has an
        unacknowledged message, without the mark of a guarded one. And a program that waits has bound
        a queue for the replies, until its wait is over: no more connections than there are such
        queues are in doubt, and none of them for longer than some seconds.
        """
        before = self._waiters(controls)
        bare = [
            client
            for client in self._listeners.inspect()
            if client.here and client.command == _POP and not client.ours
        ]
        unguarded = bare
        quiet = [client for client in bare if not client.blocked and client.idle > _QUIET]
        if quiet and not self._has_unmarked_messages():
            unguarded = [client for client in bare if client not in quiet]
        blocked = {client.text for client in unguarded if client.blocked}
        waiters = max(before, self._waiters(controls)) if blocked else 0
        waiting = blocked if len(blocked) <= waiters else set[str]()
        now, texts = time.monotonic(), {client.text for client in unguarded}
        self._taking = {text: self._taking.get(text, now) for text in texts}
        in_doubt = waiting | ((self._waited & texts) - blocked)
        self._waited = (self._waited | waiting) & {client.text for client in bare}
        passing = (text for text in in_doubt if now - self._taking[text] < _LASTING)
        return frozenset(texts), frozenset(passing)

    def _waiters(self, controls: Iterable[str]) -> int:
        """Return the number of queues that are bound for replies of workers."""
        with self._client.pipeline(transaction=False) as pipe:
            for control in controls:
                pipe.scard(self._layout.binding(f"reply.{control}{_PIDBOX}"))
            return sum(pipe.execute())

    def _has_unmarked_messages(self) -> bool:
        """Return True if a worker that is not guarded may have a message of the first some thousand."""
        entries: Iterator[tuple[bytes, bytes]] = self._client.hscan_iter(
            self._layout.unacked, count=500
        )
        several = list(islice(entries, _MOST_UNACKED))
        return len(several) == _MOST_UNACKED or any(not holder_in(raw) for _, raw in several)

    def results(self) -> tuple[Results, ...]:
        """Return where guarded workers keep their results, as last announced; rarely several places."""
        if not self._results:
            self._read()
        return self._results

    def _read(self) -> tuple[list[Announced], list[Announced]]:
        """Return all announced workers, and those of them that announced themselves a moment ago."""
        with self._client.pipeline(transaction=False) as pipe:
            pipe.time()
            pipe.zrange(self._layout.workers, 0, -1, withscores=True)
            pipe.hgetall(self._layout.about)
            (seconds, _), announcements, about = pipe.execute()
        known, recent = [], []
        for field, at in announcements:
            worker = _announced(field, about.get(field))
            if worker is None:
                continue
            known.append(worker)
            if int(seconds) - at <= _SILENT:
                recent.append(worker)
        found_results = (_results(field) for field in about)
        self._results = (
            tuple(found for found in found_results if found is not None) or self._results
        )
        now = time.monotonic()
        self._names.update((worker.name, now) for worker in known)
        self._names = {name: at for name, at in self._names.items() if now - at < _REMEMBER}
        return known, recent

    def _bound(self, control: str) -> set[str]:
        """Return the names of all workers that ever listened to this exchange and did not leave it."""
        rows = self._client.smembers(self._layout.binding(control + _PIDBOX))
        queues = (row.decode(errors="replace").split(self._layout.sep)[-1] for row in rows)
        return {queue.removesuffix(f".{control}{_PIDBOX}") for queue in queues}

    def _count(self, control: str) -> int:
        """Return how many workers listen to this exchange."""
        if time.monotonic() - self._asked_at >= _ASK_AGAIN:
            self._listening = self._client.publish(
                self._layout.fanout(control + _PIDBOX, self._db), _ping_without_target(control)
            )
            self._asked_at = time.monotonic()
        return self._listening


def _announced(field: bytes, raw: bytes | None) -> Announced | None:
    try:
        fields = json_in(raw or b"")
        return Announced(
            str(fields["name"]),
            tuple(map(str, fields["queues"])),
            field.partition(b".")[0].decode(errors="replace"),
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


def _ping_without_target(control: str) -> str:
    """Return a control command that no worker obeys, in kombu's format."""
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
