"""The hooks by which a Job object knows which delivery it is, from one life to the next."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from rq.exceptions import InvalidJobOperation
from rq.job import Job
from rq.queue import Queue

from jobguard.adapters.rq import message
from jobguard.adapters.rq.layout import SPENT
from jobguard.adapters.rq.lookup import tracker_for_job
from jobguard.adapters.rq.message import moving
from jobguard.errors import is_host_interrupt
from jobguard.model import Outcome

if TYPE_CHECKING:
    from redis.client import Pipeline

log = logging.getLogger("jobguard")
Hook = Callable[..., Any]


def to_dict(original: Hook) -> Hook:
    """Job.to_dict: where our token goes into what RQ writes, and where we see it."""

    @wraps(original)
    def hook(self: Job, include_meta: bool = True, include_result: bool = True) -> Any:
        mapping = original(self, include_meta=include_meta, include_result=include_result)
        message.written(self, mapping)
        return mapping

    return hook


def restore(original: Hook) -> Hook:
    """Job.restore: a job that is read from Redis knows which delivery it is."""

    @wraps(original)
    def hook(self: Job, raw_data: Any) -> Any:
        result = original(self, raw_data)
        try:
            message.remember(self, raw_data)
        except Exception as error:
            if is_host_interrupt(error):
                raise
            log.exception("jobguard could not read its fields of job %s", self.id)
        return result

    return hook


def retry(original: Hook) -> Hook:
    """Job.retry: the next push takes the place of the attempt that failed."""

    @wraps(original)
    def hook(self: Job, queue: Queue, pipeline: Pipeline) -> Any:
        with moving(self, Outcome.SUPERSEDED):
            return original(self, queue, pipeline)

    return hook


def _handle_retry_result(original: Hook) -> Hook:
    """Job._handle_retry_result: the same for a function that returned a Retry."""

    @wraps(original)
    def hook(self: Job, *args: Any, **kwargs: Any) -> Any:
        with moving(self, Outcome.SUPERSEDED):
            return original(self, *args, **kwargs)

    return hook


def get_status(original: Hook) -> Hook:
    """Job.get_status: a parent that lost its hash while it ran has still finished.

    RQ asks for it in the middle of the success, to release the children; without an answer it would
    turn that success into a failure.
    """

    @wraps(original)
    def hook(self: Job, refresh: bool = True) -> Any:
        status = self._status
        try:
            return original(self, refresh=refresh)
        except InvalidJobOperation:
            if not message.is_repeating(self) or message.run_of(self) is None:
                raise
            self._status = status
            return status

    return hook


def add_to_failed(original: Hook) -> Hook:
    """FailedJobRegistry.add: every failure for good, whoever found it."""

    @wraps(original)
    def hook(self: Any, job: Job, *args: Any, **kwargs: Any) -> Any:
        result = original(self, job, *args, **kwargs)
        message.give_up(job)
        token = message.token_of(job)
        if token is not None and tracker_for_job(job) is not None:
            pipeline = args[2] if len(args) > 2 else kwargs.get("pipeline")
            client = pipeline if pipeline is not None else job.connection
            message.mark(client, job, token.hex + SPENT)
        return result

    return hook


def requeue(original: Hook) -> Hook:
    """BaseRegistry.requeue: a person puts a job back, and nothing of its old life carries over.

    The Job may be an object from before it failed, which does not know that its delivery has ended.
    """

    @wraps(original)
    def hook(self: Any, job_or_id: Job | str, at_front: bool = False) -> Any:
        if not isinstance(job_or_id, Job):
            return original(self, job_or_id, at_front=at_front)
        before = message.token_of(job_or_id)
        message.set_token(job_or_id, None)
        try:
            return original(self, job_or_id, at_front=at_front)
        except BaseException:  # not in this registry: it is what it was
            message.set_token(job_or_id, before)
            raise

    return hook
