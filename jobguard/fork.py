"""The process that an object belongs to. A forked child has a copy of every object of its parent."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

_turns: dict[int, Any] = {}
"""A lock of each process by its pid: another thread of the parent may have had the parent's lock."""


class OwnerProcess:
    """Remember the process that made an object."""

    __slots__ = ("_renewing", "pid")

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._renewing = False

    @property
    def is_current(self) -> bool:
        """Return False in a forked child."""
        return self.pid == os.getpid()

    def take_over(self, renew: Callable[[], None]) -> None:
        """Make this process the owner if it is another one, after ``renew`` replaced what is the parent's.

        Other threads of the child wait for that. What ``renew`` calls may call this again.
        """
        if self.is_current:
            return
        with _turns.setdefault(os.getpid(), threading.RLock()):
            if self.is_current or self._renewing:
                return
            self._renewing = True
            try:
                renew()
                self.pid = os.getpid()
            finally:
                self._renewing = False
