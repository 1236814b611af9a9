"""What a person has Dramatiq throw away: the tombstones come first, then Redis."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import wraps
from typing import TYPE_CHECKING, Any
from uuid import UUID

from jobguard.adapters.dramatiq.layout import Layout, canonical, token_of

if TYPE_CHECKING:
    from dramatiq.brokers.redis import RedisBroker

    from jobguard.adapter import Tracker

_CHUNK = 1_000


class Intent:
    """The ways in which one guarded broker's queues are emptied."""

    def __init__(self, tracker: Tracker, broker: RedisBroker) -> None:
        self._tracker = tracker
        self._broker = broker
        self._layout = Layout(broker.namespace)
        self._flushing = threading.local()

    def flush(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """RedisBroker.flush: a queue, with what is delayed in it; flush_all comes by here, too."""

        @wraps(original)
        def hook(queue_name: str) -> Any:
            name = canonical(queue_name)
            if self._tracker.guards(name):
                self._tracker.cancel(queue=name)
            self._flushing.now = True
            try:
                return original(queue_name)
            finally:
                self._flushing.now = False

        return hook

    def do_purge(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """RedisBroker.do_purge: one list, delayed or not."""

        @wraps(original)
        def hook(queue_name: str) -> Any:
            ours = self._tracker.guards(canonical(queue_name))
            if ours and not getattr(self._flushing, "now", False):
                tokens = list(self._tokens(queue_name))
                for at in range(0, len(tokens), _CHUNK):
                    self._tracker.cancel(tokens=tokens[at : at + _CHUNK])
            return original(queue_name)

        return hook

    def _tokens(self, queue: str) -> Iterable[UUID]:
        client: Any = self._broker.client
        for raw, _ in client.hscan_iter(f"{self._layout.key(queue)}.msgs", count=_CHUNK):
            token = token_of(raw.decode(errors="replace"))
            if token is not None:
                yield token
