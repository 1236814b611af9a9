"""The circuit breaker around Postgres: it opens at the first failure, and looks again without waiting.

A stopped Postgres answers no call, so that every trial call would make its caller wait. Therefore the
trial of the half-open state is not a call: it is a connection carried on, step by step and never
blocking, by whoever comes along; when it stands, Postgres has answered, and the circuit closes.

A Postgres that was only slow once (a checkpoint, a busy machine) stands again at once, and so the
first look is taken at once: a stopped one accepts no connection. One that opened the circuit a
moment ago is given ``retry_interval``, or else a Postgres that answers logins and nothing more would
cost a wait with every call.

Each failure after that doubles the pause, up to eight intervals. A part of the pause is random:
processes that lost Postgres together do not come back together.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pybreaker

from jobguard.errors import BreakerOpen, StoreUnavailable

_NEVER = 10.0 * 365 * 86400
"""pybreaker's own trial would be a call that waits."""
_MOST = 3
"""How often the pause is doubled."""
_STEADY = 10
"""A circuit that was closed for so many retry intervals opens for a hiccup, as far as is known."""


class Circuit:
    """Lets calls to Postgres through while it answers, and none while it does not."""

    def __init__(
        self,
        probe: Callable[[], bool],
        *,
        retry_interval: float,
        on_change: Callable[[bool], None] = lambda _closed: None,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._probe = probe
        self._chance = chance
        self._failures = 0
        self.why = ""
        """What the last failure said."""
        self._retry_interval = retry_interval
        self._on_change = on_change
        self._clock = clock
        self._next_check = 0.0
        self._opened_at = self._closed_at = -1e9
        self._reported_open = False
        self._checking = threading.Lock()
        self._breaker = pybreaker.CircuitBreaker(
            fail_max=1,
            reset_timeout=_NEVER,
            # Only a Postgres that cannot be reached opens it: bad data never does.
            exclude=[lambda error: not isinstance(error, StoreUnavailable)],
            throw_new_error_on_trip=False,
        )

    @property
    def closed(self) -> bool:
        """Whether calls are let through, as far as is known."""
        return self._breaker.current_state == pybreaker.STATE_CLOSED

    def open_for(self) -> float:
        """Seconds since it last opened."""
        return self._clock() - self._opened_at

    def closed_for(self) -> float:
        """Seconds since it last closed."""
        return self._clock() - self._closed_at

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Make a call inside; StoreUnavailable from it opens the circuit.

        Raises BreakerOpen at once, without any call, while the circuit is open.
        """
        if not self.closed and not self.check():
            raise BreakerOpen
        try:
            with self._breaker.calling():
                yield
            self._failures = 0
        except pybreaker.CircuitBreakerError as error:
            raise BreakerOpen from error
        except StoreUnavailable as error:
            self.why = str(error)
            self._opened()
            raise

    def check(self) -> bool:
        """See, without waiting, whether Postgres is back; one looks at a time, the others do not wait."""
        if self.closed:
            return True
        if self._clock() < self._next_check or not self._checking.acquire(blocking=False):
            return False
        try:
            if not self._probe():
                return False  # under way: the next who comes along carries it on
        except StoreUnavailable as error:
            self.why = str(error)
            self._next_check = self._clock() + self._pause()
            return False
        finally:
            self._checking.release()
        self.answered()
        return True

    def beat_now(self) -> None:
        """Let the next look be taken at once: this process is about to end."""
        self._next_check = 0.0

    def _pause(self) -> float:
        """How long to leave Postgres alone after one more failure."""
        pause = self._retry_interval * 2.0 ** min(self._failures, _MOST)
        self._failures += 1
        return pause * (0.5 + 0.5 * self._chance())

    def answered(self) -> None:
        """Postgres has just answered somebody: close."""
        if not self.closed:
            self._breaker.close()
            self._closed_at = self._clock()
            self._reported_open = False
            self._on_change(True)

    def _opened(self) -> None:
        if self._reported_open:
            return  # calls that failed together are one outage
        self._reported_open = True
        now = self._clock()
        steady = now - self._opened_at >= _STEADY * self._retry_interval
        if steady:
            self._failures = 0
        self._next_check = now if steady else now + self._pause()
        self._opened_at = now
        self._on_change(False)

    def copy_state(self, other: Circuit) -> None:
        """Begin as the parent of this process left off: a child need not learn of the outage again."""
        if not other.closed:
            self._breaker.open()  # but its life may be short: it looks at once
