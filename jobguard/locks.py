"""A lock that stays usable if a signal interrupts a caller that takes or frees it.

A host may raise an exception in its main thread by a signal, at any moment: a time limit, a shutdown. A
plain lock that was taken just before is then never released, and every later caller waits for nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any


def lock() -> Any:
    """Return a lock of ``threading`` as it is now, for the fields of dataclasses.

    gevent may replace it after the import of this module: a wait for an older lock stops all greenlets.
    """
    return threading.Lock()


class Turn:
    """The turn of one thread.

    Take it as the last step before a ``try`` block, or inside of it, and free it in its ``finally``: Python
    handles no signal between these steps.
    """

    __slots__ = ("_lock", "free")

    def __init__(self) -> None:
        # Unlike a plain lock, this one is released only by the thread that has it.
        self._lock: Any = threading.RLock()
        self.free: Callable[[], None] = self._lock.release
        """Free the turn. A method in Python could be interrupted before its first step."""

    def take(self, timeout: float) -> bool:
        """Take the turn; return False if another thread has it for longer than ``timeout`` seconds.

        Return False at once if this thread has it.
        """
        if self._lock._is_owned():  # threading.Condition asks a lock in the same way
            return False
        try:
            taken: bool = self._lock.acquire(timeout > 0, timeout if timeout > 0 else -1)
        except BaseException:  # a signal raised it, before the turn was taken or after
            with suppress(RuntimeError):
                self._lock.release()
            raise
        return taken
