"""Run a job alone in its process after a worker died while that job ran.

Several jobs share a process where a pool of threads or greenlets runs them, and a worker's children
share the life of its main process. If the process dies, the ledger cannot tell which of the jobs
killed it, and charges each of them once. A job that is already charged runs alone from then on: it
starts when no other guarded job runs in the process, and no other guarded job starts beside it. The
leader then charges the job again only if no other job at the next death was charged as often.

A job that waits here has no claim, because it must not look as if it ran. Every wait has a bound,
because a running job may wait for a job that waits here, and because a process must not stand still
for one long job. Two charged jobs wait longer for each other than other jobs wait for one of them:
beside a job that is not charged, the leader still knows which one killed the process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING
from uuid import UUID

from jobguard import os_threads
from jobguard.errors import JobguardError

if TYPE_CHECKING:
    from jobguard.host.child_slots import ChildSlots
    from jobguard.host.parent import ParentStore

PATIENCE = 300.0
"""The maximum seconds that a charged job waits for another charged job."""
_DRAIN = 15.0
"""Seconds for which no other job starts while a charged job waits for the running jobs."""
_SHUT = 30.0
"""Seconds of its run for which no other job starts beside a charged job."""
_STEP = 0.02
"""Seconds between two checks."""


class Alone:
    """The deliveries that run in this process, and the one that runs alone."""

    def __init__(
        self,
        *,
        patience: float = PATIENCE,
        drain: float = _DRAIN,
        shut: float = _SHUT,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        self._patience, self._drain, self._shut = patience, drain, shut
        self._clock = clock
        self._sleep = sleep
        self._lock = os_threads.lock()
        self._inside: list[UUID] = []
        """One entry for each start, because two copies of one delivery may start at once."""
        self._only: UUID | None = None
        """The delivery that runs alone, or waits until it can."""
        self._until = 0.0
        """The time from which another charged delivery may start beside it."""
        self._shut_until = 0.0
        """The time from which deliveries that are not charged may start beside it."""

    # -- whole waits -------------------------------------------------------------------------------

    def enter(self, token: UUID, patience: float | None = None) -> None:
        """Wait while another delivery runs alone, ``patience`` seconds at most; then count this start."""
        until = self._end_of(self._drain + self._shut, patience)
        while not self.enters(token, anyway=self._clock() >= until):
            self._wait()

    def wait(self, token: UUID, patience: float | None = None) -> None:
        """Leave, and enter again when no other delivery runs, or, after the time limit, beside others."""
        until = self._end_of(self._patience, patience)
        self.leave(token)
        while not self.reserves(token):
            if self._clock() >= until:
                self.enters(token, anyway=True)
                return
            self._wait()
        drained = self._end_of(self._drain, patience)
        while not self.takes_over(token, late=self._clock() >= drained):
            self._wait()

    def _end_of(self, most: float, patience: float | None) -> float:
        return self._clock() + (most if patience is None else min(most, patience))

    def _wait(self) -> None:
        (self._sleep or time.sleep)(_STEP)

    # -- single steps ------------------------------------------------------------------------------

    def enters(self, token: UUID, *, anyway: bool = False) -> bool:
        """Count this start; return False if it must wait because another delivery runs alone."""
        with self._lock:
            self._forget_gone()
            shut = self._only not in (None, token) and self._clock() < self._shut_until
            if shut and not anyway:
                self._keep_out(token)
                return False
            self._let_in(token)
            return True

    def leave(self, token: UUID) -> None:
        """Record that one start of this delivery is over, or waits again."""
        with self._lock:
            self._keep_out(token)
            if self._only == token and not self._runs(token):
                self._set_only(None)

    def take(self, token: UUID) -> bool:
        """Reserve the process for this delivery; return False if another delivery runs here."""
        with self._lock:
            self._forget_gone()
            if not self._is_last(token) or self._only not in (None, token):
                return False
            self._reserve(token, self._shut)
            return True

    def reserves(self, token: UUID) -> bool:
        """Admit no other delivery any more; return False if another charged one waits or runs."""
        with self._lock:
            self._forget_gone()
            self._keep_out(token)
            if self._only not in (None, token) and self._clock() < self._until:
                return False
            self._reserve(token, self._drain + self._shut)
            return True

    def takes_over(self, token: UUID, *, late: bool) -> bool:
        """Count this start; if ``late``, start beside the running deliveries and admit others again."""
        with self._lock:
            self._forget_gone()
            alone = not self._others(token)
            if not alone and not late:
                return False
            if self._only == token:
                self._reserve(token, self._shut if alone else 0.0)
            self._let_in(token)
            return True

    def _reserve(self, token: UUID, seconds: float) -> None:
        self._set_only(token)
        self._shut_until = self._clock() + seconds
        self._until = self._clock() + self._drain + self._patience

    # -- what runs here ----------------------------------------------------------------------------

    def _let_in(self, token: UUID) -> None:
        self._inside.append(token)

    def _keep_out(self, token: UUID) -> None:
        if token in self._inside:
            self._inside.remove(token)

    def _runs(self, token: UUID) -> bool:
        return token in self._inside

    def _others(self, token: UUID) -> bool:
        """Return True if another delivery runs here."""
        return any(other != token for other in self._inside)

    def _is_last(self, token: UUID) -> bool:
        return self._inside == [token]

    def _forget_gone(self) -> None:
        """Forget deliveries whose runs ended without a word."""

    def _set_only(self, token: UUID | None) -> None:
        self._only = token


class AloneAmongChildren(Alone):
    """The same, in a worker whose children run the deliveries: they die with the worker."""

    def __init__(self, slots: ChildSlots) -> None:
        super().__init__()
        self._slots = slots
        self._kept_out: set[UUID] = set()
        """Deliveries whose children wait for their turn."""

    def _let_in(self, token: UUID) -> None:
        self._kept_out.discard(token)

    def _keep_out(self, token: UUID) -> None:
        self._kept_out.add(token)

    def _runs(self, token: UUID) -> bool:
        return token in self._slots.running() - self._kept_out

    def _others(self, token: UUID) -> bool:
        return bool(self._slots.running() - self._kept_out - {token})

    def _is_last(self, token: UUID) -> bool:
        return not self._others(token)

    def _forget_gone(self) -> None:
        running = self._slots.running()
        self._kept_out &= running
        if self._only is not None and self._only not in running:
            self._set_only(None)

    def _set_only(self, token: UUID | None) -> None:
        super()._set_only(token)
        self._slots.set_only(token)


class AloneInChild(Alone):
    """The same, in a child: its worker decides. If the worker does not answer, nothing waits."""

    def __init__(self, slots: ChildSlots, parent: ParentStore) -> None:
        super().__init__()
        self._slots, self._parent = slots, parent

    def enters(self, token: UUID, *, anyway: bool = False) -> bool:
        """Ask the worker only if a delivery runs alone; the slot of this child already shows the start."""
        if self._slots.only() in (None, token):
            return True
        return self._ask("enters", token, anyway=anyway)

    def leave(self, token: UUID) -> None:
        """Do nothing: the slot of this child shows when its run is over."""

    def take(self, token: UUID) -> bool:
        """Ask the worker; see Alone."""
        return self._ask("take", token)

    def reserves(self, token: UUID) -> bool:
        """Ask the worker; see Alone."""
        return self._ask("reserves", token)

    def takes_over(self, token: UUID, *, late: bool) -> bool:
        """Ask the worker; see Alone."""
        return self._ask("takes_over", token, late=late)

    def _ask(self, step: str, token: UUID, **options: bool) -> bool:
        try:
            return bool(self._parent.call("alone", step, token, **options))
        except JobguardError:
            return True
