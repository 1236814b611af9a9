"""Simulated processes with simulated threads, locks and clocks, in one thread of the operating system.

``install()`` replaces the clocks of ``time`` and the threads and locks of ``threading``, before any other
module of jobguard is imported. Inside a simulated thread they are simulated, elsewhere they are the real
ones. The product's code therefore runs unchanged.

A simulated thread is a greenlet. It runs until it reaches a *point*: a call to a store or to Redis, a
sleep, or a wait for a lock. There the kernel chooses, by a seeded generator, which thread runs next. So
every interleaving of the calls is possible, a process can die before and after each call, and the same
seed gives the same run.
"""

from __future__ import annotations

import heapq
import itertools
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import greenlet

EPOCH = 1_800_000_000.0
"""The wall clock of a process without skew at the beginning of a run."""
_POINT = 0.002
"""The most seconds that pass at a point."""

_MOST_POINTS = 300_000
"""The most points of one run; a usual one has some thousands."""

_real_time, _real_monotonic, _real_sleep = time.time, time.monotonic, time.sleep
_RealThread = threading.Thread


class Killed(BaseException):
    """Ends a simulated thread whose process was killed. The product must not catch it."""


@dataclass(eq=False)
class Process:
    """A simulated process: its clocks differ from those of others, and it can be killed or stopped."""

    name: str
    skew: float = 0.0
    """Seconds that its wall clock is ahead."""
    alive: bool = True
    stopped: bool = False
    """It makes no progress, as after SIGSTOP."""
    threads: list[Thread] = field(default_factory=list)
    last_tick: int = 0
    """The newest tick in a token of this process; see jobguard.model.new_token."""


@dataclass(eq=False)
class Thread:
    """A simulated thread."""

    process: Process
    name: str
    greenlet: greenlet.greenlet
    wake_at: float | None = None
    """It sleeps until then, at most."""
    ready: bool = True
    turn: int = 0
    """Counts its waits, so that an old entry of the heap is recognised."""
    woken: bool = False
    """Its last wait ended before its time."""
    error: BaseException | None = None


class Kernel:
    """Runs simulated threads, one at a time, in an order that a seed decides."""

    current: Kernel | None = None

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.thread: Thread | None = None
        self.errors: list[tuple[str, BaseException]] = []
        """Errors that ended a simulated thread."""
        self.points = 0
        self._ready: list[Thread] = []
        self._sleeping: list[tuple[float, int, int, Thread]] = []
        self._number = itertools.count()
        self._main = greenlet.getcurrent()
        self.on_switch: Callable[[Process | None, Process], None] = lambda _before, _now: None

    # -- processes ---------------------------------------------------------------------------------

    def start(self, process: Process, work: Callable[[], object], name: str) -> Thread:
        """Start a thread in a process."""

        def run() -> None:
            try:
                work()
            except Killed:
                pass
            except BaseException as error:
                thread.error = error
                self.errors.append((f"{process.name} {name}", error))

        thread = Thread(process, name, greenlet.greenlet(run, parent=self._main))
        process.threads.append(thread)
        self._ready.append(thread)
        return thread

    def kill(self, process: Process) -> None:
        """End a process at once; the calls that it has begun are not undone."""
        process.alive = False
        if self.thread is not None and self.thread.process is process:
            raise Killed
        self._bury(process)

    def _bury(self, process: Process) -> None:
        self._ready = [thread for thread in self._ready if thread.process is not process]
        for thread in process.threads:
            thread.ready = False
            thread.turn += 1
            before, self.thread = self.thread, thread
            if not thread.greenlet.dead and thread.greenlet:
                thread.greenlet.throw(Killed)
            self.thread = before
        process.threads.clear()

    # -- what a simulated thread calls ---------------------------------------------------------------

    def point(self) -> None:
        """Let other threads run; the process may be killed meanwhile."""
        thread = self._mine()
        self.points += 1
        self.now += self.random.random() * _POINT
        self._ready.append(thread)
        self._main.switch()
        self._check(thread)

    def wait(self, seconds: float | None) -> bool:
        """Wait until ``wake``, at most so long; return True if it was woken."""
        thread = self._mine()
        thread.ready, thread.woken = False, False
        thread.turn += 1
        if seconds is not None:
            until = self.now + max(0.0, seconds)
            heapq.heappush(self._sleeping, (until, next(self._number), thread.turn, thread))
        self._main.switch()
        self._check(thread)
        return thread.woken

    def wake(self, thread: Thread) -> None:
        """End the wait of a thread."""
        if not thread.ready and thread.process.alive:
            thread.ready, thread.woken = True, True
            thread.turn += 1
            self._ready.append(thread)

    def _mine(self) -> Thread:
        thread = self.thread
        assert thread is not None, "this is not a simulated thread"
        self._check(thread)
        return thread

    def _check(self, thread: Thread) -> None:
        if not thread.process.alive:
            raise Killed

    # -- the run -----------------------------------------------------------------------------------

    def run(self, until: float) -> None:
        """Run until this time; the caller is not a simulated thread."""
        before: Process | None = None
        while self.now < until:
            if self.points > _MOST_POINTS:
                raise RuntimeError(f"no end after {self.points} calls")
            self._wake_sleepers()
            thread = self._next()
            if thread is None:
                if not self._sleeping:
                    self.now = until
                    return
                self.now = min(until, max(self.now, self._sleeping[0][0]))
                continue
            if before is not thread.process:
                self.on_switch(before, thread.process)
                before = thread.process
            self.thread = thread
            thread.greenlet.switch()
            self.thread = None
            if not thread.process.alive:
                self._bury(thread.process)

    def _wake_sleepers(self) -> None:
        while self._sleeping and self._sleeping[0][0] <= self.now:
            _, _, turn, thread = heapq.heappop(self._sleeping)
            if turn == thread.turn and not thread.ready:
                thread.ready = True
                self._ready.append(thread)

    def _next(self) -> Thread | None:
        ready = self._ready
        for _ in range(3 * len(ready)):
            at = int(self.random.random() * len(ready))
            if not ready[at].process.stopped:
                ready[at], ready[-1] = ready[-1], ready[at]
                return ready.pop()
        for at, thread in enumerate(ready):
            if not thread.process.stopped:
                return ready.pop(at)
        return None


def _simulated() -> tuple[Kernel, Thread] | None:
    kernel = Kernel.current
    if kernel is None or kernel.thread is None:
        return None
    return kernel, kernel.thread


# -- clocks ------------------------------------------------------------------------------------------


def _time() -> float:
    found = _simulated()
    return _real_time() if found is None else EPOCH + found[0].now + found[1].process.skew


def _time_ns() -> int:
    return int(_time() * 1e9)


def _monotonic() -> float:
    found = _simulated()
    return _real_monotonic() if found is None else found[0].now


def _sleep(seconds: Any, /) -> None:
    found = _simulated()
    if found is None:
        _real_sleep(seconds)
    else:
        found[0].wait(float(seconds))


# -- threads and locks -------------------------------------------------------------------------------


class SimulatedLock:
    """A lock that lets other simulated threads run while it waits."""

    def __init__(self) -> None:
        self._taken = False
        self._waiting: list[Thread] = []

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take the lock; see threading.Lock."""
        if not self._taken:
            self._taken = True
            return True
        found = _simulated()
        if not blocking or found is None:
            assert not blocking, "a lock is taken, and nobody could release it"
            return False
        kernel, thread = found
        until = None if timeout < 0 else kernel.now + timeout
        while self._taken:
            left = None if until is None else until - kernel.now
            if left is not None and left <= 0:
                return False
            self._waiting.append(thread)
            try:
                kernel.wait(left)
            finally:
                if thread in self._waiting:
                    self._waiting.remove(thread)
        self._taken = True
        return True

    def release(self) -> None:
        """Release the lock; see threading.Lock."""
        if not self._taken:
            raise RuntimeError("release unlocked lock")
        self._taken = False
        if self._waiting and Kernel.current is not None:
            Kernel.current.wake(self._waiting.pop(0))

    def locked(self) -> bool:
        """Return True if it is taken."""
        return self._taken

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _at_fork_reinit(self) -> None:
        self._taken = False
        self._waiting.clear()


class SimulatedRLock:
    """A lock that its owner may take again."""

    def __init__(self) -> None:
        self._lock = SimulatedLock()
        self._owner: object = None
        self._count = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take the lock; see threading.RLock."""
        me = greenlet.getcurrent()
        if self._owner is not me:
            if not self._lock.acquire(blocking, timeout):
                return False
            self._owner = me
        self._count += 1
        return True

    def release(self) -> None:
        """Release the lock; see threading.RLock."""
        if not self._is_owned():
            raise RuntimeError("cannot release un-acquired lock")
        self._count -= 1
        if not self._count:
            self._owner = None
            self._lock.release()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _at_fork_reinit(self) -> None:
        self.__init__()  # type: ignore[misc]

    # threading.Condition asks for these.

    def _is_owned(self) -> bool:
        return self._owner is greenlet.getcurrent()

    def _release_save(self) -> tuple[int, object]:
        state = self._count, self._owner
        self._count, self._owner = 0, None
        self._lock.release()
        return state

    def _acquire_restore(self, state: tuple[int, object]) -> None:
        self._lock.acquire()
        self._count, self._owner = state


class SimulatedEvent:
    """An event that lets other simulated threads run while it waits."""

    def __init__(self) -> None:
        self._set = False
        self._waiting: list[Thread] = []

    def is_set(self) -> bool:
        """Return True if it is set."""
        return self._set

    def set(self) -> None:
        """Wake all waiting threads."""
        self._set = True
        waiting, self._waiting = self._waiting, []
        for thread in waiting:
            if Kernel.current is not None:
                Kernel.current.wake(thread)

    def clear(self) -> None:
        """Make wait() wait again."""
        self._set = False

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set; see threading.Event."""
        found = _simulated()
        if self._set:
            return True
        assert found is not None, "an event is waited for, and nobody could set it"
        kernel, thread = found
        until = None if timeout is None else kernel.now + timeout
        while not self._set:
            left = None if until is None else until - kernel.now
            if left is not None and left <= 0:
                break
            self._waiting.append(thread)
            try:
                kernel.wait(left)
            finally:
                if thread in self._waiting:
                    self._waiting.remove(thread)
        return self._set


class SimulatedThread(_RealThread):
    """A thread of the simulation, if a simulated thread starts it."""

    def start(self) -> None:
        """Start it; see threading.Thread."""
        found = _simulated()
        if found is None:
            super().start()
            return
        kernel, thread = found
        self._thread = kernel.start(thread.process, self.run, self.name)

    def is_alive(self) -> bool:
        """Return True until it has ended; see threading.Thread."""
        thread: Thread | None = getattr(self, "_thread", None)
        return super().is_alive() if thread is None else not thread.greenlet.dead

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended; see threading.Thread."""
        found = _simulated()
        if found is None or not hasattr(self, "_thread"):
            super().join(timeout)
            return
        until = None if timeout is None else found[0].now + timeout
        while self.is_alive() and (until is None or found[0].now < until):
            found[0].wait(0.05)


def install() -> None:
    """Replace clocks, threads, locks and random bytes of this interpreter; call it before other imports."""
    time.time, time.time_ns = _time, _time_ns
    time.monotonic, time.sleep = _monotonic, _sleep
    replaced: dict[str, Any] = {
        "Lock": SimulatedLock,
        "RLock": SimulatedRLock,
        "Event": SimulatedEvent,
        "Thread": SimulatedThread,
    }
    for name, made in replaced.items():
        setattr(threading, name, made)
    os.urandom = _random_bytes


def _random_bytes(size: int, /) -> bytes:
    kernel = Kernel.current
    return random.randbytes(size) if kernel is None else kernel.random.randbytes(size)
