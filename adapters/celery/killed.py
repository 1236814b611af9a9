"""How tasks end in the worker's main process, where no run of ours can tell it.

Killed is not failed: a child that was killed (by the kernel, for want of memory) takes its task along
as a worker's death does. Where the leader brings it back, within the crash budget, Celery neither
fails it nor queues it again: it would do so at once and for ever. A task that is beyond its hard
time limit was killed by order, and has failed. Whatever is revoked, expired, or cannot be read, ends
here as well.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any
from uuid import UUID

from billiard.einfo import ExceptionWithTraceback
from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from celery.worker.request import Request
from celery.worker.state import task_ready

from jobguard.adapters.celery import sessions
from jobguard.adapters.celery.hooks import Hooks
from jobguard.adapters.celery.parts import REDIS_FAILED, part_of
from jobguard.adapters.celery.sessions import Working, token_in
from jobguard.errors import is_host_interrupt
from jobguard.job import Claim, Outcome

log = logging.getLogger("jobguard")
Hook = Callable[..., Any]

_LOST = "_jobguard_lost"
"""On a request whose child is gone: its message may go back into the queue."""
_OVER = "_jobguard_over"


def put_on(hooks: Hooks) -> None:
    """Hear of every end that the main process makes."""
    hooks.put(Request, "on_failure", on_failure)
    hooks.put(Request, "on_timeout", on_timeout)
    hooks.put(Request, "reject", reject)
    hooks.put(Request, "_announce_cancelled", announce_cancelled)


def on_failure(original: Hook) -> Hook:
    """Request.on_failure: a child has reported, or is gone."""

    @wraps(original)
    def hook(
        self: Any, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False
    ) -> Any:
        def call() -> Any:
            return original(self, exc_info, send_failed_event, return_ok)

        working = sessions.working_for(self.app)
        error = exc_info.exception
        error = error.exc if isinstance(error, ExceptionWithTraceback) else error
        if working is not None and not return_ok and _is_told(working, self):
            return None
        if working is not None and not return_ok and _never_began(working, self, error):
            return None
        gone = isinstance(error, WorkerLostError | TimeLimitExceeded | SystemExit)
        by_order = _OVER in vars(self) or self._already_revoked or self._already_cancelled
        if working is None or not gone or by_order:
            return call()
        if isinstance(error, WorkerLostError) and _is_left_to_the_leader(working, self):
            return None
        return _lost(working, self, repr(error), call)

    return hook


def on_timeout(original: Hook) -> Hook:
    """Request.on_timeout: the hard time limit kills the child by order. on_failure may come before."""

    @wraps(original)
    def hook(self: Any, soft: bool, timeout: Any) -> Any:
        working = sessions.working_for(self.app)
        if soft or working is None or _OVER in vars(self):
            return original(self, soft, timeout)
        error = TimeLimitExceeded(timeout)
        return _lost(working, self, repr(error), lambda: original(self, soft, timeout))

    return hook


def reject(original: Hook) -> Hook:
    """Request.reject: back into the queue, where the next worker must be free to claim it."""

    @wraps(original)
    def hook(self: Any, requeue: bool = False) -> Any:
        if requeue and vars(self).get(_LOST) and not self.acknowledged:
            working, token = sessions.working_for(self.app), token_in(self)
            if working is not None and token is not None:
                vars(self)[_LOST] = False
                working.session.give_back(Claim(token, 0))
        return original(self, requeue)

    return hook


def announce_cancelled(original: Hook) -> Hook:
    """Request._announce_cancelled: a cold shutdown, or a lost connection, kills the child.

    Celery says RETRY, but sends nothing. What was acknowledged when it began is nobody's when this
    worker has said goodbye, and not before, for that would be a crash; what was not goes back into
    the queue.
    """

    @wraps(original)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        working, token = sessions.working_for(self.app), token_in(self)
        if working is not None and token is not None:
            if self.acknowledged:
                working.last.add(token)
            else:
                working.session.give_back(Claim(token, 0))
        return original(self, *args, **kwargs)

    return hook


def _is_told(working: Working, request: Any) -> bool:
    """Whether the child had told its end, other than a failure, before it was lost: that end stands."""
    token = token_in(request)
    if token is None:
        return False
    outcome = working.tracker.tombstones([token]).get(token)
    if outcome in (None, Outcome.FAILED, Outcome.DEAD):
        return False
    log.warning("the child that ran task %s is lost, but the task is %s", request.id, outcome)
    task_ready(request, successful=outcome is Outcome.COMPLETED)
    request.acknowledge()
    return True


def _never_began(working: Working, request: Any, error: BaseException) -> bool:
    """Whether Redis failed Celery before the function was called; then it is not the task that failed."""
    token = token_in(request)
    if token is None or not isinstance(error, REDIS_FAILED):
        return False
    if token not in working.tracker.recovers([token], began=False):
        return False  # it has begun, and its end is told
    log.warning("task %s never began, for Redis failed its worker: it goes back", request.id)
    task_ready(request)
    request.acknowledge()
    working.session.give_back(Claim(token, 0))
    return True


def _is_left_to_the_leader(working: Working, request: Any) -> bool:
    """Whether the leader brings this task back; then it is out of Celery's hands."""
    token = token_in(request)
    if token is None or token not in working.tracker.recovers([token]):
        return False
    stored = getattr(request, "_success_was_stored", None)
    if stored is not None and stored():
        return False  # the child had done all but to report it
    log.warning("task %s was killed, not failed: it goes back within its crash budget", request.id)
    task_ready(request)
    request.acknowledge()
    working.session.abandon(Claim(token, 0))
    return True


def _lost(working: Working, request: Any, error: str, call: Callable[[], Any]) -> Any:
    """Let Celery judge what has become of the task of a child that is gone, and report that."""
    token = token_in(request)
    vars(request)[_OVER] = vars(request)[_LOST] = True
    try:
        return call()
    finally:
        if token is not None and vars(request).pop(_LOST, False):
            _judged(working, request, token, error)


def _judged(working: Working, request: Any, token: UUID, error: str) -> None:
    if request.task.acks_late and not request.acknowledged:
        # Celery before 5.6 leaves it where it is, for the visibility timeout to bring it back.
        working.session.give_back(Claim(token, 0))
        return
    stored = getattr(request, "_success_was_stored", None)
    done = stored is not None and stored()
    report(
        working,
        token,
        Outcome.COMPLETED if done else Outcome.FAILED,
        request=request._context,
        error=None if done else error,
    )


def report(
    working: Working,
    token: UUID,
    outcome: Outcome,
    *,
    request: Any = None,
    error: str | None = None,
    job_id: str = "",
) -> None:
    """Report an end of which the main process knows, without a claim at hand."""
    try:
        info = getattr(request, "delivery_info", None) or {}
        working.session.end(
            Claim(token, 0),
            outcome,
            job_id=job_id or getattr(request, "id", None) or "",
            queue=info.get("routing_key") or "",
            task=getattr(request, "task", None) or "",
            error=error,
            part=None if request is None else part_of(request),
        )
    except Exception as failure:
        if is_host_interrupt(failure):
            raise
        log.exception("jobguard could not report the end of task %s", job_id)
