"""Run the work of one source, or the requests, in its own thread, with its own connections, for one term.

A Redis that does not answer blocks neither the other sources nor the lease. The term fences the
writes of this thread: when the term ends, a stuck thread is abandoned.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

import redis

from jobguard.errors import NotLeading, StoreUnavailable
from jobguard.log import log_event
from jobguard.reconciler.result import PassResult
from jobguard.store.protocols import LeaderStore, Signs

_READ = 0.75
"""Seconds for which signs are used: a pause by a person takes effect within a second."""
_AFTER_AN_ERROR = 1.0
_LONGEST_PAUSE = 5.0
"""Seconds between two tries while Postgres is away, at most."""


class Work(Protocol):
    """What a runner does, step by step: a SourceMonitor, or the requests of the namespace."""

    result: PassResult

    @property
    def rest(self) -> float:
        """Seconds until the next step; 0: it should follow at once."""

    @property
    def finished(self) -> bool:
        """True if nothing is left to do in one pass."""

    def step(self, term: int, signs: Signs) -> None:
        """Do all due work of one step. Raises NotLeading and StoreUnavailable."""

    def close(self) -> None:
        """Close the connections that belong to this work alone."""


class SharedSigns:
    """The signs of one term, which all threads of a leader read together."""

    def __init__(self, term: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._term = term
        self._clock = clock
        self._lock = threading.Lock()
        self._asked_at = float("-inf")
        self._signs = Signs()
        self._woken: list[Callable[[], None]] = []

    def on_change(self, wake: Callable[[], None]) -> None:
        """Call this when something becomes owed or requested."""
        self._woken.append(wake)

    def read(self, store: LeaderStore) -> Signs:
        """Return the signs, which are at most ``_READ`` seconds old. Raises as the store does."""
        with self._lock:
            asked_at = self._clock()
            if asked_at - self._asked_at < _READ:
                return self._signs
            before = self._signs
            signs = self._signs = replace(store.signs(self._term), asked_at=asked_at)
            self._asked_at = asked_at
        if (signs.owed, signs.requested) != (before.owed, before.requested):
            for wake in self._woken:
                wake()
        return signs

    def forget(self) -> None:
        """Ask again at the next read: this process has changed what they show."""
        self._asked_at = float("-inf")


class Runner:
    """Does the steps of one piece of work until it is stopped, or until its term ends."""

    def __init__(
        self,
        name: str,
        term: int,
        leads: Callable[[], int],
        signs: SharedSigns,
        store: LeaderStore,
        client: redis.Redis | None,
        make: Callable[[LeaderStore], Work],
    ) -> None:
        self.name = name
        self.monitor: Work | None = None
        self._signs = signs
        self._term = term
        self._leads = leads
        self._store = store
        self._client = client
        self._make = make
        self._stop = threading.Event()
        self._wake = threading.Event()
        signs.on_change(self._wake.set)
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
        self._wake.set()

    def join(self, timeout: float) -> None:
        """Wait until the present step is done."""
        self._thread.join(timeout)

    def _run(self) -> None:
        pause = 0.0
        while not self._stop.is_set():
            self._since = time.monotonic()
            try:
                pause = self._step()
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
            self._wake.wait(pause)
            self._wake.clear()
        with suppress(Exception):
            if self.monitor is not None:
                self.monitor.close()
            self._store.close()
            if self._client is not None:
                self._client.connection_pool.disconnect()

    def _step(self) -> float:
        """Do one step, and return the seconds until the next one."""
        if self._leads() != self._term:
            raise NotLeading
        signs = self._signs.read(self._store)
        if self.monitor is None:
            self.monitor = self._make(self._store)
        self.monitor.step(self._term, signs)
        rest = self.monitor.rest
        if not rest:
            self._signs.forget()
        return rest
