"""The push of one message: record, then push.

If Redis is away the record alone is kept, for the leader to push. What a worker sends (a retry, a move
from the delay queue, what goes on from a job) is accepted whatever the settings say: Dramatiq would
swallow the error, and lose it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import redis

from jobguard import failpoint
from jobguard.adapters.dramatiq.run import Run
from jobguard.clients import take_connection
from jobguard.job import Delivery, Recorded

if TYPE_CHECKING:
    from jobguard.adapter import Tracker

log = logging.getLogger("jobguard")

BROKER_DOWN = (redis.ConnectionError, redis.TimeoutError)


@dataclass(slots=True)
class Push:
    """One message on its way, with what is needed to send it."""

    tracker: Tracker
    delivery: Delivery
    connect: Callable[[], None]
    """Reach Redis, without sending anything."""
    send: Callable[[], None]
    run: Run | None = None
    """The run that sends it."""
    supersedes: bool = False
    """It takes the place of that run."""

    def make(self) -> None:
        """Record it and push it, for whoever waits for that. Raises as Redis does, if at all."""
        if self.tracker.hold([self.delivery], self._go_on_held):
            return
        in_doubt = self.tracker.broker_in_doubt()
        # Reached before the record: if this fails, surely nothing was sent.
        down = None if in_doubt else self._unless_up()
        if not in_doubt and down is None:
            begun = time.monotonic()
            recorded = self.tracker.record([self.delivery])
            if not self._is_owed(recorded):
                return
            unwritten = recorded.spooled or recorded.lost  # then no leader can have pushed it
            if time.monotonic() - begun <= self.tracker.push_deadline or unwritten:
                self._go_on(recorded)
            else:
                self.tracker.leave_to_outbox([self.delivery.token])
            return
        recorded = self.tracker.record([self.delivery], outbox=True)
        if not self._is_owed(recorded) or self.tracker.accepts_without_broker(recorded):
            return
        down = down or self._unless_up()
        if down is None:
            self._go_on(recorded)
        elif not self._is_accepted(recorded):
            self.tracker.withdraw([self.delivery])
            raise down

    def _go_on_held(self, recorded: Recorded) -> None:
        """It is recorded with the others of its batch: push it, unless Redis hangs."""
        if not self._is_owed(recorded):
            return
        if self.tracker.broker_in_doubt() and self.tracker.accepts_without_broker(recorded):
            self.tracker.leave_to_outbox([self.delivery.token])
            return
        self._go_on(recorded)

    def _go_on(self, recorded: Recorded) -> None:
        written = not (recorded.spooled or recorded.lost)
        failpoint.hit("after_record", when=written)
        failpoint.hit("after_move_record", when=written and self.delivery.parent is not None)
        try:
            self.send()
        except BaseException as error:
            if isinstance(error, BROKER_DOWN):
                self.tracker.broker_failed()
            self.tracker.leave_to_outbox([self.delivery.token])
            if isinstance(error, BROKER_DOWN) and self._is_accepted(recorded):
                return
            id = self.delivery.job_id
            error.add_note(f"jobguard: it may have reached Redis, and stays recorded: job {id}")
            raise
        failpoint.hit("after_push", when=written)

    def _is_owed(self, recorded: Recorded) -> bool:
        """Whether it is to be pushed at all; from here on it stands in its parent's place."""
        refused = self.delivery.token in recorded.refused
        if refused:
            log.info("message %s has ended or moved on; it is not pushed", self.delivery.job_id)
        if self.run is not None and self.supersedes and not recorded.lost:
            self.run.superseded, self.run.spooled = True, recorded.spooled
        return not refused

    def _is_accepted(self, recorded: Recorded) -> bool:
        """Whether its record is enough, so that nobody need hear that it was not pushed."""
        if self.delivery.parent is not None or self.delivery.derived:
            return not recorded.lost
        return self.tracker.accepts_without_broker(recorded)

    def _unless_up(self) -> BaseException | None:
        try:
            self.connect()
        except BROKER_DOWN as error:
            self.tracker.broker_failed()
            return error
        return None


def reach(client: Any) -> None:
    """Connect to Redis, if no connection is open. Raises as the client does."""
    pool = getattr(client, "connection_pool", None)
    if pool is not None:
        pool.release(take_connection(pool, "EVALSHA"))
