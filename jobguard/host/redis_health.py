"""Find out in bounded time, on a client of jobguard, whether Redis answers.

The host's clients may hang for a minute if Redis is stopped. Therefore jobguard's client asks Redis
shortly before the host's client is used. While Redis does not answer, a thread of jobguard asks it,
and no caller waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import redis

from jobguard import os_threads
from jobguard.host_safety import contain_errors
from jobguard.locks import Turn

_PROOF = 0.1
"""Seconds for which an answer counts as proof."""
_ASK_AGAIN = 0.5
"""Seconds between two requests while Redis does not answer."""
_OLD = 1.0
"""Seconds after which the last answer says nothing any more: no caller had Redis asked since."""


def _in_a_thread(work: Callable[[], None]) -> None:
    os_threads.start_beside_callers(work, name="jobguard-redis-health")


class RedisHealth:
    """Remembers the last answer of a Redis, and asks for another one when it is too old."""

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
        self._asking = Turn()
        self._proved = -1e9
        self._ask_at = -1e9
        self._asked_at = -1e9
        self._is_away = False
        self._error: redis.RedisError | None = None

    def __call__(self) -> bool:
        """Return True if Redis does not answer; wait one short timeout at most, and once an outage."""
        now = self._clock()
        if not self._is_away and now - self._proved < _PROOF:
            return False
        if self._is_away:
            self._ask_aside(now)
            return self._is_away
        if not self._asking.take(1):
            return self._is_away
        try:
            # A caller that waited here takes the answer that the other caller got.
            if self._is_away:
                return True
            if self._clock() - self._proved < _PROOF:
                return False
            return self._ask()
        finally:
            self._asking.free()

    def error(self) -> redis.RedisError | None:
        """Return why Redis does not answer; None: it answers.

        Ask again if the last question is old, and wait one short timeout at most.
        """
        is_old = self._is_away and self._clock() - self._asked_at > _OLD
        if is_old and self._asking.take(1):
            try:
                self._ask()
            finally:
                self._asking.free()
        return self._error if self._is_away else None

    def is_known_away(self) -> bool:
        """Return True if Redis failed to answer and has not answered since; wait for nothing."""
        if self._is_away:
            self._ask_aside(self._clock())
        return self._is_away

    def _ask_aside(self, now: float) -> None:
        """Ask again in a thread, so that no caller waits for the answer; one thread at a time."""
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
            # Other errors: a client cannot be built like the host's connection class. Then only the
            # host's own client can be used.
            with contain_errors("redis health", let_pass=redis.RedisError):
                if self._client is None:
                    self._client = self._make()
                self._client.ping()
        except redis.RedisError as error:
            # A Redis that is loading or refuses access is the host's problem; it does answer.
            if isinstance(error, redis.ConnectionError | redis.TimeoutError):
                self.failed()
                self._error = error.with_traceback(None)
                return True
        finally:
            self._asked_at = self._clock()
        self.answered()
        return False

    def answered(self) -> None:
        """Note that Redis has just answered a caller."""
        self._is_away = False
        self._error = None
        self._proved = self._clock()

    def failed(self) -> None:
        """Note that Redis has just failed to answer a caller."""
        self._is_away = True
        self._ask_at = self._clock() + _ASK_AGAIN

    def after_fork(self) -> None:
        """Reset locks and client in a child, and keep the known state."""
        self._asking = Turn()
        self._client = None
        self._again = False
