"""Resolve host names with a deadline.

``getaddrinfo`` takes no deadline: with a resolver that does not answer, it blocks for ten seconds and
more. So one daemon thread of the process calls it, and each caller waits only as long as it chooses.
Answers are kept: if a name cannot be resolved again, its last known addresses are used.
"""

from __future__ import annotations

import _socket  # socket.getaddrinfo is another function where gevent or eventlet has replaced it
import time
from collections.abc import Sequence

from jobguard import os_threads
from jobguard.fork import OwnerProcess

FRESH = 30.0
"""Seconds for which an answer is used without a new request."""
_PATIENCE = 0.2
"""Seconds to wait for a new answer when an old one is known."""
_MOST = 64
"""Largest number of names that are kept."""


class Names:
    """Host names of one process. At most one thread asks the system."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._owner = OwnerProcess()
        self._lock = os_threads.lock()
        self._known: dict[str, tuple[float, tuple[str, ...]]] = {}
        self._failed: dict[str, tuple[float, OSError]] = {}
        self._wanted: dict[str, float] = {}  # the time of the first request
        self._running = False

    def _mine(self) -> None:
        if not self._owner.is_current:
            # The thread and the lock of the parent process do not exist here.
            known = dict(self._known)
            self._begin()
            self._known = known

    def forget(self, host: str) -> None:
        """Ask the system again at the next use, because the known addresses lead to a wrong server."""
        self._mine()
        with self._lock:
            if host in self._known:
                self._known[host] = (float("-inf"), self._known[host][1])

    def addresses(self, host: str, wait: float) -> Sequence[str] | None:
        """Return the addresses of a name, or None if they are not known after ``wait`` seconds.

        Raise OSError if the system answers that the name has no address.
        """
        self._mine()
        ends = time.monotonic() + wait
        pause = 0.0005
        while True:
            now = time.monotonic()
            with self._lock:
                found = self._find(host, now)
            if found is not None:
                return found
            if now >= ends:
                return None
            # Other greenlets can run meanwhile; a lock would block them.
            time.sleep(min(pause, ends - now))
            pause = min(pause * 2, 0.01)

    def _find(self, host: str, now: float) -> Sequence[str] | None:
        answered, known = self._known.get(host, (float("-inf"), ()))
        if now - answered < FRESH:
            return known
        failed = self._failed.pop(host, None)
        if failed is not None and now - failed[0] < FRESH:
            if known:
                return known
            raise failed[1]
        since = self._wanted.setdefault(host, now)
        if not self._running:
            self._running = True
            try:
                os_threads.start(self._resolve, name="jobguard-names")
            except RuntimeError as error:  # the interpreter is shutting down
                self._running = False
                self._wanted.clear()
                if known:
                    return known
                raise OSError(f"{host} cannot be resolved any more") from error
        return known if known and now - since >= _PATIENCE else None

    def _resolve(self) -> None:
        while True:
            with self._lock:
                host = next(iter(self._wanted), None)
                if host is None:
                    self._running = False
                    return
            error: OSError | None = None
            found: tuple[str, ...] = ()
            try:
                answers = _socket.getaddrinfo(host, None, 0, _socket.SOCK_STREAM)
                found = tuple(dict.fromkeys(str(answer[4][0]) for answer in answers))
            except OSError as caught:
                error = caught
            except Exception as caught:  # the name has a form that cannot be resolved
                error = OSError(str(caught))
            with self._lock:
                self._wanted.pop(host, None)
                if found:
                    if len(self._known) >= _MOST:
                        self._known.pop(next(iter(self._known)))
                    self._known[host] = (time.monotonic(), found)
                else:
                    self._failed[host] = (
                        time.monotonic(),
                        error or OSError(f"{host} has no address"),
                    )


names = Names()
