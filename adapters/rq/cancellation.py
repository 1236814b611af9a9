"""The hooks on every way to remove a job: write the tombstone first, then change Redis."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

from rq.job import Job
from rq.queue import Queue
from rq.registry import ScheduledJobRegistry

from jobguard.adapters.rq import message
from jobguard.adapters.rq.layout import FIELD, SPENT
from jobguard.adapters.rq.lookup import tracker_for_queue, trackers_for_job
from jobguard.adapters.rq.pipeline import Batch, is_immediate
from jobguard.host_safety import contain_errors

if TYPE_CHECKING:
    from redis.client import Pipeline

    from jobguard.adapter import Tracker

Hook = Callable[..., Any]

_CLEANING = "_jobguard_cleaning"
_LEAVING = "_jobguard_leaving"
_CANCELLED_AT_ONCE = 500


def cancel(original: Hook) -> Hook:
    """Wrap Job.cancel: write the tombstone first, so that jobguard does not restore the job."""

    @wraps(original)
    def hook(self: Job, pipeline: Pipeline | None = None, *args: Any, **kwargs: Any) -> Any:
        owners = trackers_for_job(self)
        if not owners:
            return original(self, pipeline, *args, **kwargs)
        with _intent_to_cancel(owners, self, pipeline), _leaving(self):
            result = original(self, pipeline, *args, **kwargs)
        token = message.token_of(self)
        if token is not None:
            # RQ allows to requeue a cancelled job: this must not count as the same delivery.
            client = pipeline if pipeline is not None else self.connection
            message.mark(client, self, token.hex + SPENT)
        return result

    return hook


def delete(original: Hook) -> Hook:
    """Wrap Job.delete: a delete by the application cancels; RQ's own delete after an end does not."""

    @wraps(original)
    def hook(self: Job, pipeline: Pipeline | None = None, *args: Any, **kwargs: Any) -> Any:
        is_its_end = _CLEANING in self.__dict__ or self._status in message.ENDED
        by_person = not is_its_end and message.run_of(self) is None
        owners = trackers_for_job(self) if by_person else []
        with _intent_to_cancel(owners, self, pipeline), _leaving(self):
            return original(self, pipeline, *args, **kwargs)

    return hook


def cleanup(original: Hook) -> Hook:
    """Wrap Job.cleanup: RQ deletes a job whose result is not kept, which is not a cancellation."""

    @wraps(original)
    def hook(self: Job, *args: Any, **kwargs: Any) -> Any:
        message.ttl_runs(self)
        self.__dict__[_CLEANING] = True
        try:
            return original(self, *args, **kwargs)
        finally:
            self.__dict__.pop(_CLEANING, None)

    return hook


def empty(original: Hook) -> Hook:
    """Wrap Queue.empty: cancel every waiting job."""

    @wraps(original)
    def hook(self: Queue) -> Any:
        tracker = tracker_for_queue(self)
        if tracker is not None:
            _intend_to_empty(tracker, self)
        return original(self)

    return hook


def delete_queue(original: Hook) -> Hook:
    """Wrap Queue.delete: cancel the jobs also when their hashes stay, because no worker runs them."""

    @wraps(original)
    def hook(self: Queue, delete_jobs: bool = True) -> Any:
        tracker = tracker_for_queue(self)
        if tracker is not None and not delete_jobs:  # else it calls Queue.empty
            _intend_to_empty(tracker, self)
        return original(self, delete_jobs=delete_jobs)

    return hook


def remove_from_queue(original: Hook) -> Hook:
    """Wrap Queue.remove: a job that the application removes must not run; RQ removes only to tidy up."""

    @wraps(original)
    def hook(self: Queue, job_or_id: Job | str, pipeline: Pipeline | None = None) -> Any:
        removed = original(self, job_or_id, pipeline)
        if pipeline is None and removed and not _is_leaving(job_or_id):
            tracker = tracker_for_queue(self)
            if tracker is not None:
                job_id = job_or_id.id if isinstance(job_or_id, Job) else job_or_id
                still_there = partial(self.connection.lpos, self.key, job_id)
                _taken_out(tracker, self, job_id, "queued", still_there)
        return removed

    return hook


def remove_from_registry(original: Hook) -> Hook:
    """Wrap ScheduledJobRegistry.remove: do the same for the delay queue."""

    @wraps(original)
    def hook(
        self: Any, job: Job | str, pipeline: Pipeline | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        removed = original(self, job, pipeline, *args, **kwargs)
        if not isinstance(self, ScheduledJobRegistry) or _is_leaving(job):
            return removed
        if pipeline is None and removed:
            queue = Queue(self.name, connection=self.connection, job_class=self.job_class)
            tracker = tracker_for_queue(queue)
            if tracker is not None:
                job_id = job.id if isinstance(job, Job) else job
                still_there = partial(self.connection.zscore, self.key, job_id)
                _taken_out(tracker, queue, job_id, "scheduled", still_there)
        return removed

    return hook


@contextmanager
def _leaving(job: Job) -> Iterator[None]:
    """Mark the job while RQ removes it everywhere: its cancellation is recorded already."""
    job.__dict__[_LEAVING] = True
    try:
        yield
    finally:
        job.__dict__.pop(_LEAVING, None)


def _is_leaving(job: Job | str) -> bool:
    return isinstance(job, Job) and _LEAVING in job.__dict__


def _taken_out(
    tracker: Tracker, queue: Queue, job_id: str, status: str, still_there: Callable[[], Any]
) -> None:
    """Cancel a job that was removed from its only place.

    Call this after the removal: only then it is clear that the job was not moved to another queue or
    to the front of this queue. If the process dies in between, the job is restored. A job without a
    hash is lost, not removed.
    """
    job: Any = queue.job_class(job_id, connection=queue.connection)
    with contain_errors("cancel a removed job", job_id=job_id):
        raw: Any = queue.connection.hmget(job.key, FIELD, "status", "origin")
        token = message.token_in(raw[0], raw[1])
        if token is None or raw[1:] != [status.encode(), queue.name.encode()]:
            return
        if still_there() is not None:
            return
        tracker.cancel(tokens=[token])
        # If a person pushes it again by hand, that is another delivery.
        message.mark(queue.connection, job, token.hex + SPENT)


def _intend_to_empty(tracker: Tracker, queue: Queue) -> None:
    """Cancel the jobs in the list: RQ does not remove scheduled and deferred jobs."""
    ids = queue.get_job_ids()
    for start in range(0, len(ids), _CANCELLED_AT_ONCE):
        tracker.cancel(job_ids=ids[start : start + _CANCELLED_AT_ONCE])


@contextmanager
def _intent_to_cancel(owners: list[Tracker], job: Job, pipeline: Pipeline | None) -> Iterator[None]:
    """Record the cancellation before RQ's change, which is made inside the block.

    On a pipeline, RQ changes Redis when the caller executes it. Nothing is recorded if RQ refuses.
    """
    token = message.token_of(job)
    tokens, ids = ([token] if token is not None else []), [job.id]

    def intent() -> None:
        for tracker in owners:
            tracker.cancel(tokens=tokens, job_ids=ids)

    at_once = pipeline is None or is_immediate(pipeline)
    if owners and at_once:
        intent()
    yield
    if owners and not at_once:
        assert pipeline is not None
        Batch.of(pipeline).intend(intent)
