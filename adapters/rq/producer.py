"""The hooks on every way in which RQ writes a job to Redis.

Each hook is a function that takes the original method and returns a wrapper with RQ's signature.
"""

from __future__ import annotations

import calendar
import math
import multiprocessing
import time
from collections.abc import Callable, Iterable
from datetime import datetime as DateTime
from functools import wraps
from typing import TYPE_CHECKING, Any

from redis.exceptions import ReadOnlyError
from rq.job import Job, JobStatus
from rq.queue import Queue
from rq.version import VERSION

from jobguard.adapters.rq import message
from jobguard.adapters.rq.envelope import Mode, amended
from jobguard.adapters.rq.lookup import tracker_for_job, tracker_for_program, tracker_for_queue
from jobguard.adapters.rq.message import BROKER_DOWN, Draft, clear_delivery, draft, drafting
from jobguard.adapters.rq.pipeline import (
    Batch,
    Staged,
    is_immediate,
    not_pushed,
    record,
    tracker_of,
)
from jobguard.adapters.rq.push import push
from jobguard.current import current
from jobguard.errors import StoreUnavailable
from jobguard.host_safety import contain_errors
from jobguard.log import log_event
from jobguard.registry import trackers

if TYPE_CHECKING:
    from redis.client import Pipeline

    from jobguard.adapter import Tracker

Hook = Callable[..., Any]

_NOT_SERVING = (*BROKER_DOWN, ReadOnlyError)
_SCHEDULER_WAITS = 5.0
"""The longest pause, in seconds, between two tries of RQ's scheduler in an outage of Redis."""
_QUIET_TIME = 30.0
"""Seconds without an error after which the next error counts as a new outage."""
_DEFERRED_BY_EXPIRY = tuple(int(part) for part in VERSION.split(".")[:2]) < (2, 8)


def enqueue_job(original: Hook) -> Hook:
    """Wrap Queue.enqueue_job: every plain enqueue calls it before anything is sent."""

    @wraps(original)
    def hook(
        self: Queue,
        job: Job,
        pipeline: Pipeline | None = None,
        at_front: bool = False,
        **kwargs: Any,
    ) -> Any:
        tracker = tracker_for_queue(self)
        if tracker is None:
            return original(self, job, pipeline=pipeline, at_front=at_front, **kwargs)
        clear_delivery(job)
        reads = kwargs.get("unique") or job._dependency_ids or getattr(job, "rate_limit_key", None)
        if pipeline is not None or reads:
            return original(self, job, pipeline=pipeline, at_front=at_front, **kwargs)
        return push(
            tracker,
            self,
            lambda pipe: original(self, job, pipeline=pipe, at_front=at_front, **kwargs),
        )

    return hook


def enqueue_many(original: Hook) -> Hook:
    """Wrap Queue.enqueue_many: record all jobs of a transaction in one call."""

    @wraps(original)
    def hook(
        self: Queue,
        job_datas: Iterable[Any],
        pipeline: Pipeline | None = None,
        group_id: str | None = None,
    ) -> Any:
        tracker = tracker_for_queue(self)
        if tracker is None or pipeline is not None:
            return original(self, job_datas, pipeline=pipeline, group_id=group_id)
        datas = list(job_datas)
        if any(data.depends_on for data in datas):  # reads Redis, in transactions of its own
            return original(self, datas, pipeline=None, group_id=group_id)
        return push(
            tracker, self, lambda pipe: original(self, datas, pipeline=pipe, group_id=group_id)
        )

    return hook


def _enqueue_job(original: Hook) -> Hook:
    """Wrap Queue._enqueue_job: every push to a queue, including RQ's own moves."""

    @wraps(original)
    def hook(
        self: Queue,
        job: Job,
        pipeline: Pipeline | None = None,
        at_front: bool = False,
        **kwargs: Any,
    ) -> Any:
        tracker = tracker_of(pipeline, self)
        if tracker is None:
            return original(self, job, pipeline=pipeline, at_front=at_front, **kwargs)
        if kwargs.get("unique"):
            return _push_unique(
                tracker,
                self,
                job,
                lambda: draft(job, Mode.QUEUED, fresh=True, at_front=at_front),
                lambda: original(self, job, pipeline=pipeline, at_front=at_front, **kwargs),
            )

        def stage(pipe: Pipeline) -> Any:
            return _stage(
                tracker,
                self.name,
                job,
                draft(job, Mode.QUEUED, at_front=at_front),
                pipe,
                lambda: original(self, job, pipeline=pipe, at_front=at_front, **kwargs),
            )

        if pipeline is None or is_immediate(pipeline):
            return push(tracker, self, stage)
        return stage(pipeline)

    return hook


def schedule_job(original: Hook) -> Hook:
    """Wrap Queue.schedule_job: enqueue_at, enqueue_in, and retries and repeats with a delay."""

    @wraps(original)
    def hook(
        self: Queue, job: Job, datetime: DateTime, pipeline: Pipeline | None = None, **kwargs: Any
    ) -> Any:
        tracker = tracker_of(pipeline, self)
        if tracker is None:
            return original(self, job, datetime, pipeline=pipeline, **kwargs)
        if not message.is_moving(job):
            clear_delivery(job)
        aware = datetime if datetime.tzinfo else datetime.astimezone()
        score = calendar.timegm(aware.utctimetuple())
        when: dict[str, Any] = {"score": str(score), "due_at": float(score)}
        if kwargs.get("unique"):
            return _push_unique(
                tracker,
                self,
                job,
                lambda: draft(job, Mode.SCHEDULED, fresh=True, **when),
                lambda: original(self, job, datetime, pipeline=pipeline, **kwargs),
            )

        def stage(pipe: Pipeline) -> Any:
            return _stage(
                tracker,
                self.name,
                job,
                draft(job, Mode.SCHEDULED, expires=False, **when),
                pipe,
                lambda: original(self, job, datetime, pipeline=pipe, **kwargs),
            )

        if pipeline is None or is_immediate(pipeline):
            return push(tracker, self, stage)
        return stage(pipeline)

    return hook


def schedule(original: Hook) -> Hook:
    """Wrap ScheduledJobRegistry.schedule: a part of the push, which RQ before 3.0 sends at once.

    In those versions, the id is in the delay queue before its hash is in Redis, and before jobguard
    has recorded the job.
    """

    @wraps(original)
    def hook(
        self: Any, job: Job, scheduled_datetime: DateTime, pipeline: Pipeline | None = None
    ) -> Any:
        if pipeline is None or not message.is_drafted(job):
            return original(self, job, scheduled_datetime, pipeline=pipeline)
        connection, self.connection = self.connection, pipeline
        try:
            return original(self, job, scheduled_datetime, pipeline=pipeline)
        finally:
            self.connection = connection

    return hook


def enqueue_scheduled_jobs(original: Hook) -> Hook:
    """Wrap RQScheduler.enqueue_scheduled_jobs: a due job supersedes its waiting delivery, ended or not."""

    @wraps(original)
    def hook(self: Any) -> Any:
        with message.scheduling():
            return original(self)

    return hook


def work_as_scheduler(original: Hook) -> Hook:
    """Wrap RQScheduler.work: wait for Redis in an outage.

    Without this, an outage ends the scheduler's process, and its worker checks it only after 10
    minutes. A scheduler whose worker is gone ends: no process would end it later.
    """

    @wraps(original)
    def hook(self: Any) -> Any:
        failed_at, wait = -math.inf, 0.0
        while True:
            try:
                return original(self)
            except _NOT_SERVING as error:
                if self._stop_requested or not any(known.mends_library for known in trackers()):
                    raise
                worker = multiprocessing.parent_process()
                if worker is not None and not worker.is_alive():
                    raise
                if time.monotonic() - failed_at > _QUIET_TIME:
                    wait = 0.5
                    log_event("scheduler_waits", error=str(error))
                wait = min(2 * wait, _SCHEDULER_WAITS)
                time.sleep(wait)
                failed_at = time.monotonic()

    return hook


def _enqueue_rate_limited_job(original: Hook) -> Hook:
    """Wrap Queue._enqueue_rate_limited_job: a job that waits for a slot of its key."""

    @wraps(original)
    def hook(
        self: Queue, job: Job, pipeline: Pipeline | None = None, at_front: bool = False
    ) -> Any:
        tracker = tracker_for_queue(self)
        if tracker is None:
            return original(self, job, pipeline=pipeline, at_front=at_front)
        waiting = draft(job, Mode.RATE_LIMITED, at_front=at_front, score=str(int(time.time())))
        if pipeline is None or is_immediate(pipeline):
            return _push_by_script(
                tracker,
                self,
                job,
                waiting,
                lambda: original(self, job, pipeline=pipeline, at_front=at_front),
            )
        return _stage(
            tracker,
            self.name,
            job,
            waiting,
            pipeline,
            lambda: original(self, job, pipeline=pipeline, at_front=at_front),
        )

    return hook


def save(original: Hook) -> Hook:
    """Wrap Job.save: RQ stores a job that waits for its parents in this way."""

    @wraps(original)
    def hook(
        self: Job,
        pipeline: Pipeline | None = None,
        include_meta: bool = True,
        include_result: bool = True,
    ) -> Any:
        def call() -> Any:
            return original(
                self, pipeline=pipeline, include_meta=include_meta, include_result=include_result
            )

        _warn_of_other_schedulers(self, pipeline)
        if pipeline is None and message.token_of(self) is not None:
            result = call()
            amend(self, include_meta=include_meta)
            return result
        if self._status != JobStatus.DEFERRED or pipeline is None or message.is_drafted(self):
            return call()
        if message.token_of(self) is not None:  # recorded before: only its fields change
            return call()
        tracker = tracker_for_job(self)
        if tracker is None or is_immediate(pipeline):
            return call()
        deferred = draft(self, Mode.DEFERRED, score=_deferred_score(self))
        return _stage(tracker, self.origin, self, deferred, pipeline, call)

    return hook


def save_meta(original: Hook) -> Hook:
    """Wrap Job.save_meta: record a change of the meta, so that a restore has it."""

    @wraps(original)
    def hook(self: Job, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        amend(self, include_meta=True, only_meta=True)
        return result

    return hook


def amend(job: Job, *, include_meta: bool, only_meta: bool = False) -> None:
    """Update the record of a job with the saved fields, except for saves of the job's own run."""
    token = message.token_of(job)
    if token is None or job._status in message.ENDED or message.is_drafted(job):
        return
    if message.run_of(job) is not None or current().id == job.id:
        return  # a run may save its progress many times a second
    tracker = tracker_for_job(job)
    if tracker is None:
        return
    with contain_errors("record a change of a job", job_id=job.id):
        saved = message.saved(job, include_meta=include_meta, only_meta=only_meta)
        tracker.amend(token, lambda envelope: amended(envelope, saved))


_warned: set[int] = set()


def _warn_of_other_schedulers(job: Job, pipeline: Pipeline | None) -> None:
    """Log once that another scheduler stores jobs without a record: RQ's own scheduler does not."""
    scheduled = job._status == JobStatus.SCHEDULED and pipeline is None
    if not scheduled or message.is_drafted(job) or message.token_of(job) is not None:
        return
    tracker = tracker_for_job(job)
    if tracker is None or tracker.source.id in _warned:
        return
    _warned.add(tracker.source.id)
    log_event("schedule_unrecorded", job_id=job.id)


def _deferred_score(job: Job) -> str:
    """Return the score of a deferred job.

    RQ before 2.8 fails a deferred job when its score has passed. Since 2.8, the score is the time of
    its creation.
    """
    now = int(time.time())
    if not _DEFERRED_BY_EXPIRY:
        return str(now)
    return str(now + job.ttl) if job.ttl else "+inf"


def start_cron(original: Hook) -> Hook:
    """Wrap CronScheduler.start: the environment guards `jobguard run -- rq cron`, like a worker."""

    @wraps(original)
    def hook(self: Any) -> Any:
        tracker_for_program(self.connection)
        return original(self)

    return hook


def _stage(
    tracker: Tracker,
    queue: str,
    job: Job,
    push_: Draft,
    pipe: Pipeline,
    call: Callable[[], Any],
) -> Any:
    """Let RQ add its commands to the pipeline, and keep their position."""
    start = len(pipe.command_stack)
    with drafting(job, push_):
        result = call()
    Batch.of(pipe).stage(tracker, job, push_, queue=queue, start=start)
    return result


def _push_unique(
    tracker: Tracker,
    queue: Queue,
    job: Job,
    make: Callable[[], Draft],
    call: Callable[[], Any],
) -> Any:
    """Push a job with a unique id.

    The delivery is recorded as fresh although the id may exist: otherwise its record would supersede
    the older delivery of the id, and that delivery must stay if RQ refuses the new one.
    """
    # Do not check a job without an id: reading its key gives it an id, and RQ must refuse such a job.
    if job._id is not None and queue.connection.exists(job.key):
        return call()  # RQ refuses it, and there is nothing to withdraw
    return _push_by_script(tracker, queue, job, make(), call)


def _push_by_script(
    tracker: Tracker, queue: Queue, job: Job, push_: Draft, call: Callable[[], Any]
) -> Any:
    """Record after RQ has made the mapping and before RQ sends it; RQ sends at once here."""
    staged: list[Staged] = []

    def record_now() -> None:
        push_.on_written = None
        with contain_errors("record a job", let_pass=StoreUnavailable, job_id=job.id):
            delivery = message.deliver(job, push_, queue=queue.name)
            entry = Staged(tracker, job, push_, delivery, 0, 0)
            record([entry])
            staged.append(entry)

    push_.on_written = record_now
    try:
        with drafting(job, push_):
            result = call()
    except BaseException as error:
        if _is_duplicate(error):
            tracker.withdraw([entry.delivery for entry in staged])
        elif staged:
            not_pushed(staged, error)
        raise
    message.set_token(job, push_.token)
    return result


def _is_duplicate(error: BaseException) -> bool:
    return type(error).__name__ == "DuplicateJobError"  # RQ has this class since 2.8
