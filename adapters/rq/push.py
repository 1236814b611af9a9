"""A push of RQ that jobguard executes.

The method of RQ only adds its commands to a pipeline of jobguard, so the record and the push are the
same. If Redis is away, the same commands are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from jobguard.adapters.rq.message import BROKER_DOWN, set_token
from jobguard.adapters.rq.pipeline import Batch, Staged, apply_refusals, not_pushed, surely_failed
from jobguard.clients import take_connection
from jobguard.host.push import Push
from jobguard.log import log_event

if TYPE_CHECKING:
    from redis.client import Pipeline
    from rq.queue import Queue

    from jobguard.adapter import Tracker
    from jobguard.model import Delivery, Recorded

T = TypeVar("T")
_ANY_VERSION = (6, 2, 0)


def push(tracker: Tracker, queue: Queue, buffer: Callable[[Pipeline], T]) -> T:
    """Push the commands that ``buffer`` adds to a pipeline, for a producer that waits for the push."""
    pipe = queue.connection.pipeline()
    batch = Batch.own(pipe)
    batch.guards = (queue, tracker)
    push = _Push(tracker, pipe, batch.staged)
    with _version_known(push, queue):
        result = buffer(pipe)
    if batch.staged:
        push.make()
    else:  # nothing to record
        pipe.execute()
    return result


@dataclass
class _Push(Push):
    """Push the commands that RQ added to one pipeline."""

    pipe: Pipeline
    staged: Sequence[Staged]
    broker_down = BROKER_DOWN

    @property
    def deliveries(self) -> Sequence[Delivery]:
        """Return one delivery for each job."""
        return [entry.delivery for entry in self.staged]

    def reach(self) -> None:
        """Give the pipeline its connection now, exactly as Pipeline.execute does."""
        if self.pipe.connection is None:
            self.pipe.connection = take_connection(self.pipe.connection_pool, "MULTI")

    def send(self) -> None:
        """Execute the pipeline."""
        pipe = self.pipe
        with self.in_bounded_time(pipe.connection_pool, pipe.connection, used=True):
            self.pipe.execute()

    def apply_refusals(self, recorded: Recorded) -> bool:
        """Remove the commands of refused deliveries from the pipeline; RQ's other commands stay."""
        apply_refusals(self.staged, recorded)
        for entry in reversed(self.staged):
            if entry.delivery.token in recorded.refused:
                log_event("push_skipped", job_id=entry.job.id)
                set_token(entry.job, entry.push.previous)
                del self.pipe.command_stack[entry.start : entry.end]
        self.staged = [e for e in self.staged if e.delivery.token not in recorded.refused]
        return True

    def failed(self, error: BaseException) -> None:
        """Handle a failed push in the same way as for every pipeline."""
        not_pushed(self.staged, error)

    def refused(self, error: BaseException) -> None:
        """Handle a refused push in the same way as for every pipeline."""
        not_pushed(self.staged, error)

    def is_refused(self, error: BaseException) -> bool:
        """Return True if Redis certainly did nothing."""
        return surely_failed(error)

    def undo(self) -> None:
        """Set the previous tokens of the jobs again."""
        for entry in self.staged:
            set_token(entry.job, entry.push.previous)

    def release(self) -> None:
        """Return the connection to its pool."""
        self.pipe.reset()


@contextmanager
def _version_known(push: _Push, queue: Queue) -> Iterator[None]:
    """Prevent RQ from asking an absent Redis for its version; no push depends on the version."""
    if queue.redis_server_version or _knows_version(push, queue):
        yield
        return
    queue.redis_server_version = _ANY_VERSION
    try:
        yield
    finally:
        queue.redis_server_version = None


def _knows_version(push: _Push, queue: Queue) -> bool:
    if push.tracker.broker_in_doubt():
        return False
    return push.unless_up(queue.get_redis_server_version) is None
