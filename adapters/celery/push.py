"""The push of one message of Celery's, by the producer that Celery has for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import redis
from kombu.exceptions import OperationalError
from kombu.utils.functional import retry_over_time

from jobguard.adapters.celery.connection import check_out, client_of
from jobguard.adapters.celery.run import Run
from jobguard.clients import bounded_pool, own_client
from jobguard.host.push import Push

if TYPE_CHECKING:
    from jobguard.model import Delivery, Recorded

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


@dataclass
class TaskPush(Push):
    """One message that is about to be sent."""

    app: Any
    delivery: Delivery
    publish: Callable[..., Any]
    """Has the library send it, by this producer, with these options in the place of others."""
    producer: Any
    run: Run | None = None
    """The run whose place it takes, if it is a retry or a replacement."""
    retry: bool = False
    alone: bool = False
    """A generator sends it while its group is sent, and may wait for what becomes of it."""
    policy: dict[str, Any] | None = None
    """How patient the library is with a Redis that is away."""
    begun: bool = False
    """It is recorded: the library may try to send it again, and need not be asked anything else."""
    broker_down = BROKER_DOWN

    @property
    def deliveries(self) -> Sequence[Delivery]:
        """The task."""
        return [self.delivery]

    def may_wait(self) -> bool:
        """Not what no group waits for."""
        return not self.alone

    def reach(self) -> None:
        """Make sure that the connection of the producer, if it has one, still is one."""
        reach(self.producer)

    def wait(self, down: BaseException | None) -> None:
        """Wait as long as the library would, but on a client of our own."""
        patience = {k: v for k, v in (self.policy or {}).items() if k in _PATIENCE}
        connection = self.producer.connection
        if self.retry:
            retry_over_time(lambda: ping(connection), BROKER_DOWN, **patience)
        else:
            ping(connection)

    def send(self) -> Any:
        """Have the producer publish it; once, where a leader pushes what was not sent."""
        patience = self.patience
        pool = getattr(self.producer.channel, "pool", None) if patience is not None else None
        if pool is None:
            return self.publish(self.producer)
        with bounded_pool(pool, "LPUSH", patience):
            return self.publish(self.producer, retry=False)

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Another producer: the one of then may be in other hands by now."""
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
        """Tell the run whose place is taken: its record was superseded in that very transaction."""
        self.begun = True
        left = super().apply_refusals(recorded)
        if self.run is not None:
            self.run.superseded_by(self.delivery.token if left else None)
        if not left:
            log.info("task %s has ended or moved on; it is not sent", self.delivery.job_id)
        return left

    def undo(self) -> None:
        """What takes no other's place was never recorded."""
        self.begun = self.begun and self.delivery.parent is not None


def reach(producer: Any) -> None:
    """Make sure that the connection of this producer, if it has one, still is one. Raises RedisError."""
    if producer.connection.connected:
        check_out(producer.channel.pool)


def ping(connection: Any) -> None:
    """Ask Redis whether it is there, on a client of our own, in bounded time. Raises RedisError."""
    with own_client(client_of(connection), timeout=TIMEOUT) as client:
        client.ping()
