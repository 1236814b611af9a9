"""The skip: what a worker does with a job that it may not run.

Just returning would leave the id in RQ's intermediate list, whence its maintenance retries it later
under a token that nobody has refused yet.
"""

from __future__ import annotations

import logging
from importlib.resources import files
from typing import Any
from uuid import UUID

from rq.job import Job, JobStatus
from rq.queue import Queue

from jobguard.adapters.rq.layout import KEPT, Layout
from jobguard.adapters.rq.lookup import prefix_for
from jobguard.errors import is_host_interrupt
from jobguard.model import Outcome, Refusal, Refused

log = logging.getLogger("jobguard")

_STATUS = {
    Outcome.COMPLETED: JobStatus.FINISHED,
    Outcome.FAILED: JobStatus.FAILED,
    Outcome.DEAD: JobStatus.FAILED,
    Outcome.CANCELLED: JobStatus.CANCELED,
    # Its hash is still there: the newer life is yet to be pushed, and will replace it.
    Outcome.SUPERSEDED: JobStatus.FINISHED,
}
_SCRIPT = files(__package__).joinpath("skip.lua").read_text(encoding="utf-8")
_ABANDON = files(__package__).joinpath("abandon.lua").read_text(encoding="utf-8")


def skip(worker: Any, job: Job, queue: Queue, refused: Refused) -> None:
    """Take the job out of RQ's hands; Redis' errors are logged, the job is not run either way."""
    log.warning("job %s is skipped: %s", job.id, refused.outcome or refused.reason)
    put_right(worker, job, queue, refused)


def finish(worker: Any, job: Job, queue: Queue, token: UUID) -> None:
    """Write into Redis that a run has completed which RQ takes for failed: Redis broke off its own word."""
    try:
        layout = Layout.parse(prefix_for(queue, queue.job_class))
        worker.connection.register_script(_ABANDON)(
            keys=layout.run(job.id, queue.name), args=[job.id, token.hex, layout.base]
        )
    except Exception as error:
        if is_host_interrupt(error):
            raise
        log.exception("jobguard could not end the run of job %s in Redis", job.id)
    put_right(worker, job, queue, Refused(token, Refusal.ENDED, Outcome.COMPLETED))


def put_right(worker: Any, job: Job, queue: Queue, refused: Refused) -> None:
    """Have Redis say of the job what the ledger says; Redis' errors are logged."""
    try:
        status = _status(refused)
        _put_right(worker, job, queue, refused.token.hex, status)
        if status is None:
            return
        job._status = status
        release = getattr(worker, "_release_slot_safely", None)
        if release is not None:  # a rate limit's slot; RQ 3.0
            release(job)
        if refused.outcome is Outcome.COMPLETED:
            queue.enqueue_dependents(job)
    except Exception as error:
        if is_host_interrupt(error):
            raise
        log.exception("jobguard could not put right what Redis says of job %s", job.id)


def _status(refused: Refused) -> JobStatus | None:
    if refused.reason is Refusal.CLAIMED:
        return None
    if refused.outcome is None:
        return JobStatus.FAILED if refused.reason is Refusal.SPENT else JobStatus.FINISHED
    return _STATUS[refused.outcome]


def _put_right(worker: Any, job: Job, queue: Queue, token: str, status: JobStatus | None) -> None:
    layout = Layout.parse(prefix_for(queue, queue.job_class))
    script = worker.connection.register_script(_SCRIPT)
    script(
        keys=layout.ending(job.id, queue.name),
        args=[job.id, token, status.value if status is not None else "", *KEPT],
    )
