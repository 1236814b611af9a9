"""A push of RQ's that is ours to execute.

The library's own method only buffers its commands on a pipeline of ours, so that what is recorded
is what is pushed. If Redis is away, the same commands are dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from jobguard.adapters.rq.message import BROKER_DOWN, set_token
from jobguard.adapters.rq.pipeline import Batch, Staged, apply_refusals, not_pushed, surely_failed
from jobguard.clients import bounded, take_connection
from jobguard.host.push import Push

if TYPE_CHECKING:
    from redis.client import Pipeline
    from rq.queue import Queue

    from jobguard.adapter import Tracker
    from jobguard.model import Delivery, Recorded

log = logging.getLogger("jobguard")
T = TypeVar("T")
_ANY_VERSION = (6, 2, 0)


def push(tracker: Tracker, queue: Queue, buffer: Callable[[Pipeline], T]) -> T:
    """Push what ``buffer`` puts on a pipeline, for a producer that waits for it."""
    pipe = queue.connection.pipeline()
    batch = Batch.own(pipe)
    push = _Push(tracker, pipe, batch.staged)
    with _version_known(push, queue):
        result = buffer(pipe)
    if batch.staged:
        push.make()
    else:  # nothing of it is for us to record
        pipe.execute()
    return result


@dataclass
class _Push(Push):
    """What RQ put on one pipeline."""

    pipe: Pipeline
    staged: Sequence[Staged]
    broker_down = BROKER_DOWN

    @property
    def deliveries(self) -> Sequence[Delivery]:
        """One for each job."""
        return [entry.delivery for entry in self.staged]

    def reach(self) -> None:
        """Give the pipeline its connection now; Pipeline.execute would do just this."""
        if self.pipe.connection is None:
            self.pipe.connection = take_connection(self.pipe.connection_pool, "MULTI")

    def send(self) -> None:
        """Execute the pipeline."""
        with bounded(self.pipe.connection, self.patience):
            self.pipe.execute()

    def apply_refusals(self, recorded: Recorded) -> bool:
        """Take the commands of what was refused off the pipeline; RQ's others stay."""
        apply_refusals(self.staged, recorded)
        for entry in reversed(self.staged):
            if entry.delivery.token in recorded.refused:
                log.warning("job %s has ended or moved on; it is not pushed", entry.job.id)
                set_token(entry.job, entry.push.previous)
                del self.pipe.command_stack[entry.start : entry.end]
        self.staged = [e for e in self.staged if e.delivery.token not in recorded.refused]
        return True

    def failed(self, error: BaseException) -> None:
        """As for every pipeline."""
        not_pushed(self.staged, error)

    def refused(self, error: BaseException) -> None:
        """As for every pipeline."""
        not_pushed(self.staged, error)

    def is_refused(self, error: BaseException) -> bool:
        """As for every pipeline."""
        return surely_failed(error)

    def undo(self) -> None:
        """The jobs carry the tokens of before."""
        for entry in self.staged:
            set_token(entry.job, entry.push.previous)

    def release(self) -> None:
        """Give the connection back."""
        self.pipe.reset()


@contextmanager
def _version_known(push: _Push, queue: Queue) -> Iterator[None]:
    """Keep RQ from asking an absent Redis for its version, which no push depends on."""
    if queue.redis_server_version or _tells_its_version(push, queue):
        yield
        return
    queue.redis_server_version = _ANY_VERSION
    try:
        yield
    finally:
        queue.redis_server_version = None


def _tells_its_version(push: _Push, queue: Queue) -> bool:
    if push.tracker.broker_in_doubt():
        return False
    return push.unless_up(queue.get_redis_server_version) is None
