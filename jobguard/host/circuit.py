"""The circuit breaker around Postgres: it opens at the first failure, and checks again without waiting.

A stopped Postgres answers no call, so every trial call would make its caller wait. Therefore the
trial of the half-open state is not a call. It is a connection that the callers advance step by
step, without blocking. When the connection is open, Postgres has answered, and the circuit closes.

A Postgres that was slow only once (a checkpoint, a busy machine) accepts a connection at once.
Therefore the first check comes at once: a stopped Postgres accepts no connection. A Postgres that
opened the circuit a moment ago gets ``retry_interval`` before the next check. Otherwise a Postgres
that answers logins and nothing else would cost a wait with every call.

Each further failure doubles the pause, up to eight intervals. A part of the pause is random, so
that processes that lost Postgres together do not return together.

The state is pybreaker's. A call does not pass through pybreaker, which would take a lock: it reads a
copy of the state, and only a failure and an answer after it change the state.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pybreaker

from jobguard.errors import BreakerOpen, StoreUnavailable
from jobguard.locks import Turn

_NEVER = 10.0 * 365 * 86400
"""Seconds; pybreaker's own trial, which this disables, would be a call that waits."""
_MOST = 3
"""How often the pause is doubled."""
_STEADY = 10
"""Retry intervals after which a closed circuit counts as steady; its next failure may be a short one."""


class _Copy(pybreaker.CircuitBreakerListener):
    """Copies each new state to the circuit."""

    def __init__(self, circuit: Circuit) -> None:
        self._circuit = circuit

    def state_change(self, _breaker: Any, _old: Any, new: Any) -> None:
        """Copy the new state."""
        self._circuit.closed = new.name == pybreaker.STATE_CLOSED


class Circuit:
    """Lets calls to Postgres pass while it answers, and no calls while it does not."""

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
        """The text of the last failure."""
        self._retry_interval = retry_interval
        self._on_change = on_change
        self._clock = clock
        self._next_check = 0.0
        self._opened_at = self._closed_at = -1e9
        self._heard_at = clock()
        self._reported_open = False
        self._checking = Turn()
        self.closed = True
        """Whether calls may pass, as far as is known."""
        self._breaker = pybreaker.CircuitBreaker(
            fail_max=1, reset_timeout=_NEVER, listeners=[_Copy(self)]
        )

    def open_for(self) -> float:
        """Return the seconds since the circuit last opened."""
        return self._clock() - self._opened_at

    def closed_for(self) -> float:
        """Return the seconds since the circuit last closed."""
        return self._clock() - self._closed_at

    def silent_for(self) -> float:
        """Return the seconds since the last call that was answered."""
        return self._clock() - self._heard_at

    def calling(self) -> Circuit:
        """Return a block to make a call in; StoreUnavailable from the call opens the circuit.

        Raises BreakerOpen at once, without any call, while the circuit is open.
        """
        return self

    def __enter__(self) -> None:
        if not self.closed and not self.check():
            raise BreakerOpen

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if error is None:
            self._failures = 0
            self._heard_at = self._clock()
        elif isinstance(error, StoreUnavailable):  # bad data never opens the circuit
            self._breaker.open()
            self.why = str(error)
            self._opened()

    def check(self) -> bool:
        """Check, without waiting, whether Postgres is back; only one thread checks at a time."""
        if self.closed:
            return True
        if self._clock() < self._next_check or not self._checking.take(0):
            return False
        try:
            if not self._probe():
                return False  # the connection is not complete: the next caller advances it
        except StoreUnavailable as error:
            self.why = str(error)
            self._next_check = self._clock() + self._pause()
            return False
        finally:
            self._checking.free()
        self.answered()
        return True

    def end_pause(self) -> None:
        """Let the next check happen at once, because this process is about to end."""
        self._next_check = 0.0

    def _pause(self) -> float:
        """Return the pause before the next check after one more failure."""
        pause = self._retry_interval * 2.0 ** min(self._failures, _MOST)
        self._failures += 1
        return pause * (0.5 + 0.5 * self._chance())

    def answered(self) -> None:
        """Close the circuit: Postgres has just answered a call."""
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
        """Start with the state of the parent process: a child need not discover the outage again."""
        if not other.closed:
            self.open()

    def open(self) -> None:
        """Open the circuit without a failed call: another process knows of an outage.

        That may be over, and the life of this process may be short, so that the first check comes at
        once.
        """
        self._breaker.open()
