"""Threads, locks and events of the operating system, also after monkey patching by gevent or eventlet.

After the patching, ``threading.Thread`` is a greenlet. A task that computes for a minute stops all other
greenlets for that minute. Beats must be sent in that time, too.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
from collections.abc import Callable
from typing import Any


def is_patched() -> bool:
    """Return True if a thread of ``threading`` would be a greenlet."""
    return _gevent() or _eventlet()


def start(work: Callable[[], None], *, name: str) -> Event:
    """Run ``work`` in a daemon thread of the operating system; return an event that is set at its end."""
    ended = Event()

    def run() -> None:
        _make_no_spans()
        try:
            work()
        finally:
            ended.set()

    if _gevent():
        _gevents("start_new_thread")(run, ())
    else:
        _threading().Thread(target=run, name=name, daemon=True).start()
    return ended


def start_beside_callers(work: Callable[[], None], *, name: str) -> None:
    """Run ``work`` in a daemon thread, which is a greenlet after the patching.

    For work on a client that callers use too: a connection of gevent belongs to the thread that made it.
    """

    def run() -> None:
        _make_no_spans()
        work()

    threading.Thread(target=run, name=name, daemon=True).start()


def _make_no_spans() -> None:
    """Make OpenTelemetry ignore the traffic of this thread: beats are not the host's traffic."""
    context = sys.modules.get("opentelemetry.context")
    if context is not None:
        context.attach(context.set_value("suppress_instrumentation", True))


def lock() -> Any:
    """Return a lock of the operating system. Keep it only briefly: a wait for it stops every greenlet."""
    return _gevents("allocate_lock")() if _gevent() else _threading().Lock()


def poll() -> Any:
    """Return a ``select.poll`` of the operating system, for a thread that start() made."""
    if _gevent():
        return sys.modules["gevent.monkey"].get_original("select", "poll")()
    if _eventlet():
        return sys.modules["eventlet.patcher"].original("select").poll()
    return select.poll()


def write(descriptor: int, data: bytes) -> int:
    """Write like ``os.write``. Eventlet's version lets other greenlets run, even while a lock is taken."""
    system = sys.modules["eventlet.patcher"].original("os") if _eventlet() else os
    written: int = system.write(descriptor, data)
    return written


class Event:
    """An event like threading.Event, for one waiting thread."""

    def __init__(self) -> None:
        self._set = False
        self._closed = lock()  # taken while the event is not set
        self._closed.acquire()

    def set(self) -> None:
        """Wake the waiting thread."""
        self._set = True
        with contextlib.suppress(RuntimeError):  # the lock was free already
            self._closed.release()

    def clear(self) -> None:
        """Make wait() block again."""
        self._set = False
        self._closed.acquire(False)

    def is_set(self) -> bool:
        """Return True if wait() would return at once."""
        return self._set

    def wait(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds until the event is set; return True if it is set."""
        if self._set or self._closed.acquire(True, max(0.0, timeout)):
            if self._set:
                self.set()  # free the lock for the next wait
            return self._set
        return False


def _gevent() -> bool:
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading"))


def _eventlet() -> bool:
    patcher = sys.modules.get("eventlet.patcher")
    return patcher is not None and bool(patcher.is_monkey_patched("thread"))


def _gevents(name: str) -> Any:
    return sys.modules["gevent.monkey"].get_original("_thread", name)


def _threading() -> Any:
    return sys.modules["eventlet.patcher"].original("threading") if _eventlet() else threading
