"""A job with a spent crash budget fails in RQ's own way: once, in a worker.

The function is not called. RQ handles the job like every job that raised: it stores the error, shows
the job as failed and calls its ``on_failure``. The worker that does this either received the job from
the leader for this purpose, or its claim was refused because this start spent the budget.
"""

from __future__ import annotations

from typing import Any

from rq.job import Job

from jobguard.errors import WorkersDied
from jobguard.host_safety import contain_errors
from jobguard.model import Outcome, Refusal, Refused

REPORT_FIELD = "jg_report"
_DEAD = "_jobguard_dead"


def is_to_report(worker: Any, job: Job, refused: Refused) -> bool:
    """Return True if this worker must report the dead job to RQ; at most one worker does."""
    if any(kind.__name__ == "SpawnWorker" for kind in type(worker).__mro__):
        return False  # its horse is a new interpreter and cannot know this
    mine = False
    with contain_errors("see whether a dead job must be reported", job_id=job.id):
        if refused.reason is Refusal.SPENT:
            mine = bool(job._failure_callback_name)
        else:
            dead = refused.outcome is Outcome.DEAD
            mine = dead and bool(worker.connection.hdel(job.key, REPORT_FIELD))
    if mine:
        job.__dict__[_DEAD] = True
        job.retries_left = 0  # the failure is final
    return mine


def is_dead(job: Job) -> bool:
    """Return True if this run only reports the dead job to RQ."""
    return _DEAD in job.__dict__


def raise_if_dead(job: Job) -> None:
    """Raise WorkersDied instead of calling the function of a dead job."""
    if is_dead(job):
        raise WorkersDied
