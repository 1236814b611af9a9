"""A push that is ours to execute: record, then push, in one round trip to each store.

The library's own method only buffers its commands on a pipeline of ours, so that what is recorded
is what is pushed. If Redis is away, the same commands are dropped and the record alone is kept, for
the leader to push.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from jobguard import failpoint
from jobguard.adapters.rq.deliveries import BROKER_DOWN, set_token
from jobguard.adapters.rq.pipeline import (
    Batch,
    Staged,
    leave_to_outbox,
    not_pushed,
    settle,
)
from jobguard.clients import take_connection
from jobguard.job import Recorded

if TYPE_CHECKING:
    from redis.client import Pipeline
    from rq.queue import Queue

    from jobguard.adapter import Tracker

log = logging.getLogger("jobguard")
T = TypeVar("T")
_ANY_VERSION = (6, 2, 0)


def push(tracker: Tracker, queue: Queue, buffer: Callable[[Pipeline], T]) -> T:
    """Push what ``buffer`` puts on a pipeline, for a producer that waits for it."""
    down: BaseException | None = None
    in_doubt = tracker.broker_in_doubt()
    if not in_doubt:
        down = _unless_up(tracker, queue.get_redis_server_version)
    pipe = queue.connection.pipeline()
    batch = Batch.own(pipe)
    with _version_assumed(queue, in_doubt or down is not None):
        result = buffer(pipe)
    staged: Sequence[Staged] = batch.staged
    if not staged:  # nothing of it is for us to record
        pipe.execute()
        return result
    if tracker.hold([e.delivery for e in staged], partial(_push_held, pipe, tracker, staged)):
        return result
    if not in_doubt and down is None:
        # Connected before the record: if this fails, surely nothing was sent.
        down = _unless_up(tracker, lambda: _connect(pipe))
    if in_doubt or down is not None:
        recorded = _record(pipe, tracker, staged, outbox=True)
        if tracker.accepts_without_broker(recorded):
            pipe.reset()
            return result
        down = down or _unless_up(tracker, lambda: _connect(pipe))
        if down is not None:
            _take_back(pipe, tracker, staged)
            raise down
    else:
        begun = time.monotonic()
        recorded = _record(pipe, tracker, staged)
        unwritten = recorded.spooled or recorded.lost  # then no leader can have pushed it
        if time.monotonic() - begun > tracker.push_deadline and not unwritten:
            leave_to_outbox(staged)
            pipe.reset()
            return result
    _execute(pipe, tracker, staged, recorded)
    return result


def _push_held(
    pipe: Pipeline, tracker: Tracker, staged: Sequence[Staged], recorded: Recorded
) -> None:
    """Push what was recorded with the others of its batch."""
    settle(staged, recorded)
    in_doubt = tracker.broker_in_doubt()
    down = None if in_doubt else _unless_up(tracker, lambda: _connect(pipe))
    if in_doubt or down is not None:
        if tracker.accepts_without_broker(recorded):
            leave_to_outbox(staged)
            pipe.reset()
            return
        down = down or _unless_up(tracker, lambda: _connect(pipe))
        if down is not None:
            _take_back(pipe, tracker, staged)
            raise down
    _execute(pipe, tracker, staged, recorded)


def _execute(
    pipe: Pipeline, tracker: Tracker, staged: Sequence[Staged], recorded: Recorded
) -> None:
    if recorded.refused:
        staged = _without_refused(pipe, staged, recorded)
    written = not (recorded.spooled or recorded.lost)
    failpoint.hit("after_record", when=written)
    try:
        pipe.execute()
    except BROKER_DOWN as error:
        not_pushed(staged, error)
        if not tracker.accepts_without_broker(recorded):
            raise
    except BaseException as error:
        not_pushed(staged, error)
        raise
    failpoint.hit("after_push", when=written)


def _record(
    pipe: Pipeline, tracker: Tracker, staged: Sequence[Staged], *, outbox: bool = False
) -> Recorded:
    try:
        recorded = tracker.record([entry.delivery for entry in staged], outbox=outbox)
    except BaseException:  # the user asked to hear that Postgres is away
        for entry in staged:
            set_token(entry.job, entry.push.previous)
        pipe.reset()
        raise
    settle(staged, recorded)
    return recorded


def _take_back(pipe: Pipeline, tracker: Tracker, staged: Sequence[Staged]) -> None:
    pipe.reset()
    tracker.withdraw([entry.delivery for entry in staged if entry.push.parent is None])
    for entry in staged:
        set_token(entry.job, entry.push.previous)


def _without_refused(
    pipe: Pipeline, staged: Sequence[Staged], recorded: Recorded
) -> Sequence[Staged]:
    for entry in reversed(staged):
        if entry.delivery.token in recorded.refused:
            log.warning("job %s has ended or moved on; it is not pushed", entry.job.id)
            del pipe.command_stack[entry.start : entry.end]
    return [entry for entry in staged if entry.delivery.token not in recorded.refused]


def _unless_up(tracker: Tracker, ask: Callable[[], object]) -> BaseException | None:
    try:
        ask()
    except BROKER_DOWN as error:
        tracker.broker_failed()
        return error
    return None


def _connect(pipe: Pipeline) -> None:
    """Give the pipeline its connection now; Pipeline.execute would do just this."""
    pipe.connection = take_connection(pipe.connection_pool, "MULTI")


@contextmanager
def _version_assumed(queue: Queue, assumed: bool) -> Iterator[None]:
    """Keep RQ from asking an absent Redis for its version, which no push depends on."""
    if not assumed or queue.redis_server_version:
        yield
        return
    queue.redis_server_version = _ANY_VERSION
    try:
        yield
    finally:
        queue.redis_server_version = None
