"""A push: record it, then have the library send it.

If Redis is away the record alone is kept, for the leader to push. What may have reached Redis is
never taken back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import redis
from kombu.exceptions import OperationalError
from kombu.utils.functional import retry_over_time

from jobguard import failpoint
from jobguard.adapters.celery.places import check_out, client_of
from jobguard.adapters.celery.run import Run
from jobguard.clients import own_client
from jobguard.job import Delivery, Recorded

if TYPE_CHECKING:
    from jobguard.adapter import Tracker

log = logging.getLogger("jobguard")

BROKER_DOWN = (
    redis.ConnectionError,
    redis.TimeoutError,
    redis.exceptions.ReadOnlyError,
    OperationalError,
    OSError,
)
"""What says that Redis is away."""
TIMEOUT = 1.0
"""Seconds that a client of ours waits for Redis at most."""
_PATIENCE = ("max_retries", "interval_start", "interval_step", "interval_max")


@dataclass(slots=True)
class Push:
    """One message that is about to be sent."""

    tracker: Tracker
    app: Any
    delivery: Delivery
    send: Callable[[Any], Any]
    """Has the library send it, by this producer."""
    run: Run | None = None
    """The run whose place it takes, if it is a retry or a replacement."""
    retry: bool = False
    policy: dict[str, Any] | None = None
    """How patient the library is with a Redis that is away."""
    begun: bool = False
    """It is recorded: the library may try to send it again, and need not be asked anything else."""

    def make(self, producer: Any) -> Any:
        """Record it, and send it; what is raised is the library's own, or that Postgres is away."""
        if self.tracker.hold([self.delivery], self._in_batch):
            return None
        down: BaseException | None = None
        in_doubt = self.tracker.broker_in_doubt()
        if not in_doubt:
            # Before the record: if Redis is away now, surely nothing was sent.
            down = self._unless_up(lambda: reach(producer))
        begun = time.monotonic()
        recorded = self._record(outbox=in_doubt or down is not None)
        if in_doubt or down is not None:
            if self._is_refused(recorded) or self.tracker.accepts_without_broker(recorded):
                return None
            down = self._unless_up(lambda: self._be_patient(producer))
            if down is not None:
                self._not_taken()
                raise down
        elif self._is_late(begun, recorded):
            self.tracker.leave_to_outbox([self.delivery.token])
            return None
        return self._push(producer, recorded)

    def _in_batch(self, recorded: Recorded) -> None:
        """The same at the end of a batch, when all of it is recorded."""
        self._settle(recorded)
        if self.tracker.broker_in_doubt() and self.tracker.accepts_without_broker(recorded):
            self.tracker.leave_to_outbox([self.delivery.token])
            return
        # The producer of then may be in other hands by now.
        with (
            self.app.producer_or_acquire() as producer,
            producer.connection._reraise_as_library_errors(),
        ):
            self._push(producer, recorded)

    def _push(self, producer: Any, recorded: Recorded) -> Any:
        if self._is_refused(recorded):
            log.info("task %s has ended or moved on; it is not sent", self.delivery.job_id)
            return None
        written = not (recorded.spooled or recorded.lost)
        moves = self.delivery.parent is not None
        failpoint.hit("after_move_record" if moves else "after_record", when=written)
        try:
            sent = self.send(producer)
        except redis.ResponseError as error:
            if not isinstance(error, BROKER_DOWN):  # it answered: it did not take it
                self._not_taken()
                raise
            return self._in_the_dark(error, recorded)
        except BaseException as error:
            return self._in_the_dark(error, recorded)
        failpoint.hit("after_push", when=written)
        return sent

    def _record(self, *, outbox: bool) -> Recorded:
        recorded = self.tracker.record([self.delivery], outbox=outbox)
        self.begun = True
        self._settle(recorded)
        return recorded

    def _settle(self, recorded: Recorded) -> None:
        """Tell the run whose place is taken: its record was superseded in that very transaction."""
        if self.run is not None:
            self.run.superseded_by(None if self._is_refused(recorded) else self.delivery.token)

    def _is_refused(self, recorded: Recorded) -> bool:
        return self.delivery.token in recorded.refused

    def _is_late(self, begun: float, recorded: Recorded) -> bool:
        unwritten = recorded.spooled or recorded.lost  # then no leader can have pushed it
        return time.monotonic() - begun > self.tracker.push_deadline and not unwritten

    def _not_taken(self) -> None:
        """Surely nothing of it is in Redis."""
        self.begun = self.delivery.parent is not None
        if self.delivery.parent is None:
            self.tracker.withdraw([self.delivery])
        else:
            self.tracker.leave_to_outbox([self.delivery.token])

    def _in_the_dark(self, error: BaseException, recorded: Recorded) -> None:
        """It may have reached Redis or not: the leader shall see to it."""
        self.tracker.leave_to_outbox([self.delivery.token])
        if isinstance(error, BROKER_DOWN):
            self.tracker.broker_failed()
            if self.tracker.accepts_without_broker(recorded):
                return
        error.add_note(
            f"jobguard: it may have reached Redis, and stays recorded: task {self.delivery.job_id}"
        )
        raise error

    def _unless_up(self, ask: Callable[[], object]) -> BaseException | None:
        try:
            ask()
        except BROKER_DOWN as error:
            self.tracker.broker_failed()
            return error
        return None

    def _be_patient(self, producer: Any) -> None:
        """Wait for Redis as long as the library would, but on a client of our own."""
        patience = {k: v for k, v in (self.policy or {}).items() if k in _PATIENCE}
        connection = producer.connection
        if self.retry:
            retry_over_time(lambda: ping(connection), BROKER_DOWN, **patience)
        else:
            ping(connection)


def reach(producer: Any) -> None:
    """Make sure that the connection of this producer, if it has one, still is one. Raises RedisError."""
    if producer.connection.connected:
        check_out(producer.channel.pool)


def ping(connection: Any) -> None:
    """Ask Redis whether it is there, on a client of our own, in bounded time. Raises RedisError."""
    with own_client(client_of(connection), timeout=TIMEOUT) as client:
        client.ping()
