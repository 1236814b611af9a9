"""The process that an object belongs to. A forked child has a copy of every object of its parent."""

from __future__ import annotations

import os


class OwnerProcess:
    """Remember the process that made an object."""

    __slots__ = ("pid",)

    def __init__(self) -> None:
        self.pid = os.getpid()

    @property
    def is_current(self) -> bool:
        """Return False in a forked child."""
        return self.pid == os.getpid()

    def take_over(self) -> bool:
        """Make this process the owner; return True if it was another one."""
        if self.is_current:
            return False
        self.pid = os.getpid()
        return True
