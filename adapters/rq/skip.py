"""The skip of a job that a worker must not run.

Without these changes in Redis, the id would stay in RQ's intermediate list. RQ's maintenance would
retry it later with a new token, which was not refused yet.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any
from uuid import UUID

from rq.job import Job, JobStatus
from rq.queue import Queue

from jobguard.adapters.rq.layout import KEPT, Layout
from jobguard.adapters.rq.lookup import prefix_for
from jobguard.host_safety import contain_errors
from jobguard.log import log_event
from jobguard.model import Outcome, Refusal, Refused

_STATUS = {
    Outcome.COMPLETED: JobStatus.FINISHED,
    Outcome.FAILED: JobStatus.FAILED,
    Outcome.DEAD: JobStatus.FAILED,
    Outcome.CANCELLED: JobStatus.CANCELED,
    # Its hash still exists: the newer delivery will be pushed later and will replace it.
    Outcome.SUPERSEDED: JobStatus.FINISHED,
}
_SCRIPT = files(__package__).joinpath("skip.lua").read_text(encoding="utf-8")
_ABANDON = files(__package__).joinpath("abandon.lua").read_text(encoding="utf-8")


def skip(worker: Any, job: Job, queue: Queue, refused: Refused) -> None:
    """Remove the job from RQ's lists; log errors of Redis. The job does not run in any case."""
    log_event("job_skipped", job_id=job.id, reason=refused.outcome or refused.reason)
    correct_redis(worker, job, queue, refused)


def finish(worker: Any, job: Job, queue: Queue, token: UUID) -> None:
    """Write to Redis that a run has completed. RQ calls it failed, because Redis broke off RQ's write."""
    with contain_errors("end a run in Redis", job_id=job.id):
        layout = Layout.parse(prefix_for(queue, queue.job_class))
        worker.connection.register_script(_ABANDON)(
            keys=layout.run(job.id, queue.name), args=[job.id, token.hex, layout.base]
        )
    correct_redis(worker, job, queue, Refused(token, Refusal.ENDED, Outcome.COMPLETED))


def correct_redis(worker: Any, job: Job, queue: Queue, refused: Refused) -> None:
    """Make the state of the job in Redis equal to the ledger; log errors of Redis."""
    with contain_errors("correct the state of a job in Redis", job_id=job.id):
        status = _status(refused)
        _write_status(worker, job, queue, refused.token.hex, status)
        if status is None:
            return
        job._status = status
        release = getattr(worker, "_release_slot_safely", None)
        if release is not None:  # RQ 3.0: the slot of a rate limit
            release(job)
        if refused.outcome is Outcome.COMPLETED:
            queue.enqueue_dependents(job)


def _status(refused: Refused) -> JobStatus | None:
    if refused.reason is Refusal.CLAIMED:
        return None
    if refused.outcome is None:
        return JobStatus.FAILED if refused.reason is Refusal.SPENT else JobStatus.FINISHED
    return _STATUS[refused.outcome]


def _write_status(
    worker: Any, job: Job, queue: Queue, token: str, status: JobStatus | None
) -> None:
    layout = Layout.parse(prefix_for(queue, queue.job_class))
    script = worker.connection.register_script(_SCRIPT)
    script(
        keys=layout.ending(job.id, queue.name),
        args=[job.id, token, status.value if status is not None else "", *KEPT],
    )
