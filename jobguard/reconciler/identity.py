"""The right place: whether this is the Redis that belongs to this ledger.

Asked where the pulse is not what it was, and this process has never seen it here. An empty Redis
beside a copy of the database, a mistyped URL, a demoted master: they all look like a loss.
"""

from __future__ import annotations

from collections.abc import Callable
from uuid import UUID

from jobguard.log import log_event
from jobguard.reconciler.workers import Workers
from jobguard.store.protocols import Brake, LeaderStore

_PATIENCE = 10.0
"""Seconds in which a worker of before should have beaten, if there is one."""
_SAY_AGAIN = 30.0
_REASON = "redis lost its pulse and no worker of before is alive to say that it is the right one"


class RedisIdentityCheck:
    """Judges by the workers; where there are none, by the name; else asks a person."""

    def __init__(
        self,
        workers: Workers,
        store: LeaderStore,
        source: int,
        address: str,
        *,
        named: bool,
        clock: Callable[[], float],
    ) -> None:
        self._workers = workers
        self._store = store
        self._source = source
        self._address = address
        self._named = named
        self._clock = clock
        self._asked = False
        self._say_at = float("-inf")

    def is_sure(
        self, term: int, brake: Brake, epoch: UUID | None, missed_since: float, *, own: bool
    ) -> bool | None:
        """Whether this is the right Redis; None: not known yet.

        A worker that beats into this very Redis says yes; one that sees the pulse of ``epoch`` alive
        elsewhere says no. Where there is no worker at all, a pulse of this ledger says yes (``own``:
        there is one, only an older), and so does a named installation, whose name has been compared.
        """
        if not self._workers.polled:
            return None
        alive = self._workers.alive()
        for row in alive:
            sees_it = row.pulse is not None and row.pulse[0] == epoch
            if sees_it and not self._workers.is_silent(row) and not self._workers.beats_here(row):
                self._say_wrong()
                return False
        if any(self._workers.beats_here(row) for row in alive):
            return True
        waited = self._clock() - missed_since >= _PATIENCE
        if alive and not waited:
            return None  # they have yet to beat, here or elsewhere
        if self._named or own:
            return True
        if self._asked:
            return None if brake.holds(self._source, "*") else True
        if waited:
            self._ask(term)
        return None

    def _say_wrong(self) -> None:
        if self._clock() >= self._say_at:
            self._say_at = self._clock() + _SAY_AGAIN
            log_event("wrong_redis", source=self._address)

    def _ask(self, term: int) -> None:
        self._asked = True
        self._store.hold(term, self._source, "*", _REASON)
        log_event("place_unsure", source=self._address, reason=_REASON)
