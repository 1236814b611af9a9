"""Messages that a person deletes: jobguard writes the tombstones first, then Dramatiq deletes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from functools import wraps
from typing import TYPE_CHECKING, Any
from uuid import UUID

from jobguard.adapters.dramatiq.layout import Layout, canonical, token_of
from jobguard.host_safety import contain_errors
from jobguard.patching import Hooks

if TYPE_CHECKING:
    from dramatiq.brokers.redis import RedisBroker

    from jobguard.adapter import Tracker

_ABORTS = "dramatiq_abort."
_DASHBOARD = "dramatiq_dashboard.interface"
_CHUNK = 1_000


class Cancellation:
    """The ways in which the queues of one guarded broker are emptied."""

    def __init__(self, tracker: Tracker, broker: RedisBroker) -> None:
        self._tracker = tracker
        self._broker = broker
        self._layout = Layout(broker.namespace)
        self._flushing = threading.local()
        self._watched: list[tuple[Any, Any]] = []
        self._on = Hooks()
        self._pages: Any = None
        """The class of the dashboard that is hooked."""

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

    def register_script(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the client's register_script, which dramatiq-dashboard calls when its pages are made.

        It deletes messages by a script of its own. A message that it requeues it deletes first.
        """
        self._hook_dashboard()

        @wraps(original)
        def hook(*args: Any, **kwargs: Any) -> Any:
            self._hook_dashboard()
            return original(*args, **kwargs)

        return hook

    def _hook_dashboard(self) -> None:
        pages = getattr(sys.modules.get(_DASHBOARD), "RedisInterface", None)
        if pages is None or pages is self._pages:
            return
        self._pages = pages
        with contain_errors("hook dramatiq-dashboard"):
            self._on.put(pages, "delete_message", self._delete_message)

    def _delete_message(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def hook(pages: Any, queue_name: str, message_id: str) -> Any:
            token = token_of(message_id)
            if (
                pages.broker is self._broker
                and token is not None
                and self._tracker.guards(canonical(queue_name))
            ):
                self._tracker.cancel(tokens=[token])
            return original(pages, queue_name, message_id)

        return hook

    def release(self) -> None:
        """Remove the hooks from the middleware and the dashboard."""
        self._on.take_off()
        self._pages = None
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
