"""Unguarded workers that ended before any inspection of the consumers saw them.

``rq worker --burst`` can live for less than a second. RQ keeps the hash of a worker that ended for 60
seconds, in no registry. A guarded worker marks its hash. So an ended worker without the mark may have
run jobs of its queues.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from redis.exceptions import ResponseError

from jobguard.adapters.rq.layout import WORKER_FIELD, Layout

if TYPE_CHECKING:
    import redis

_COUNT = 1_000
_CALLS = 20
"""SCAN commands in one inspection, each about 0.5 ms: a walk over 600,000 keys takes a minute."""
_SHOWN = 3
"""Inspections for which a worker that was found is shown: two in a row must see it."""
_KEPT = 90.0
"""Seconds for which it is known as shown. RQ keeps its hash for 60 s."""


@dataclass(slots=True)
class _Found:
    """A worker that was found."""

    queues: list[str]
    at: float
    shown: int = 0


_of_sources: dict[str, dict[str, _Found]] = {}
"""What this process has found, by source: a standby that becomes the leader shows no worker again."""


class EndedWorkers:
    """The unguarded workers of one Redis that ended a moment ago."""

    def __init__(self, client: redis.Redis, layout: Layout, source: str) -> None:
        self._client: Any = client
        self._prefix = f"{layout.base}:worker:"
        self._cursor = 0
        self._found = _of_sources.setdefault(source, {})
        self._allowed = True

    def find(self, registered: frozenset[str]) -> dict[str, frozenset[str]]:
        """Return the names of these workers by queue; ``registered``: names that need no check.

        Each call continues the walk over the keys of Redis. A user that may not SCAN finds none.
        """
        now = time.monotonic()
        for text in [text for text, one in self._found.items() if now - one.at >= _KEPT]:
            del self._found[text]
        keys = self._some_keys() if self._allowed else []
        names = sorted({key.decode(errors="replace").removeprefix(self._prefix) for key in keys})
        unknown = [name for name in names if name not in registered]
        with self._client.pipeline(transaction=False) as pipe:
            for name in unknown:
                pipe.hmget(self._prefix + name, "death", "queues", WORKER_FIELD)
            hashes = pipe.execute() if unknown else []
        for name, (death, queues, mark) in zip(unknown, hashes, strict=True):
            if death and queues and not mark:
                text = f"{name} (ended {death.decode(errors='replace')})"
                several = queues.decode(errors="replace").split(",")
                self._found.setdefault(text, _Found(several, now))
        by_queue: dict[str, set[str]] = {}
        for text, found in self._found.items():
            found.shown += 1
            for queue in found.queues if found.shown <= _SHOWN else ():
                by_queue.setdefault(queue, set()).add(text)
        return {queue: frozenset(texts) for queue, texts in by_queue.items()}

    def _some_keys(self) -> list[bytes]:
        keys: list[bytes] = []
        for _ in range(_CALLS):
            try:
                self._cursor, some = self._client.scan(
                    self._cursor, match=f"{self._prefix}*", count=_COUNT, _type="HASH"
                )
            except ResponseError:
                self._allowed = False
                break
            keys += some
            if self._cursor == 0:
                break
        return keys
