"""A turn: what a signal cannot leave taken."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from random import Random
from typing import Any

import pytest

from jobguard.locks import Turn


def others_turn(turn: Turn) -> bool:
    """Return True if another thread gets the turn; it frees it again."""

    def get() -> bool:
        taken = turn.take(0)
        if taken:
            turn.free()
        return taken

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(get).result(10)


def test_one_thread_has_the_turn() -> None:
    """Others get it when it is freed; the thread that has it does not get it again."""
    turn = Turn()
    assert turn.take(0) and not others_turn(turn) and not turn.take(10)
    turn.free()
    assert others_turn(turn)


def test_another_thread_waits_for_it() -> None:
    """It waits as long as it wants, and no longer."""
    turn = Turn()
    assert turn.take(0)
    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(turn.take, 0.01).result(10)
        waiting = pool.submit(turn.take, 10)
        turn.free()
        assert waiting.result(10)


class Interrupted:
    """A lock whose taker is interrupted by a signal, before it has it or after."""

    def __init__(self, lock: Any, when: str) -> None:
        self.lock = lock
        self.release, self._is_owned = lock.release, lock._is_owned
        self._when = when

    def acquire(self, *given: Any) -> None:
        """Take it, or not, and be interrupted."""
        if self._when == "after":
            self.lock.acquire(*given)
        raise KeyboardInterrupt


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_leaves_no_turn_taken(when: str) -> None:
    """The interrupted caller does not know whether it had the turn."""
    turn = Turn()
    turn._lock = Interrupted(turn._lock, when)
    with pytest.raises(KeyboardInterrupt):
        turn.take(0)
    turn._lock = turn._lock.lock
    assert others_turn(turn)


def test_a_signal_that_comes_with_the_last_step_leaves_no_turn_taken() -> None:
    """Many interrupts at any step leave a turn that others can take."""
    turn = Turn()

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    random = Random(1)
    try:
        for _ in range(2_000):
            with suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 5e-5))
                while True:
                    if turn.take(0):
                        try:
                            pass
                        finally:
                            turn.free()
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert others_turn(turn)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
