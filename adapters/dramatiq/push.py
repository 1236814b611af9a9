"""The push of one Dramatiq message.

A message that a worker sends (a retry, a move from the delay queue, a continuation of a job) is
accepted whatever the settings are: Dramatiq would suppress the error and lose the message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import redis

from jobguard.adapters.dramatiq.run import Run
from jobguard.host.push import PoolPush
from jobguard.log import log_event

if TYPE_CHECKING:
    from jobguard.model import Delivery, Recorded


@dataclass
class MessagePush(PoolPush):
    """One message that is being sent."""

    delivery: Delivery
    client: Any
    """The client of the broker."""
    enqueue: Callable[[], None]
    run: Run | None = None
    """The run that sends the message."""
    supersedes: bool = False
    """True if the message supersedes that run."""
    command = "EVALSHA"
    broker_down = (redis.ConnectionError, redis.TimeoutError, redis.exceptions.ReadOnlyError)

    @property
    def deliveries(self) -> Sequence[Delivery]:
        """The message."""
        return [self.delivery]

    @property
    def pool(self) -> Any:
        """The pool of the broker's client."""
        return getattr(self.client, "connection_pool", None)

    def send(self) -> None:
        """Send the message to Redis."""
        self.on_bounded(self.enqueue)

    def apply_refusals(self, recorded: Recorded) -> bool:
        """Note that the recorded message supersedes its parent."""
        if self.run is not None and self.supersedes and not recorded.lost:
            self.run.superseded, self.run.spooled = True, recorded.spooled
        left = super().apply_refusals(recorded)
        if not left:
            log_event("push_skipped", job_id=self.delivery.job_id)
        return left

    def accepts(self, recorded: Recorded) -> bool:
        """Accept a worker's message if it was recorded or spooled; for others, follow the settings."""
        if self.delivery.parent is not None or self.delivery.derived:
            return not recorded.lost
        return super().accepts(recorded)
