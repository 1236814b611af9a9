"""The push of one Celery message, by the producer that Celery has for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import redis
from kombu.exceptions import OperationalError
from kombu.utils.functional import retry_over_time

from jobguard.adapters.celery.connection import client_of
from jobguard.adapters.celery.run import Run
from jobguard.clients import own_client
from jobguard.host.push import PoolPush
from jobguard.log import log_event

if TYPE_CHECKING:
    from jobguard.model import Delivery, Recorded


BROKER_DOWN = (
    redis.ConnectionError,
    redis.TimeoutError,
    redis.exceptions.ReadOnlyError,
    OperationalError,
    OSError,
)
"""Errors that show that Redis is away."""
TIMEOUT = 1.0
"""Seconds that a client of ours waits for Redis at most."""
_REFUSED = (redis.ConnectionError, redis.exceptions.ReadOnlyError, OperationalError)
"""Errors after which the library tries again. A Redis that is silent keeps silent for a while."""
_POLICY = ("max_retries", "interval_start", "interval_step", "interval_max")


@dataclass
class TaskPush(PoolPush):
    """One message that is about to be sent."""

    app: Any
    delivery: Delivery
    publish: Callable[..., Any]
    """Call the library's publish with this producer, and with these options in the place of others."""
    producer: Any
    run: Run | None = None
    """The run that this push supersedes, if it is a retry or a replacement."""
    retry: bool = False
    alone: bool = False
    """A generator sends it while its group is sent, and may wait for its result."""
    policy: dict[str, Any] | None = None
    """The library's retry policy while Redis is away."""
    begun: bool = False
    """True once it is recorded: the library may send it again without further checks."""
    command = "LPUSH"
    broker_down = BROKER_DOWN

    @property
    def deliveries(self) -> Sequence[Delivery]:
        """The task."""
        return [self.delivery]

    def may_wait(self) -> bool:
        """Return False if a group does not wait for this push."""
        return not self.alone

    @property
    def pool(self) -> Any:
        """The pool of the producer's channel."""
        return getattr(self.producer.channel, "pool", None)

    def reach(self) -> None:
        """Check the connection of the producer, if it has one."""
        if self.producer.connection.connected:
            super().reach()

    def wait(self, down: BaseException | None) -> None:
        """Reach Redis as often as the library would, on a client of our own; once if it is silent."""
        down = down or self.tracker.broker_error()
        if isinstance(down, redis.TimeoutError):
            raise down
        self._retried(lambda: ping(self.producer.connection))

    def send(self) -> Any:
        """Have the producer publish it; try only once if a leader pushes an unsent message."""
        if self.pool is None:
            return self.publish(self.producer)
        return self._publish() if self.is_kept else self._retried(self._publish)

    def _publish(self) -> Any:
        return self.on_bounded(lambda: self.publish(self.producer, retry=False))

    def _retried(self, work: Callable[[], Any]) -> Any:
        """Do this as often as the library's retry policy says, while Redis refuses connections."""
        if not self.retry:
            return work()
        policy = {k: v for k, v in (self.policy or {}).items() if k in _POLICY}
        return retry_over_time(work, _REFUSED, **policy)

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Use another producer: a different thread may use the first one by now."""
        own = self.producer
        try:
            with (
                self.app.producer_or_acquire() as self.producer,
                self.producer.connection._reraise_as_library_errors(),
            ):
                yield
        finally:
            self.producer = own

    def apply_refusals(self, recorded: Recorded) -> bool:
        """Mark the superseded run: its record was superseded in the same transaction."""
        self.begun = True
        left = super().apply_refusals(recorded)
        if self.run is not None:
            self.run.superseded_by(self.delivery.token if left else None)
        if not left:
            log_event("push_skipped", job_id=self.delivery.job_id)
        return left

    def undo(self) -> None:
        """Forget the record of a push that supersedes no run: it was never recorded."""
        self.begun = self.begun and self.delivery.parent is not None


def ping(connection: Any) -> None:
    """Ping Redis on a client of our own, in bounded time. Raise RedisError."""
    with own_client(client_of(connection), timeout=TIMEOUT) as client:
        client.ping()
