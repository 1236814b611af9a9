"""Threads, locks and events of the operating system, also where gevent or eventlet has replaced Python's.

Under their monkey patching ``threading.Thread`` is a greenlet, which a task that computes for a minute
starves for as long. A beat must come all the same.
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
    """Whether a thread of ``threading`` would be a greenlet."""
    return _gevent() or _eventlet()


def start(work: Callable[[], None], *, name: str) -> Event:
    """Run this in a daemon thread of the operating system; returns what is set when it has ended."""
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


def _make_no_spans() -> None:
    """Have OpenTelemetry take no notice of what this thread sends: beats are not the host's traffic."""
    context = sys.modules.get("opentelemetry.context")
    if context is not None:
        context.attach(context.set_value("suppress_instrumentation", True))


def lock() -> Any:
    """Return a lock of the operating system. Hold it for a moment only: it stops every greenlet."""
    return _gevents("allocate_lock")() if _gevent() else _threading().Lock()


def poll() -> Any:
    """Return a ``select.poll`` of the operating system, for a thread of start()."""
    if _gevent():
        return sys.modules["gevent.monkey"].get_original("select", "poll")()
    if _eventlet():
        return sys.modules["eventlet.patcher"].original("select").poll()
    return select.poll()


def write(descriptor: int, data: bytes) -> int:
    """Write as ``os.write``. Eventlet's own lets other greenlets run, also where a lock is held."""
    system = sys.modules["eventlet.patcher"].original("os") if _eventlet() else os
    written: int = system.write(descriptor, data)
    return written


class Event:
    """Like threading.Event, for one thread that waits."""

    def __init__(self) -> None:
        self._set = False
        self._closed = lock()  # held while there is nothing to come through for
        self._closed.acquire()

    def set(self) -> None:
        """Let who waits go on."""
        self._set = True
        with contextlib.suppress(RuntimeError):  # it was open already
            self._closed.release()

    def clear(self) -> None:
        """Have who comes wait again."""
        self._set = False
        self._closed.acquire(False)

    def is_set(self) -> bool:
        """Whether one that waits would go on."""
        return self._set

    def wait(self, timeout: float) -> bool:
        """Wait until it is set, so many seconds at most; return whether it is."""
        if self._set or self._closed.acquire(True, max(0.0, timeout)):
            if self._set:
                self.set()  # stays open for the next
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
