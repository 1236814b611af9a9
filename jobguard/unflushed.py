"""What the forked children of a worker have not written yet, in memory that they share with it.

A worker says in its beats since when reports of its own wait for Postgres, so that nobody judges its
jobs by a ledger that has not heard of them. A child that runs tasks keeps in its own memory what it
could not write, and its worker must know.
"""

from __future__ import annotations

import mmap
import os
import struct

_SLOTS = 1024
_SLOT = struct.Struct("=qd")


class Unflushed:
    """Since when each child has reports that Postgres does not have; made before the first fork.

    A child has the slot of its pid. Two that share one (of a thousand children) overwrite each other.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _SLOTS * _SLOT.size)

    def note(self, since: float | None) -> None:
        """This process has reports since then; None: none any more."""
        pid = os.getpid()
        _SLOT.pack_into(self._memory, pid % _SLOTS * _SLOT.size, pid, since or 0.0)

    def oldest(self) -> float | None:
        """Since when a child that lives has reports. What a dead one had is lost with it."""
        waiting = [
            since for pid, since in _SLOT.iter_unpack(self._memory[:]) if since and _lives(pid)
        ]
        return min(waiting, default=None)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
