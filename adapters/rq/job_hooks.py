"""The hooks that keep the token of its delivery on a Job object, from one delivery to the next."""

from __future__ import annotations

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
from jobguard.host_safety import contain_errors
from jobguard.model import Outcome

if TYPE_CHECKING:
    from redis.client import Pipeline

Hook = Callable[..., Any]


def to_dict(original: Hook) -> Hook:
    """Wrap Job.to_dict: add the token to the mapping that RQ writes, and keep that mapping."""

    @wraps(original)
    def hook(self: Job, include_meta: bool = True, include_result: bool = True) -> Any:
        mapping = original(self, include_meta=include_meta, include_result=include_result)
        message.written(self, mapping)
        return mapping

    return hook


def restore(original: Hook) -> Hook:
    """Wrap Job.restore: keep the token of a job that RQ reads from Redis."""

    @wraps(original)
    def hook(self: Job, raw_data: Any) -> Any:
        result = original(self, raw_data)
        with contain_errors("read the fields of a job", job_id=self.id):
            message.remember(self, raw_data)
        return result

    return hook


def retry(original: Hook) -> Hook:
    """Wrap Job.retry: the next push supersedes the attempt that failed."""

    @wraps(original)
    def hook(self: Job, queue: Queue, pipeline: Pipeline) -> Any:
        with moving(self, Outcome.SUPERSEDED):
            return original(self, queue, pipeline)

    return hook


def _handle_retry_result(original: Hook) -> Hook:
    """Wrap Job._handle_retry_result: do the same for a function that returned a Retry."""

    @wraps(original)
    def hook(self: Job, *args: Any, **kwargs: Any) -> Any:
        with moving(self, Outcome.SUPERSEDED):
            return original(self, *args, **kwargs)

    return hook


def get_status(original: Hook) -> Hook:
    """Wrap Job.get_status: a parent that lost its hash while it ran has still finished.

    RQ reads the status while it handles the success, to release the children. Without a status, RQ
    would turn that success into a failure.
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
    """Wrap FailedJobRegistry.add: RQ calls it for every final failure, from any process."""

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
    """Wrap BaseRegistry.requeue: the requeued job is a new delivery without a parent.

    The Job object may be older than the failure. It then does not know that its delivery has ended.
    """

    @wraps(original)
    def hook(self: Any, job_or_id: Job | str, at_front: bool = False) -> Any:
        if not isinstance(job_or_id, Job):
            return original(self, job_or_id, at_front=at_front)
        before = message.token_of(job_or_id)
        message.set_token(job_or_id, None)
        try:
            return original(self, job_or_id, at_front=at_front)
        except BaseException:  # the job is not in this registry: its delivery is unchanged
            message.set_token(job_or_id, before)
            raise

    return hook
