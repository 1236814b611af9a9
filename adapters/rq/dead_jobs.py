"""A job with a spent crash budget fails in RQ's own way: once, in a worker.

The function is not called. RQ handles the job like every job that raised: it stores the error, shows
the job as failed and calls its ``on_failure``. The worker that does this either received the job from
the leader for this purpose, or its claim was refused because this start spent the budget.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rq.job import Job

from jobguard.adapter import hears_dead, report_dead
from jobguard.adapters.rq.lookup import tracker_for_job
from jobguard.adapters.rq.message import attempt_of
from jobguard.errors import WorkersDied
from jobguard.host_safety import contain_errors
from jobguard.model import Outcome, Refusal, Refused

REPORT_FIELD = "jg_report"
_DEAD = "_jobguard_dead"
_VARIABLE = "JOBGUARD_DEAD_JOB"


def is_to_report(worker: Any, job: Job, refused: Refused) -> bool:
    """Return True if this worker must report the dead job to RQ; at most one worker does."""
    mine = False
    with contain_errors("see whether a dead job must be reported", job_id=job.id):
        if refused.reason is Refusal.SPENT:
            tracker = tracker_for_job(job)
            mine = bool(job._failure_callback_name) or (tracker is not None and hears_dead(tracker))
        else:
            dead = refused.outcome is Outcome.DEAD
            mine = dead and bool(worker.connection.hdel(job.key, REPORT_FIELD))
    if mine:
        _mark(job)
    return mine


def _mark(job: Job) -> None:
    job.__dict__[_DEAD] = True
    job.retries_left = 0  # the failure is final


@contextmanager
def known_to_horse(job: Job) -> Iterator[None]:
    """Tell a horse that is started inside the block, as a new interpreter, that its job is dead."""
    os.environ[_VARIABLE] = job.id
    try:
        yield
    finally:
        del os.environ[_VARIABLE]


def learn_from_parent(job: Job) -> None:
    """Mark the job of a spawned horse as dead if its parent says so."""
    if os.environ.pop(_VARIABLE, None) == job.id:
        _mark(job)


def is_dead(job: Job) -> bool:
    """Return True if this run only reports the dead job to RQ."""
    return _DEAD in job.__dict__


def raise_if_dead(job: Job) -> None:
    """Raise WorkersDied instead of calling the function of a dead job."""
    if not is_dead(job):
        return
    tracker = tracker_for_job(job)
    if tracker is not None:
        report_dead(tracker, job.id, attempt=attempt_of(job))
    raise WorkersDied
