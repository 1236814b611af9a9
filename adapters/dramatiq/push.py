"""The push of one message of Dramatiq's.

What a worker sends (a retry, a move from the delay queue, what goes on from a job) is accepted whatever
the settings say: Dramatiq would swallow the error, and lose it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import redis

from jobguard.adapters.dramatiq.run import Run
from jobguard.clients import bounded_pool, take_connection
from jobguard.host.push import Push

if TYPE_CHECKING:
    from jobguard.model import Delivery, Recorded

log = logging.getLogger("jobguard")


@dataclass
class MessagePush(Push):
    """One message on its way, with what is needed to send it."""

    delivery: Delivery
    client: Any
    """The broker's."""
    enqueue: Callable[[], None]
    run: Run | None = None
    """The run that sends it."""
    supersedes: bool = False
    """It takes the place of that run."""
    broker_down = (redis.ConnectionError, redis.TimeoutError, redis.exceptions.ReadOnlyError)

    @property
    def deliveries(self) -> Sequence[Delivery]:
        """The message."""
        return [self.delivery]

    def reach(self) -> None:
        """Connect, if no connection is open."""
        pool = getattr(self.client, "connection_pool", None)
        if pool is not None:
            pool.release(take_connection(pool, "EVALSHA"))

    def send(self) -> None:
        """Have Redis take it."""
        pool = getattr(self.client, "connection_pool", None)
        with bounded_pool(pool, "EVALSHA", self.patience if pool is not None else None):
            self.enqueue()

    def apply_refusals(self, recorded: Recorded) -> bool:
        """From here on it stands in its parent's place."""
        if self.run is not None and self.supersedes and not recorded.lost:
            self.run.superseded, self.run.spooled = True, recorded.spooled
        left = super().apply_refusals(recorded)
        if not left:
            log.info("message %s has ended or moved on; it is not pushed", self.delivery.job_id)
        return left

    def accepts(self, recorded: Recorded) -> bool:
        """What a worker sends, if anything has it; else as the settings say."""
        if self.delivery.parent is not None or self.delivery.derived:
            return not recorded.lost
        return super().accepts(recorded)
