"""What a worker and its forked children tell each other, in memory that they share.

A worker says in its beats since when reports of its own wait for Postgres, so that nobody judges its
jobs by a ledger that has not heard of them; and which deliveries run under it. A child that runs tasks
keeps in its own memory what it could not write and what it runs, and its worker must know: the
library's own books forget a child's task, as Celery's do when the connection to Redis breaks. And a child
claims in its worker's name: it must know whether Postgres has heard of that.
"""

from __future__ import annotations

import mmap
import os
import struct
from uuid import UUID

_WORKER = 16
_SLOTS = 1024
_SLOT = struct.Struct("=qd16s")
_SINCE = struct.Struct("=d")
_SINCE_AT, _TOKEN_AT = 8, 16
_NOTHING = bytes(16)


class ChildSlots:
    """Since when each child has reports that Postgres does not have, and what it runs.

    Made before the first fork. A child has the first slot from its pid on that no other has, as long as
    not all of a thousand live.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _WORKER + _SLOTS * _SLOT.size)
        self._own: tuple[int, int] | None = None
        """Whose slot this is, and where: a child inherits that of its parent."""

    def introduce(self, worker: UUID) -> None:
        """In the worker: Postgres knows it by this name."""
        self._memory[:_WORKER] = worker.bytes

    def worker(self) -> UUID | None:
        """By which name Postgres knows the worker; None: by none yet."""
        name = self._memory[:_WORKER]
        return UUID(bytes=name) if name != _NOTHING else None

    def note(self, since: float | None) -> None:
        """This process has reports since then; None: none any more."""
        _SINCE.pack_into(self._memory, self._slot() + _SINCE_AT, since or 0.0)

    def runs(self, token: UUID | None) -> None:
        """This process runs this delivery; None: none any more."""
        at = self._slot() + _TOKEN_AT
        self._memory[at : at + len(_NOTHING)] = token.bytes if token is not None else _NOTHING

    def oldest(self) -> float | None:
        """Since when a child that lives has reports. What a dead one had is lost with it."""
        waiting = [since for pid, since, _ in self._slots() if since and _lives(pid)]
        return min(waiting, default=None)

    def running(self) -> frozenset[UUID]:
        """What children of this very process run, as far as they live."""
        return frozenset(
            UUID(bytes=token)
            for pid, _, token in self._slots()
            if token != _NOTHING and _is_our_child(pid)
        )

    def _slot(self) -> int:
        pid = os.getpid()
        if self._own is None or self._own[0] != pid:
            self._own = pid, self._taken(pid)
        return self._own[1]

    def _taken(self, pid: int) -> int:
        for slot, (owner, _, _) in enumerate(self._slots()):
            if owner == pid:  # left by a dead one with our number
                _SLOT.pack_into(self._memory, _at(slot), 0, 0.0, _NOTHING)
        at = first = pid % _SLOTS
        while self._is_anothers(at):
            at = (at + 1) % _SLOTS
            if at == first:
                break
        _SLOT.pack_into(self._memory, _at(at), pid, 0.0, _NOTHING)
        return _at(at)

    def _is_anothers(self, slot: int) -> bool:
        owner: int = _SLOT.unpack_from(self._memory, _at(slot))[0]
        return owner not in (0, os.getpid()) and _lives(owner)

    def _slots(self) -> list[tuple[int, float, bytes]]:
        return list(_SLOT.iter_unpack(self._memory[_WORKER:]))


def _at(slot: int) -> int:
    return _WORKER + slot * _SLOT.size


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _is_our_child(pid: int) -> bool:
    """Whether this is a child of ours that runs: not a dead one's number, given to somebody else."""
    if not hasattr(os, "waitid"):
        return _lives(pid)
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False
