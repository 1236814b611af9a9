"""How tasks end in the worker's main process, where no run of ours can tell it.

Killed is not failed: a child that was killed (by the kernel, for want of memory) takes its task along
as a worker's death does. Where the leader brings it back, within the crash budget, Celery neither
fails it nor queues it again: it would do so at once and for ever. A task that is beyond its hard
time limit was killed by order, and has failed. Whatever is revoked, expired, or cannot be read, ends
here as well.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any
from uuid import UUID

from billiard.einfo import ExceptionWithTraceback
from billiard.exceptions import Terminated, TimeLimitExceeded, WorkerLostError
from celery import states
from celery.worker.request import Request
from celery.worker.state import task_ready

from jobguard.adapters.celery import sessions
from jobguard.adapters.celery.chords import REDIS_FAILED, part_made_of, part_of
from jobguard.adapters.celery.contain_errors import contain_errors
from jobguard.adapters.celery.hooks import Hooks
from jobguard.adapters.celery.results import done_at
from jobguard.adapters.celery.sessions import Working, token_in
from jobguard.adapters.celery.unacked import snapshot
from jobguard.model import Claim, Outcome, Part

if TYPE_CHECKING:
    from jobguard.adapter import Session

log = logging.getLogger("jobguard")
Hook = Callable[..., Any]

_GONE = (WorkerLostError, TimeLimitExceeded, SystemExit, KeyboardInterrupt)
"""What says that there is no child any more."""
_LOST = "_jobguard_lost"
"""On a request whose child is gone: its message may go back into the queue."""
_OVER = "_jobguard_over"
_ORDERED = "_jobguard_ordered"
"""On a request that Celery was told to terminate or to cancel."""
_AGAIN = 1.0
"""Seconds until it is asked again what becomes of a task."""


class _UnknownFate(Exception):
    """Postgres is away: until it is asked, a task has neither failed nor come back."""


def put_on(hooks: Hooks) -> None:
    """Hear of every end that the main process makes."""
    hooks.put(Request, "on_failure", on_failure)
    hooks.put(Request, "on_timeout", on_timeout)
    hooks.put(Request, "reject", reject)
    hooks.put(Request, "_announce_cancelled", announce_cancelled)
    hooks.put(Request, "terminate", is_ordered)
    hooks.put(Request, "cancel", is_ordered)


def on_failure(original: Hook) -> Hook:
    """Request.on_failure: a child has reported, or is gone."""

    @wraps(original)
    def hook(
        self: Any, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False
    ) -> Any:
        def call() -> Any:
            return original(self, exc_info, send_failed_event, return_ok)

        gone = ""
        with contain_errors("see what became of a task"):
            error = exc_info.exception
            error = error.exc if isinstance(error, ExceptionWithTraceback) else error
            try:
                if not return_ok and _is_dealt_with(self, error):
                    return None
            except _UnknownFate:
                _ask_again(self, lambda: hook(self, exc_info, send_failed_event, return_ok))
                return None
            gone = repr(error) if isinstance(error, _GONE) and not _was_by_order(self) else ""
        return _lost(self, gone, call) if gone else call()

    return hook


def on_timeout(original: Hook) -> Hook:
    """Request.on_timeout: the hard time limit kills the child by order. on_failure may come before."""

    @wraps(original)
    def hook(self: Any, soft: bool, timeout: Any) -> Any:
        def call() -> Any:
            return original(self, soft, timeout)

        if soft or _OVER in vars(self):
            return call()
        return _lost(self, repr(TimeLimitExceeded(timeout)), call)

    return hook


def reject(original: Hook) -> Hook:
    """Request.reject: back into the queue, where the next worker must be free to claim it."""

    @wraps(original)
    def hook(self: Any, requeue: bool = False) -> Any:
        with contain_errors("hand back a task"):
            if requeue and vars(self).get(_LOST) and not self.acknowledged:
                vars(self)[_LOST] = False
                _hand_back(self)
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
        with contain_errors("hand back a task"):
            if self.acknowledged and not self.task.acks_late:
                _keep_until_goodbye(self)
            else:
                _hand_back(self)
        try:
            return original(self, *args, **kwargs)
        except REDIS_FAILED as error:
            # The task is handed back already. An error here would end the whole worker.
            log.warning("the result backend did not take the state of a cancelled task: %r", error)
            return None
        finally:
            # Celery sets this last. If the Redis of the results is away, it never does, and takes the
            # death of the child for a revocation.
            self._already_cancelled = True

    return hook


def is_ordered(original: Hook) -> Hook:
    """Request.terminate, Request.cancel: the end of this run is ordered, and announced after it."""

    @wraps(original)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        vars(self)[_ORDERED] = True
        return original(self, *args, **kwargs)

    return hook


def is_reported_elsewhere(session: Session, token: UUID, thrown: BaseException) -> bool:
    """Whether Celery announces this end of a greenlet by itself: an order, or a time limit of gevent's."""
    request = _request_of(session, token)
    if request is None:
        return False
    if vars(request).get(_ORDERED):
        return True
    limit = request.time_limits[0] or request.task.time_limit
    return bool(limit) and _is_timeout(thrown)


def is_acknowledged_after(thrown: BaseException) -> bool:
    """Whether a pool of greenlets takes this for a return."""
    return any(kind.__name__ == "GreenletExit" for kind in type(thrown).__mro__)


def let_go(session: Session, token: UUID) -> None:
    """Celery has dropped a message without acknowledging it: say no more that it is held."""
    working, request = sessions.own(session), _request_of(session, token)
    if working is not None and working.unacked is not None and request is not None:
        working.unacked.drop(request.message.delivery_tag)


def _request_of(session: Session, token: UUID) -> Any:
    working = sessions.own(session)
    handed = () if working is None else snapshot(working.handed)
    return next((request for request in handed if token_in(request) == token), None)


def _is_timeout(thrown: BaseException) -> bool:
    return any(kind.__name__ == "Timeout" for kind in type(thrown).__mro__)


def _hand_back(request: Any) -> None:
    working, token = sessions.working_for(request.app), token_in(request)
    if working is not None and token is not None:
        working.session.release(Claim(token, 0))


def _keep_until_goodbye(request: Any) -> None:
    working, token = sessions.working_for(request.app), token_in(request)
    if working is not None and token is not None:
        working.last.add(token)


def _was_by_order(request: Any) -> bool:
    """Whether this end is told already, or is no end."""
    return _OVER in vars(request) or request._already_revoked or request._already_cancelled


def _is_dealt_with(request: Any, error: BaseException) -> bool:
    """Whether Celery need not hear that this child did not return: its task has not failed."""
    working = sessions.working_for(request.app)
    if working is None or _was_by_order(request):
        return False
    if _is_reported(working, request) or _never_began(working, request, error):
        return True
    return _is_lost(request, error) and _is_left_to_the_leader(working, request)


def _is_lost(request: Any, error: BaseException) -> bool:
    """Whether this says that a child died; also by a termination that nobody has asked for."""
    if isinstance(error, Terminated):
        return not vars(request).get(_ORDERED)
    return isinstance(error, WorkerLostError)


def _is_reported(working: Working, request: Any) -> bool:
    """Whether the child had told its end, other than a failure, before it was lost: that end stands."""
    token = token_in(request)
    if token is None:
        return False
    working.session.flush()  # it may have told it a moment ago
    outcome = (working.tracker.tombstones([token]) or {}).get(token)
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
    if not _recovers(working, token, began=False):
        return False  # it has begun, and its end is told
    log.warning("task %s never began, for Redis failed its worker: it goes back", request.id)
    task_ready(request)
    request.acknowledge()
    working.session.release(Claim(token, 0))
    return True


def _is_left_to_the_leader(working: Working, request: Any) -> bool:
    """Whether the leader brings this task back; then it is out of Celery's hands."""
    token = token_in(request)
    if token is None or not _recovers(working, token):
        return False
    if _stored(request):
        return False  # the child had done all but to report it
    log.warning("task %s was killed, not failed: it goes back within its crash budget", request.id)
    task_ready(request)
    request.acknowledge()
    working.session.abandon(Claim(token, 0))
    return True


def _recovers(working: Working, token: UUID, *, began: bool = True) -> bool:
    found = working.tracker.recovers([token], began=began)
    if found is None:
        raise _UnknownFate
    return token in found


def _stored(request: Any) -> Mapping[str, Any] | None:
    """Return what its child had stored of its success, if it had; an older Celery does not say."""
    stored = getattr(request, "_success_was_stored", None)
    meta: Mapping[str, Any] | None = (stored() or None) if stored is not None else None
    ended = meta and meta.get("date_done")
    if ended and done_at(ended) < (request.time_start or 0.0):
        return None  # an earlier life of its id
    return meta


def _ask_again(request: Any, ask: Callable[[], object]) -> None:
    """Have it decided in a moment; until then its claim stands for as long as a killed child's does."""
    log.warning("what becomes of task %s is decided when Postgres is back", request.id)
    working = sessions.working_for(request.app)
    if working is not None:
        working.controller.consumer.timer.call_after(_AGAIN, ask)


def _lost(request: Any, error: str, call: Callable[[], Any]) -> Any:
    """Let Celery judge what has become of the task of a child that is gone, and report that."""
    vars(request)[_OVER] = vars(request)[_LOST] = True
    try:
        return call()
    finally:
        with contain_errors("report the end of a task"):
            if vars(request).pop(_LOST, False):
                _tell(request, error)


def _tell(request: Any, error: str) -> None:
    working, token = sessions.working_for(request.app), token_in(request)
    if working is None or token is None:
        return
    if request.task.acks_late and not request.acknowledged:
        # Older Celerys leave it where it is, for the visibility timeout to bring it back.
        working.session.release(Claim(token, 0))
        return
    meta = _stored(request)
    if meta is None:
        report(working, token, Outcome.FAILED, request=request._context, error=error)
        return
    # The child has counted it in Redis, or was about to; Redis may forget that before the chord goes on.
    context = request._context
    part = part_made_of(request.task.backend, context, states.SUCCESS, meta["result"])
    report(working, token, Outcome.COMPLETED, request=context, part=part)


def report(
    working: Working,
    token: UUID,
    outcome: Outcome,
    *,
    request: Any = None,
    error: str | None = None,
    part: Part | None = None,
    job_id: str = "",
) -> None:
    """Report an end of which the main process knows, without a claim at hand."""
    with contain_errors("report the end of a task"):
        info = getattr(request, "delivery_info", None) or {}
        working.session.end(
            Claim(token, 0),
            outcome,
            job_id=job_id or getattr(request, "id", None) or "",
            queue=info.get("routing_key") or "",
            task=getattr(request, "task", None) or "",
            error=error,
            part=part or (None if request is None else part_of(request)),
        )
