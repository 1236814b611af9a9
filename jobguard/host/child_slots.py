"""Memory that a worker shares with its forked children.

A worker reports in its beats since when its reports wait for Postgres, so that no leader decides
about its jobs from an incomplete ledger, and which deliveries run under it. A child that runs tasks
keeps in its own memory the reports that it could not write and the deliveries that it runs. Its
worker must know both, because the library can forget a child's task, as Celery does when the
connection to Redis breaks. A child also claims with its worker's id, so it must know whether
Postgres knows that id.
"""

from __future__ import annotations

import mmap
import os
import struct
from uuid import UUID

_WORKER = 16
_HEAD = 32
"""The bytes before the slots: the id of the worker, and the delivery that runs alone."""
_SLOTS = 1024
_SLOT = struct.Struct("=qd16s")
_SINCE = struct.Struct("=d")
_SINCE_AT, _TOKEN_AT = 8, 16
_NOTHING = bytes(16)


class ChildSlots:
    """For each child: since when it has reports that Postgres does not have, and the delivery that it runs.

    Create it before the first fork. A child takes the first free slot from its pid on, as long as
    fewer than 1,024 children are alive.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _HEAD + _SLOTS * _SLOT.size)
        self._own: tuple[int, int] | None = None
        """The pid of the slot's owner, and the position: a child inherits the value of its parent."""

    def introduce(self, worker: UUID) -> None:
        """Store, in the worker, the id by which Postgres knows it."""
        self._memory[:_WORKER] = worker.bytes

    def worker(self) -> UUID | None:
        """Return the id by which Postgres knows the worker; None if it knows none yet."""
        name = self._memory[:_WORKER]
        return UUID(bytes=name) if name != _NOTHING else None

    def set_only(self, token: UUID | None) -> None:
        """Store, in the worker, the delivery that runs alone among its children; None if there is none."""
        self._memory[_WORKER:_HEAD] = token.bytes if token is not None else _NOTHING

    def only(self) -> UUID | None:
        """Return the delivery that runs alone, or None."""
        token = self._memory[_WORKER:_HEAD]
        return UUID(bytes=token) if token != _NOTHING else None

    def note(self, since: float | None) -> None:
        """Note that this process has waiting reports since then; None if it has none any more."""
        _SINCE.pack_into(self._memory, self._slot() + _SINCE_AT, since or 0.0)

    def runs(self, token: UUID | None) -> None:
        """Note that this process runs this delivery; None if it runs none any more."""
        at = self._slot() + _TOKEN_AT
        self._memory[at : at + len(_NOTHING)] = token.bytes if token is not None else _NOTHING

    def oldest(self) -> float | None:
        """Return since when a live child has waiting reports; a dead child's reports are lost."""
        waiting = [since for pid, since, _ in self._slots() if since and _lives(pid)]
        return min(waiting, default=None)

    def running(self) -> frozenset[UUID]:
        """Return the deliveries that live children of this process run."""
        return frozenset(
            UUID(bytes=token)
            for pid, _, token in self._slots()
            if token != _NOTHING and _is_our_child(pid)
        )

    def _slot(self) -> int:
        pid = os.getpid()
        if self._own is None or self._own[0] != pid:
            self._own = pid, self._allocate(pid)
        return self._own[1]

    def _allocate(self, pid: int) -> int:
        for slot, (owner, _, _) in enumerate(self._slots()):
            if owner == pid:  # left by a dead process with the same pid
                _SLOT.pack_into(self._memory, _at(slot), 0, 0.0, _NOTHING)
        at = first = pid % _SLOTS
        while self._is_taken(at):
            at = (at + 1) % _SLOTS
            if at == first:
                break
        _SLOT.pack_into(self._memory, _at(at), pid, 0.0, _NOTHING)
        return _at(at)

    def _is_taken(self, slot: int) -> bool:
        owner: int = _SLOT.unpack_from(self._memory, _at(slot))[0]
        return owner not in (0, os.getpid()) and _lives(owner)

    def _slots(self) -> list[tuple[int, float, bytes]]:
        return list(_SLOT.iter_unpack(self._memory[_HEAD:]))


def _at(slot: int) -> int:
    return _HEAD + slot * _SLOT.size


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _is_our_child(pid: int) -> bool:
    """Return True if this is a running child of this process, and not another process with a reused pid."""
    if not hasattr(os, "waitid"):
        return _lives(pid)
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False
