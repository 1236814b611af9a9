"""Messages that a person deletes: jobguard writes the tombstones first, then Dramatiq deletes."""

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

_ABORTS = "dramatiq_abort."
_CHUNK = 1_000


class Cancellation:
    """The ways in which the queues of one guarded broker are emptied."""

    def __init__(self, tracker: Tracker, broker: RedisBroker) -> None:
        self._tracker = tracker
        self._broker = broker
        self._layout = Layout(broker.namespace)
        self._flushing = threading.local()
        self._watched: list[tuple[Any, Any]] = []

    def flush(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap RedisBroker.flush, which empties a queue and its delay queue; flush_all calls it too."""

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
        """Wrap RedisBroker.do_purge, which empties one list, delayed or not."""

        @wraps(original)
        def hook(queue_name: str) -> Any:
            ours = self._tracker.guards(canonical(queue_name))
            if ours and not getattr(self._flushing, "now", False):
                tokens = list(self._tokens(queue_name))
                for at in range(0, len(tokens), _CHUNK):
                    self._tracker.cancel(tokens=tokens[at : at + _CHUNK])
            return original(queue_name)

        return hook

    def add_middleware(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap RedisBroker.add_middleware, because some middleware aborts messages."""
        for middleware in self._broker.middleware:
            self._add_monitor(middleware)

        @wraps(original)
        def hook(middleware: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(middleware, *args, **kwargs)
            self._add_monitor(middleware)
            return result

        return hook

    def release(self) -> None:
        """Remove the hooks from the middleware."""
        while self._watched:
            middleware, hook = self._watched.pop()
            if vars(middleware).get("abort") is hook:
                del middleware.abort

    def _add_monitor(self, middleware: Any) -> None:
        """Hook ``Abortable`` of dramatiq-abort: only Redis knows of an abort, and only for some time."""
        if not any(kind.__module__.startswith(_ABORTS) for kind in type(middleware).__mro__):
            return
        original = getattr(middleware, "abort", None)
        if original is None or "abort" in vars(middleware):
            return

        @wraps(original)
        def abort(message_id: str, *args: Any, **kwargs: Any) -> Any:
            self._tracker.cancel(job_ids=[message_id])
            return original(message_id, *args, **kwargs)

        middleware.abort = abort
        self._watched.append((middleware, abort))

    def _tokens(self, queue: str) -> Iterable[UUID]:
        client: Any = self._broker.client
        for raw, _ in client.hscan_iter(f"{self._layout.key(queue)}.msgs", count=_CHUNK):
            token = token_of(raw.decode(errors="replace"))
            if token is not None:
                yield token
