"""The hooks on every way a person takes a job out: our tombstone first, then Redis."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from rq.job import Job
from rq.queue import Queue

from jobguard.adapters.rq import deliveries
from jobguard.adapters.rq.layout import SPENT
from jobguard.adapters.rq.lookup import tracker_for_job, tracker_for_queue
from jobguard.adapters.rq.pipeline import Batch, is_immediate

if TYPE_CHECKING:
    from redis.client import Pipeline

    from jobguard.adapter import Tracker

Hook = Callable[..., Any]

_CLEANING = "_jobguard_cleaning"
_CANCELLED_AT_ONCE = 500


def cancel(original: Hook) -> Hook:
    """Job.cancel: our tombstone first, so that nothing brings the job back."""

    @wraps(original)
    def hook(self: Job, pipeline: Pipeline | None = None, *args: Any, **kwargs: Any) -> Any:
        tracker = tracker_for_job(self)
        if tracker is None:
            return original(self, pipeline, *args, **kwargs)
        _intend_to_cancel(tracker, self, pipeline)
        result = original(self, pipeline, *args, **kwargs)
        token = deliveries.token_of(self)
        if token is not None:
            # RQ lets a cancelled job be put back: that must not be taken for this delivery.
            client = pipeline if pipeline is not None else self.connection
            deliveries.mark(client, self, token.hex + SPENT)
        return result

    return hook


def delete(original: Hook) -> Hook:
    """Job.delete: a person's delete is a cancel; RQ's own, of a job that ended, is not."""

    @wraps(original)
    def hook(self: Job, pipeline: Pipeline | None = None, *args: Any, **kwargs: Any) -> Any:
        is_its_end = _CLEANING in self.__dict__ or self._status in deliveries.ENDED
        if not is_its_end and deliveries.run_of(self) is None:
            tracker = tracker_for_job(self)
            if tracker is not None:
                _intend_to_cancel(tracker, self, pipeline)
        return original(self, pipeline, *args, **kwargs)

    return hook


def cleanup(original: Hook) -> Hook:
    """Job.cleanup: deletes a job whose result nobody wants to keep."""

    @wraps(original)
    def hook(self: Job, *args: Any, **kwargs: Any) -> Any:
        deliveries.ttl_runs(self)
        self.__dict__[_CLEANING] = True
        try:
            return original(self, *args, **kwargs)
        finally:
            self.__dict__.pop(_CLEANING, None)

    return hook


def empty(original: Hook) -> Hook:
    """Queue.empty: everything that waits is cancelled."""

    @wraps(original)
    def hook(self: Queue) -> Any:
        tracker = tracker_for_queue(self)
        if tracker is not None:
            _intend_to_empty(tracker, self)
        return original(self)

    return hook


def delete_queue(original: Hook) -> Hook:
    """Queue.delete: also where it leaves the jobs' hashes, nothing would ever run them."""

    @wraps(original)
    def hook(self: Queue, delete_jobs: bool = True) -> Any:
        tracker = tracker_for_queue(self)
        if tracker is not None and not delete_jobs:  # else it calls Queue.empty
            _intend_to_empty(tracker, self)
        return original(self, delete_jobs=delete_jobs)

    return hook


def _intend_to_empty(tracker: Tracker, queue: Queue) -> None:
    """Cancel what stands in the list: RQ leaves alone what is scheduled or waits for its parents."""
    ids = queue.get_job_ids()
    for start in range(0, len(ids), _CANCELLED_AT_ONCE):
        tracker.cancel(job_ids=ids[start : start + _CANCELLED_AT_ONCE])


def _intend_to_cancel(tracker: Tracker, job: Job, pipeline: Pipeline | None) -> None:
    token = deliveries.token_of(job)
    tokens, ids = ([token] if token is not None else []), [job.id]
    if pipeline is None or is_immediate(pipeline):
        tracker.cancel(tokens=tokens, job_ids=ids)
    else:  # only if the caller does not drop it
        Batch.of(pipeline).intend(lambda: tracker.cancel(tokens=tokens, job_ids=ids))
