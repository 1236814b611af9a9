"""Check whether this is the Redis that belongs to this ledger.

The check runs when the pulse is not the expected one and this process has never seen the pulse in
this Redis. An empty Redis beside a copy of the database, a mistyped URL, and a demoted master all
look like a loss.
"""

from __future__ import annotations

from collections.abc import Callable
from uuid import UUID

from jobguard.log import log_event
from jobguard.reconciler.workers import Workers
from jobguard.store.protocols import Brake

_PATIENCE = 10.0
"""Seconds in which a worker that started before the loss should have beaten, if there is one."""
_LOG_AGAIN = 30.0
_REASON = "Redis lost its pulse, and no worker that ran before is alive to confirm that it is the right one"


class RedisIdentityCheck:
    """Asks the workers; without workers, the name of the installation; without a name, a person."""

    def __init__(
        self,
        workers: Workers,
        hold: Callable[[int, str, str], None],
        source: int,
        address: str,
        *,
        named: bool,
        clock: Callable[[], float],
    ) -> None:
        """``hold``: holds a queue in this term, for this reason; the next brake shows it."""
        self._workers = workers
        self._hold = hold
        self._source = source
        self._address = address
        self._named = named
        self._clock = clock
        self._asked = False
        self._log_at = float("-inf")

    def is_sure(
        self, term: int, brake: Brake, epoch: UUID | None, missed_since: float, *, own: bool
    ) -> bool | None:
        """Return True if this is the right Redis; None: not known yet.

        A worker that beats into this Redis confirms it. A worker that reads the pulse of ``epoch``
        in another Redis denies it. If there is no worker at all, it is confirmed by an older pulse
        of this ledger (``own``: there is one), or by a named installation, because the name was
        compared already.
        """
        if not self._workers.polled:
            return None
        alive = self._workers.alive()
        for row in alive:
            sees_it = row.pulse is not None and row.pulse[0] == epoch
            if sees_it and not self._workers.is_silent(row) and not self._workers.beats_here(row):
                self._log_wrong()
                return False
        if any(self._workers.beats_here(row) for row in alive):
            return True
        waited = self._clock() - missed_since >= _PATIENCE
        if alive and not waited:
            return None  # These workers have not beaten yet, in this Redis or in another one.
        if self._named or own:
            return True
        if self._asked:
            return None if brake.holds(self._source, "*") else True
        if waited:
            self._ask(term)
        return None

    def _log_wrong(self) -> None:
        if self._clock() >= self._log_at:
            self._log_at = self._clock() + _LOG_AGAIN
            log_event("wrong_redis", source=self._address)

    def _ask(self, term: int) -> None:
        self._asked = True
        self._hold(term, "*", _REASON)
        log_event("place_unsure", source=self._address, reason=_REASON)
