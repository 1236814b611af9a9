"""The skip: what a worker does with a task that it may not run.

The task is ignored, and its message acknowledged, as Celery does with every ``Ignore``. Where the
task has ended before, what our start has overwritten is put back: with ``task_track_started`` Celery
writes STARTED before it asks anybody. What has never been there is not made up: nobody knows the
result of a task that Redis has forgotten. Where another worker runs it, nothing of its run is touched.
"""

from __future__ import annotations

import logging
from typing import Any

from celery import states
from celery.backends.base import BaseKeyValueStoreBackend
from celery.exceptions import Ignore, WorkerLostError

from jobguard.adapters.celery import chords
from jobguard.adapters.celery.header import DEAD
from jobguard.errors import is_host_interrupt
from jobguard.model import Outcome, Refusal, Refused

log = logging.getLogger("jobguard")

_BEFORE = "_jobguard_before"


def remember(task: Any) -> None:
    """Keep what the result backend says of a task before Celery writes that it has started."""
    request, backend = task.request, task.backend
    # A batch of celery-batches has no id of its own.
    if request.id and task.track_started and not request.ignore_result and _keeps(backend):
        vars(request)[_BEFORE] = backend.get(backend.get_key_for_task(request.id))


def skip(task: Any, refused: Refused) -> Ignore:
    """Return what is to be raised, when everything has been put right; errors are logged."""
    request = task.request
    log.warning(
        "task %s[%s] is skipped: %s", task.name, request.id, refused.outcome or refused.reason
    )
    try:
        if refused.outcome is Outcome.DEAD and request.get(DEAD) is not None:
            _fail(task)
        elif refused.reason is Refusal.ENDED:
            _put_back(task)
            chords.finish(task, request)
        elif refused.reason is Refusal.SPENT:
            _fail(task)
    except Exception as error:
        if is_host_interrupt(error):
            raise
        log.exception("jobguard could not put right what is said of task %s", request.id)
    return Ignore(f"jobguard: {refused.outcome or refused.reason}")


def _keeps(backend: Any) -> bool:
    return isinstance(backend, BaseKeyValueStoreBackend)


def _put_back(task: Any) -> None:
    request, backend = task.request, task.backend
    if _BEFORE not in vars(request):
        return
    key, before = backend.get_key_for_task(request.id), vars(request)[_BEFORE]
    if before is None:
        backend.delete(key)
    elif backend.decode_result(before)["status"] in states.READY_STATES:
        backend.set(key, before)


def _fail(task: Any) -> None:
    """Its crash budget is spent: those who wait for it, its error callbacks and its chord, hear of it."""
    request = task.request
    task.backend.mark_as_failure(
        request.id,
        WorkerLostError("jobguard: too many workers died while they ran this task"),
        request=request,
        store_result=not request.ignore_result,
    )
