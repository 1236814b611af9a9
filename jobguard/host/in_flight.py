"""What this process may be running, and has run and not yet told: all that its beats list."""

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
    """Deliveries by how many starts of them are under way, for several copies of one may be at once."""

    def __init__(self, pid: int) -> None:
        self.lock = os_threads.lock()
        self.children = ChildSlots()
        self.beat_process: BeatProcess | None = None
        """Who is told of each at once: it may have to beat before the next beat is due."""
        self._pid = pid  # of the worker; a child of it tells it what it runs
        self._starts: dict[UUID, int] = {}
        self._unclaimed: dict[UUID, UUID] = {}  # started while Postgres was away: token -> nonce

    def after_fork(self) -> None:
        """In a forked child: begin with a lock that no thread of the parent holds."""
        self.lock = os_threads.lock()

    def add(self, token: UUID) -> None:
        """One start more of it."""
        with self.lock:
            self._starts[token] = self._starts.get(token, 0) + 1
            if self._is_child():
                self.children.runs(token)
            if self.beat_process is not None:
                self.beat_process.begins(token.hex)

    def remove(self, tokens: Iterable[UUID]) -> None:
        """One start of each is over, and what it may have had to tell is told."""
        with self.lock:
            for token in tokens:
                self._count_down(token)
                self._unclaimed.pop(token, None)

    def skip(self, token: UUID) -> None:
        """One start of it was refused; another of ours, which holds it, may still be without its claim."""
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
        """Nothing else is listed from here on."""
        with self.lock:
            self._starts = {token: 1}
            self.beat_process = None

    def tokens(self) -> frozenset[UUID]:
        """All that is listed. Take the lock."""
        return frozenset(self._starts)

    def without_claim(self, token: UUID, nonce: UUID) -> None:
        """It runs though no claim could be asked for."""
        with self.lock:
            self._unclaimed[token] = nonce

    def claim_resolved(self, token: UUID) -> None:
        """It has its claim, or needs none any more."""
        with self.lock:
            self._unclaimed.pop(token, None)

    def unclaimed(self) -> list[tuple[UUID, UUID]]:
        """Tokens that wait for their claims, and the nonces of their starts."""
        with self.lock:
            return list(self._unclaimed.items())

    def _is_child(self) -> bool:
        return self._pid != os.getpid()
