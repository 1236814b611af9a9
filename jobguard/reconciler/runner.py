"""Run the work of one source, or the requests, in its own thread, with its own connections, for one term.

A Redis that does not answer blocks neither the other sources nor the lease. The term fences the
writes of this thread: when the term ends, a stuck thread is abandoned.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import redis

from jobguard.errors import NotLeading, StoreUnavailable
from jobguard.log import log_event
from jobguard.reconciler.result import PassResult
from jobguard.store.protocols import Brake, LeaderStore

_STEP = 0.05
"""Seconds between two steps when nothing is urgent."""
_AFTER_AN_ERROR = 1.0
_LONGEST_PAUSE = 5.0
"""Seconds between two tries while Postgres is away, at most."""


class Work(Protocol):
    """What a runner does, step by step: a SourceMonitor, or the requests of the namespace."""

    result: PassResult

    @property
    def busy(self) -> bool:
        """True if the next step should follow at once."""

    @property
    def finished(self) -> bool:
        """True if nothing is left to do in one pass."""

    def step(self, term: int, brake: Brake) -> None:
        """Do all due work of one step. Raises NotLeading and StoreUnavailable."""

    def close(self) -> None:
        """Close the connections that belong to this work alone."""


class Runner:
    """Does the steps of one piece of work until it is stopped, or until its term ends."""

    def __init__(
        self,
        name: str,
        term: int,
        leads: Callable[[], int],
        store: LeaderStore,
        client: redis.Redis | None,
        make: Callable[[LeaderStore], Work],
        pause: float = _STEP,
    ) -> None:
        self.name = name
        self.monitor: Work | None = None
        self._pause = pause
        self._term = term
        self._leads = leads
        self._store = store
        self._client = client
        self._make = make
        self._stop = threading.Event()
        self._since: float | None = None
        self._thread = threading.Thread(target=self._run, name=f"jobguard {name}", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """True if its thread has not ended."""
        return self._thread.is_alive()

    @property
    def finished(self) -> bool:
        """True if nothing is left to do in one pass."""
        return self.monitor is not None and self.monitor.finished

    def stuck_for(self) -> float:
        """Return the seconds since its present step began; 0: no step is running."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def cut(self) -> None:
        """Close the connections to Redis, so that a step that hangs fails."""
        if self._client is not None:
            self._client.connection_pool.disconnect(inuse_connections=True)

    def stop(self) -> None:
        """Begin no further step."""
        self._stop.set()

    def join(self, timeout: float) -> None:
        """Wait until the present step is done."""
        self._thread.join(timeout)

    def _run(self) -> None:
        pause = self._pause
        while not self._stop.is_set():
            self._since = time.monotonic()
            try:
                busy = self._step()
                pause = 0.0 if busy else self._pause
            except NotLeading:
                break
            except StoreUnavailable as error:
                log_event("postgres_away", error=str(error))
                pause = min(_LONGEST_PAUSE, 2 * max(pause, 0.1))
            except Exception as error:
                log_event("step_failed", part=self.name, error=str(error)[:500], exc_info=True)
                pause = _AFTER_AN_ERROR
            finally:
                self._since = None
            self._stop.wait(pause)
        with suppress(Exception):
            if self.monitor is not None:
                self.monitor.close()
            self._store.close()
            if self._client is not None:
                self._client.connection_pool.disconnect()

    def _step(self) -> bool:
        if self._leads() != self._term:
            raise NotLeading
        brake = self._store.brake(self._term)
        if self.monitor is None:
            self.monitor = self._make(self._store)
        self.monitor.step(self._term, brake)
        return self.monitor.busy
