"""The deliveries in flight: they may run in this process, or they ran and are not reported yet."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING
from uuid import UUID

from jobguard import os_threads
from jobguard.host.child_slots import ChildSlots

if TYPE_CHECKING:
    from jobguard.host.beat_process import BeatProcess


class InFlight:
    """Deliveries with the number of their unfinished starts: several copies of one may run at once."""

    def __init__(self, pid: int) -> None:
        self.lock = os_threads.lock()
        self.children = ChildSlots()
        self.beat_process: BeatProcess | None = None
        """The beat process; it receives each start before the claim, because it may beat before the
        next beat is due.
        """
        self._pid = pid  # of the worker; a child reports its delivery to it
        self._starts: dict[UUID, int] = {}
        self._unclaimed: dict[UUID, UUID] = {}  # started while Postgres was away: token -> nonce

    def after_fork(self) -> None:
        """Create a new lock in a forked child: the old one may belong to a thread of the parent."""
        self.lock = os_threads.lock()

    def add(self, token: UUID) -> None:
        """Count one more start of this delivery; `report` follows before its claim is requested."""
        with self.lock:
            self._starts[token] = self._starts.get(token, 0) + 1
            if self._is_child():
                self.children.runs(token)
            if self.beat_process is not None:
                self.beat_process.begins(token.hex)

    def report(self) -> None:
        """Report the starts so far to the beat process, with one write for all threads."""
        beat_process = self.beat_process
        if beat_process is not None:
            beat_process.flush()

    def remove(self, tokens: Iterable[UUID]) -> None:
        """Count one start less of each delivery, because its reports are written."""
        with self.lock:
            for token in tokens:
                self._count_down(token)
                self._unclaimed.pop(token, None)

    def skip(self, token: UUID) -> None:
        """Count down one refused start; another start of this process may still wait for its claim."""
        with self.lock:
            self._count_down(token)

    def _count_down(self, token: UUID) -> None:
        count = self._starts.pop(token, 0) - 1
        if count > 0:
            self._starts[token] = count
            return
        if self._is_child():
            self.children.runs(next(reversed(self._starts), None))
        if self.beat_process is not None:
            self.beat_process.ends(token.hex)

    def only(self, token: UUID) -> None:
        """Make this delivery the only one in flight."""
        with self.lock:
            self._starts = {token: 1}
            self.beat_process = None

    def tokens(self) -> frozenset[UUID]:
        """Return all deliveries in flight. The caller takes the lock."""
        return frozenset(self._starts)

    def without_claim(self, token: UUID, nonce: UUID) -> None:
        """Note that this delivery runs although no claim could be requested."""
        with self.lock:
            self._unclaimed[token] = nonce

    def claim_resolved(self, token: UUID) -> None:
        """Note that this delivery has its claim, or needs none any more."""
        with self.lock:
            self._unclaimed.pop(token, None)

    def unclaimed(self) -> list[tuple[UUID, UUID]]:
        """Return the tokens that wait for their claims, and the nonces of their starts."""
        with self.lock:
            return list(self._unclaimed.items())

    def _is_child(self) -> bool:
        return self._pid != os.getpid()
