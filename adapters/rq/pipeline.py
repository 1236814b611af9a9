"""Deliveries on a Redis pipeline: record them in one batch right before the pipeline executes.

A pipeline that is dropped records nothing. A pipeline that executes records first. If a delivery must
not be pushed after that (it was refused, or it is too late), its commands are removed from the
pipeline. The other commands of the caller stay.
"""

from __future__ import annotations

import re
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

import redis
from rq.job import Job

from jobguard import failpoint
from jobguard.adapters.rq.lookup import tracker_for_queue
from jobguard.adapters.rq.message import BROKER_DOWN, Draft, aborted, deliver, set_token
from jobguard.host_safety import contain_errors
from jobguard.log import log_event
from jobguard.model import Delivery, Recorded

if TYPE_CHECKING:
    from redis.client import Pipeline
    from rq.queue import Queue

    from jobguard.adapter import Tracker

_BATCH = "_jobguard_batch"


@dataclass(slots=True)
class Staged:
    """Keep a delivery with the position of its commands on the pipeline."""

    tracker: Tracker
    job: Job
    push: Draft
    delivery: Delivery
    start: int
    end: int
    """The commands from ``start`` to ``end`` of the pipeline are its push."""
    written: bool = True
    """Whether Postgres has the record. If not, no leader can have pushed it, even after a long wait."""


class Batch:
    """Keep the deliveries and the cancellations of one pipeline."""

    guards: tuple[Queue, Tracker] | None = None
    """The queue that a pipeline of a hook pushes to, and its tracker."""

    def __init__(self, pipe: Pipeline):
        self._pipe = weakref.ref(pipe)  # its __del__ returns its connection: avoid a cycle
        self._executing = False
        self._cancellations: list[Callable[[], None]] = []
        self.staged: list[Staged] = []

    @classmethod
    def of(cls, pipe: Pipeline) -> Batch:
        """Return the pipeline's batch; on first use, hook the pipeline's execute and reset."""
        batch: Batch | None = pipe.__dict__.get(_BATCH)
        if batch is None:
            batch = cls.own(pipe)
            pipe.__dict__["execute"] = batch.execute
            pipe.__dict__["reset"] = batch.reset
        return batch

    @classmethod
    def own(cls, pipe: Pipeline) -> Batch:
        """Return a batch for a pipeline that a hook creates and executes itself."""
        batch = pipe.__dict__[_BATCH] = cls(pipe)
        return batch

    def stage(self, tracker: Tracker, job: Job, push: Draft, *, queue: str, start: int) -> None:
        """Keep a push whose commands RQ has added to the pipeline, from ``start`` on."""
        if push.mapping is None:  # nothing was written: not a push
            return
        pipe = self._pipe()
        assert pipe is not None
        delivery: Delivery | None = None
        with contain_errors("record a job", job_id=job.id):
            delivery = deliver(job, push, queue=queue)
        if delivery is None:
            return
        set_token(job, push.token)
        self.staged.append(Staged(tracker, job, push, delivery, start, len(pipe.command_stack)))

    def intend(self, cancel: Callable[[], None]) -> None:
        """Keep a cancellation, to call it before the pipeline executes."""
        self._cancellations.append(cancel)

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        """Record the deliveries, then execute the pipeline."""
        pipe = self._pipe()
        assert pipe is not None
        execute = type(pipe).execute
        staged, self.staged = self.staged, []
        cancellations, self._cancellations = self._cancellations, []
        if not staged and not cancellations:
            return execute(pipe, raise_on_error)
        self._executing = True
        try:
            for intent in cancellations:
                intent()
            going = self._record(pipe, staged)
            if going is None:
                type(pipe).reset(pipe)
                return []
            failpoint.hit("after_move_record", when=bool(going))
            try:
                return execute(pipe, raise_on_error)
            except BaseException as error:
                not_pushed(going, error)
                raise
        finally:
            self._executing = False

    def reset(self) -> None:
        """Discard all deliveries and cancellations: the pipeline was dropped, and nothing was sent."""
        pipe = self._pipe()
        if not self._executing:
            for entry in self.staged:
                set_token(entry.job, entry.push.previous)
            self.staged.clear()
            self._cancellations.clear()
        if pipe is not None:
            type(pipe).reset(pipe)

    def _record(self, pipe: Pipeline, staged: list[Staged]) -> list[Staged] | None:
        """Return the deliveries to push; None if the pipeline must not be executed at all."""
        # If Redis failed after the function returned, RQ retries the job. The run has its outcome
        # already, so that retry must not be pushed.
        over = [entry for entry in staged if entry.push.run and entry.push.run.outcome is not None]
        begun = time.monotonic()
        try:
            refused = record([entry for entry in staged if entry not in over])
        except BaseException:  # the user asked for an error if Postgres is away
            for entry in staged:
                set_token(entry.job, entry.push.previous)
            type(pipe).reset(pipe)
            raise
        refused |= {entry.delivery.token for entry in over}
        for entry in staged:
            if entry.delivery.token in refused:
                log_event("push_skipped", job_id=entry.job.id)
                set_token(entry.job, entry.push.previous)
                if entry.push.run is not None:
                    # The worker's transaction would overwrite the hash of the newer delivery.
                    entry.push.run.drop_claim()
                    return None
        going = [entry for entry in staged if entry.delivery.token not in refused]
        late = time.monotonic() - begun
        if any(late > entry.tracker.push_deadline for entry in going if entry.written):
            leave_to_outbox(going)
            going = []
        pushed = {entry.delivery.token for entry in going}
        for entry in reversed(staged):
            if entry.delivery.token not in pushed:
                del pipe.command_stack[entry.start : entry.end]
        return going


def tracker_of(pipe: Pipeline | None, queue: Queue) -> Tracker | None:
    """Return the tracker of the queue; that of a hook's own pipeline is known."""
    batch: Batch | None = None if pipe is None else pipe.__dict__.get(_BATCH)
    if batch is not None and batch.guards is not None and batch.guards[0] is queue:
        return batch.guards[1]
    return tracker_for_queue(queue)


def record(staged: Sequence[Staged]) -> set[UUID]:
    """Record these in one batch per tracker; return the tokens of those that must not be pushed."""
    refused: set[UUID] = set()
    for tracker, entries in by_tracker(staged):
        recorded = tracker.record([entry.delivery for entry in entries])
        apply_refusals(entries, recorded)
        refused |= recorded.refused
    return refused


def apply_refusals(entries: Sequence[Staged], recorded: Recorded) -> None:
    """Mark the runs that are superseded: the same transaction superseded their records."""
    for entry in entries:
        entry.written = recorded.written
        if entry.push.run is not None and entry.delivery.token not in recorded.refused:
            entry.push.run.superseded_by(entry.delivery.token)


def by_tracker(staged: Sequence[Staged]) -> list[tuple[Tracker, list[Staged]]]:
    """Return the staged deliveries by tracker; there is rarely more than one tracker."""
    groups: dict[int, tuple[Tracker, list[Staged]]] = {}
    for entry in staged:
        groups.setdefault(id(entry.tracker), (entry.tracker, []))[1].append(entry)
    return list(groups.values())


def not_pushed(staged: Sequence[Staged], error: BaseException) -> None:
    """Handle recorded deliveries whose push failed or may have failed."""
    if isinstance(error, BROKER_DOWN):
        for tracker, _ in by_tracker(staged):
            tracker.broker_failed()
    if not surely_failed(error):
        leave_to_outbox(staged)
        ids = ", ".join(entry.job.id for entry in staged)
        error.add_note(f"jobguard: it may have reached Redis, and stays recorded: job {ids}")
        return
    first = [entry for entry in staged if entry.push.parent is None]
    for tracker, entries in by_tracker(first):
        tracker.withdraw([entry.delivery for entry in entries])
    for entry in first:
        set_token(entry.job, None)
    # The parent is superseded already. RQ's next try is the successor; without one, the leader pushes.
    moved = [entry for entry in staged if entry.push.parent and entry.push.run is None]
    for entry in moved:
        assert entry.push.parent is not None
        aborted(entry.push.parent.token, entry.delivery.token)
    leave_to_outbox(moved)


def leave_to_outbox(staged: Sequence[Staged]) -> None:
    """Leave these to the leader, which pushes them."""
    for tracker, entries in by_tracker(staged):
        tracker.leave_to_outbox([entry.delivery.token for entry in entries])


_QUEUE_FAILED = re.compile(r"Command # \d+ \((RPUSH|LPUSH|ZADD) ")


def surely_failed(error: BaseException) -> bool:
    """Return True if Redis certainly did nothing: a lost race, or a transaction refused as a whole."""
    if isinstance(error, redis.WatchError):
        # redis-py raises WatchError also if the connection broke during EXEC.
        return "Watched variable changed" in str(error)
    aborts = (error, error.__context__)
    if any(isinstance(abort, redis.exceptions.ExecAbortError) for abort in aborts):
        return True
    if isinstance(error, redis.exceptions.BusyLoadingError | redis.AuthenticationError):
        return True
    # EXEC was done, but the push to the queue failed: the key of the queue has another type.
    return isinstance(error, redis.ResponseError) and _QUEUE_FAILED.match(str(error)) is not None


def is_immediate(pipe: Pipeline) -> bool:
    """Return True if its commands are sent at once: it has called WATCH, but not MULTI yet."""
    return bool(pipe.watching and not pipe.explicit_transaction)
