"""Whether Redis can be asked at all, found out in bounded time on a client of our own.

The host's clients may hang for a minute on a Redis that is stopped. So before the host's client is
used, ours has asked a moment ago; and while Redis is in doubt, a thread of ours asks it: no caller waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import redis

from jobguard import os_threads
from jobguard.errors import is_host_interrupt
from jobguard.log import log_event

_PROOF = 0.1
"""An answer this many seconds old is proof enough."""
_ASK_AGAIN = 0.5
"""While in doubt, it is asked again this often."""


def _in_a_thread(work: Callable[[], None]) -> None:
    os_threads.start(work, name="jobguard-doubt")


class RedisHealth:
    """Remembers the last answer of a Redis, and asks for another when it is too old."""

    def __init__(
        self,
        client: Callable[[], redis.Redis],
        clock: Callable[[], float] = time.monotonic,
        start: Callable[[Callable[[], None]], object] = _in_a_thread,
    ) -> None:
        self._start = start
        self._again = False  # a thread asks
        self._make = client
        self._client: redis.Redis | None = None
        self._clock = clock
        self._asking = threading.Lock()
        self._proved = -1e9
        self._ask_at = -1e9
        self._in_doubt = False

    def __call__(self) -> bool:
        """Whether Redis is in doubt now. Waits one short timeout at most, and once an outage."""
        now = self._clock()
        if not self._in_doubt and now - self._proved < _PROOF:
            return False
        if self._in_doubt:
            self._ask_aside(now)
            return self._in_doubt
        if not self._asking.acquire(timeout=1):
            return self._in_doubt
        try:
            # Who waited here takes the answer of the one who asked.
            if self._in_doubt:
                return True
            if self._clock() - self._proved < _PROOF:
                return False
            return self._ask()
        finally:
            self._asking.release()

    def _ask_aside(self, now: float) -> None:
        """Ask again where no caller waits for the answer; one thread at a time."""
        if now < self._ask_at or self._again:
            return
        self._again = True
        try:
            self._start(self._ask_again)
        except RuntimeError:  # no thread can be started: the interpreter ends
            self._again = False

    def _ask_again(self) -> None:
        try:
            self._ask()
        finally:
            self._again = False

    def _ask(self) -> bool:
        try:
            if self._client is None:
                self._client = self._make()
            self._client.ping()
        except redis.RedisError as error:
            # A Redis that loads or refuses us by rights is the host's to deal with; it does answer.
            if isinstance(error, redis.ConnectionError | redis.TimeoutError):
                self.failed()
                return True
        except Exception as error:
            # A connection class that ours cannot be made like: then the host's own must do.
            if is_host_interrupt(error):
                raise
            log_event("guest_failed", where="doubt", error=str(error))
        self._in_doubt = False
        self._proved = self._clock()
        return False

    def failed(self) -> None:
        """Redis has just failed somebody."""
        self._in_doubt = True
        self._ask_at = self._clock() + _ASK_AGAIN

    def after_fork(self) -> None:
        """Begin anew in a child, with what is known."""
        self._asking = threading.Lock()
        self._client = None
        self._again = False
