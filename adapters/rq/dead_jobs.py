"""A job whose crash budget is spent fails in RQ's own way, once, in a worker.

The function is not called. RQ does what it does for every job that raised: it keeps the error, shows the
job as failed and calls its ``on_failure``. A worker that is to do so has got the job from the leader for
that, or was refused its claim because the budget was spent by this very start.
"""

from __future__ import annotations

import logging
from typing import Any

from rq.job import Job

from jobguard.errors import WorkersDied, is_host_interrupt
from jobguard.model import Outcome, Refusal, Refused

log = logging.getLogger("jobguard")

REPORT_FIELD = "jg_report"
_DEAD = "_jobguard_dead"


def is_to_report(worker: Any, job: Job, refused: Refused) -> bool:
    """Whether this worker is to tell RQ that the job is dead; at most one worker is."""
    if any(kind.__name__ == "SpawnWorker" for kind in type(worker).__mro__):
        return False  # its horse is a fresh interpreter, which would know nothing of this
    try:
        if refused.reason is Refusal.SPENT:
            mine = bool(job._failure_callback_name)
        else:
            dead = refused.outcome is Outcome.DEAD
            mine = dead and bool(worker.connection.hdel(job.key, REPORT_FIELD))
    except Exception as error:
        if is_host_interrupt(error):
            raise
        log.exception("jobguard could not see whether job %s is to be reported", job.id)
        return False
    if mine:
        job.__dict__[_DEAD] = True
        job.retries_left = 0  # it has failed for good
    return mine


def is_dead(job: Job) -> bool:
    """Whether this run only tells RQ that the job is dead."""
    return _DEAD in job.__dict__


def raise_if_dead(job: Job) -> None:
    """Raise in the place of the function's call."""
    if is_dead(job):
        raise WorkersDied
