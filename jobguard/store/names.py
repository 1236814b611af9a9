"""Host names, resolved under our own clock.

``getaddrinfo`` takes no deadline: with a resolver that does not answer it blocks for ten seconds and
more. So one daemon thread of the process asks it, and a caller waits as long as it wants to. What
was found is kept: a name that cannot be resolved again is used with the addresses it had.
"""

from __future__ import annotations

import _socket  # socket.getaddrinfo is another function where gevent or eventlet has replaced it
import os
import time
from collections.abc import Sequence

from jobguard import os_threads

FRESH = 30.0
"""Seconds for which an answer is used without asking again."""
_PATIENCE = 0.2
"""Seconds to wait for a new answer where there is an old one."""
_MOST = 64
"""Names that are remembered."""


class Names:
    """The names of one process. One thread at most asks the system."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = os_threads.lock()
        self._known: dict[str, tuple[float, tuple[str, ...]]] = {}
        self._failed: dict[str, tuple[float, OSError]] = {}
        self._wanted: dict[str, float] = {}  # since when
        self._running = False

    def _mine(self) -> None:
        if self._pid != os.getpid():
            known = dict(self._known)  # the parent's thread and its lock stayed with the parent
            self._begin()
            self._known = known

    def forget(self, host: str) -> None:
        """Ask again at the next use: what answers at the old addresses is not what we look for."""
        self._mine()
        with self._lock:
            if host in self._known:
                self._known[host] = (float("-inf"), self._known[host][1])

    def addresses(self, host: str, wait: float) -> Sequence[str] | None:
        """Return the addresses of a name; None: not known after ``wait`` seconds.

        Raises OSError where the system says that there are none.
        """
        self._mine()
        ends = time.monotonic() + wait
        pause = 0.0005
        while True:
            now = time.monotonic()
            with self._lock:
                found = self._look(host, now)
            if found is not None:
                return found
            if now >= ends:
                return None
            time.sleep(min(pause, ends - now))  # lets other greenlets run, which no lock does
            pause = min(pause * 2, 0.01)

    def _look(self, host: str, now: float) -> Sequence[str] | None:
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
            except RuntimeError as error:  # the interpreter is about to end
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
            except Exception as caught:  # a name that is no name
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
