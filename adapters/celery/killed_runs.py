"""Ends of tasks that the worker's main process reports, because no run of ours can report them.

A killed task has not failed. A child that was killed (by the kernel, for lack of memory) loses its
task as a dead worker does. If the leader restores that task, within the crash budget, Celery
neither fails it nor queues it again: Celery would queue it at once and for ever. A task beyond its
hard time limit was killed on purpose, and has failed. Tasks that are revoked, expired, or
unreadable end here as well.
"""

from __future__ import annotations

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
from jobguard.adapters.celery.results import done_at
from jobguard.adapters.celery.sessions import Working, queue_of, snapshot, token_of_request
from jobguard.errors import StoreUnavailable
from jobguard.host_safety import contain_errors
from jobguard.log import log_event
from jobguard.model import Claim, Outcome, Part
from jobguard.patching import Hooks

if TYPE_CHECKING:
    from jobguard.adapter import Session

Hook = Callable[..., Any]

_GONE = (WorkerLostError, TimeLimitExceeded, SystemExit, KeyboardInterrupt)
"""Errors that show that the child is gone."""
_LOST = "_jobguard_lost"
"""On a request whose child is gone: its message may go back into the queue."""
_OVER = "_jobguard_over"
_ORDERED = "_jobguard_ordered"
"""On a request that Celery has orders to terminate or to cancel."""
_AGAIN = 1.0
"""Seconds until the next attempt to decide the outcome of a task."""


class _UndecidedOutcome(Exception):
    """Postgres is away: until it answers, a task is neither failed nor restored."""


def put_on(hooks: Hooks) -> None:
    """Hook every end of a task in the main process."""
    hooks.put(Request, "on_failure", on_failure)
    hooks.put(Request, "on_timeout", on_timeout)
    hooks.put(Request, "reject", reject)
    hooks.put(Request, "_announce_cancelled", announce_cancelled)
    hooks.put(Request, "terminate", mark_ordered)
    hooks.put(Request, "cancel", cancel)


def on_failure(original: Hook) -> Hook:
    """Request.on_failure: a child has reported, or is gone."""

    @wraps(original)
    def hook(
        self: Any, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False
    ) -> Any:
        def call() -> Any:
            return original(self, exc_info, send_failed_event, return_ok)

        gone = ""
        with contain_errors("decide the outcome of a task", let_pass=StoreUnavailable):
            error = exc_info.exception
            error = error.exc if isinstance(error, ExceptionWithTraceback) else error
            try:
                if not return_ok and _is_handled(self, error):
                    return None
            except _UndecidedOutcome:
                _decide_again(self, lambda: hook(self, exc_info, send_failed_event, return_ok))
                return None
            gone = repr(error) if isinstance(error, _GONE) and not _is_decided(self) else ""
        return _lost(self, gone, call) if gone else call()

    return hook


def on_timeout(original: Hook) -> Hook:
    """Request.on_timeout: the hard time limit kills the child on purpose. on_failure may come before."""

    @wraps(original)
    def hook(self: Any, soft: bool, timeout: Any) -> Any:
        def call() -> Any:
            return original(self, soft, timeout)

        if soft or _OVER in vars(self):
            return call()
        return _lost(self, repr(TimeLimitExceeded(timeout)), call)

    return hook


def reject(original: Hook) -> Hook:
    """Request.reject: the message goes back into the queue, so release the claim for the next worker."""

    @wraps(original)
    def hook(self: Any, requeue: bool = False) -> Any:
        with contain_errors("release the claim of a task", let_pass=StoreUnavailable):
            if requeue and vars(self).get(_LOST) and not self.acknowledged:
                vars(self)[_LOST] = False
                _release(self)
        return original(self, requeue)

    return hook


def announce_cancelled(original: Hook) -> Hook:
    """Request._announce_cancelled: a cold shutdown, or a lost connection, kills the child.

    Celery's state is RETRY, but Celery sends nothing. A message that was acknowledged at its start
    stays claimed until this worker leaves: without a claim before that, it would count as a crash.
    A message that was not acknowledged goes back into the queue.
    """

    @wraps(original)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        with contain_errors("release the claim of a task", let_pass=StoreUnavailable):
            if self.acknowledged and not self.task.acks_late:
                _keep_until_leave(self)
            else:
                _release(self)
        try:
            return original(self, *args, **kwargs)
        except REDIS_FAILED as error:
            # The task is handed back already. An error here would end the whole worker.
            log_event("result_unstored", job_id=self.id, error=str(error))
            return None
        finally:
            # Celery sets this last. If the Redis of the results is away, Celery never sets it, and
            # takes the death of the child for a revocation.
            self._already_cancelled = True

    return hook


def mark_ordered(original: Hook) -> Hook:
    """Request.terminate, Request.cancel: this run ends by an order, and Celery announces it afterwards."""

    @wraps(original)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        vars(self)[_ORDERED] = True
        try:
            return original(self, *args, **kwargs)
        except NotImplementedError:  # the threads and solo pools cannot stop a run
            vars(self).pop(_ORDERED)
            raise

    return hook


def cancel(original: Hook) -> Hook:
    """Request.cancel: a cold shutdown stops this run.

    If the pool cannot stop it, Celery raises an error in the main thread: it ends a threads worker, and
    in a solo worker it fails the task that runs there. The fix lets the run end by itself.
    """
    ordered = mark_ordered(original)

    @wraps(original)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return ordered(self, *args, **kwargs)
        except NotImplementedError:
            working = sessions.working_for(self.app)
            if working is None or not working.tracker.mends_library:
                raise
            log_event("run_not_stopped", job_id=self.id)
            return None

    return hook


def is_reported_elsewhere(session: Session, token: UUID, thrown: BaseException) -> bool:
    """Return True if Celery announces this end of a greenlet: an order, or a time limit of gevent."""
    _, request = _run_of(session, token)
    if request is None:
        return False
    if vars(request).get(_ORDERED):
        return True
    limit = request.time_limits[0] or request.task.time_limit
    return bool(limit) and _is_timeout(thrown)


def is_acknowledged_after(thrown: BaseException) -> bool:
    """Return True if a pool of greenlets treats this exception as a return."""
    return any(kind.__name__ == "GreenletExit" for kind in type(thrown).__mro__)


def stop_renewing(session: Session, token: UUID) -> None:
    """Stop renewing a message in ``unacked`` that Celery dropped without acknowledging it."""
    working, request = _run_of(session, token)
    if working is not None and working.unacked is not None:
        working.unacked.drop(request.message.delivery_tag)


def _run_of(session: Session, token: UUID) -> tuple[Working | None, Any]:
    """Return the request of a delivery, and the worker of this process that gave it to its pool."""
    for working in sessions.own(session):
        for request in snapshot(working.handed):
            if token_of_request(request) == token:
                return working, request
    return None, None


def _is_timeout(thrown: BaseException) -> bool:
    return any(kind.__name__ == "Timeout" for kind in type(thrown).__mro__)


def _release(request: Any) -> None:
    working, token = sessions.working_for(request.app), token_of_request(request)
    if working is not None and token is not None:
        working.session.release(Claim(token, 0), interrupted=True)


def _keep_until_leave(request: Any) -> None:
    working, token = sessions.working_for(request.app), token_of_request(request)
    if working is not None and token is not None:
        working.last.add(token)


def _is_decided(request: Any) -> bool:
    """Return True if this end is reported already, or is no end."""
    return _OVER in vars(request) or request._already_revoked or request._already_cancelled


def _is_handled(request: Any, error: BaseException) -> bool:
    """Return True if Celery need not learn that this child did not return: its task has not failed."""
    working = sessions.working_for(request.app)
    if working is None or _is_decided(request):
        return False
    if _is_reported(working, request) or _never_began(working, request, error):
        return True
    return _is_lost(request, error) and _is_left_to_the_leader(working, request)


def _is_lost(request: Any, error: BaseException) -> bool:
    """Return True if this error means a dead child; also a termination that was not ordered."""
    if isinstance(error, Terminated):
        return not vars(request).get(_ORDERED)
    return isinstance(error, WorkerLostError)


def _is_reported(working: Working, request: Any) -> bool:
    """Return True if the child reported an end other than a failure before it was lost: that end stands."""
    token = token_of_request(request)
    if token is None:
        return False
    working.session.flush()  # the child may have reported a moment ago
    outcome = (working.tracker.tombstones([token]) or {}).get(token)
    if outcome in (None, Outcome.FAILED, Outcome.DEAD):
        return False
    log_event("child_lost", job_id=request.id, outcome=outcome.value)
    task_ready(request, successful=outcome is Outcome.COMPLETED)
    request.acknowledge()
    return True


def _never_began(working: Working, request: Any, error: BaseException) -> bool:
    """Return True if Redis failed Celery before the function was called: then the task has not failed."""
    token = token_of_request(request)
    if token is None or not isinstance(error, REDIS_FAILED):
        return False
    if not _recovers(working, token, began=False):
        return False  # the run has begun, and its end is reported
    log_event("run_not_begun", job_id=request.id, error=error)
    task_ready(request)
    request.acknowledge()
    working.session.release(Claim(token, 0))
    return True


def _is_left_to_the_leader(working: Working, request: Any) -> bool:
    """Return True if the leader restores this task; Celery then does nothing more about it."""
    token = token_of_request(request)
    if token is None or not _recovers(working, token):
        return False
    if _stored(request):
        return False  # only the child's report is missing
    log_event("run_killed", job_id=request.id)
    task_ready(request)
    request.acknowledge()
    working.session.abandon(Claim(token, 0))
    return True


def _recovers(working: Working, token: UUID, *, began: bool = True) -> bool:
    found = working.tracker.recovers([token], began=began)
    if found is None:
        raise _UndecidedOutcome
    return token in found


def _stored(request: Any) -> Mapping[str, Any] | None:
    """Return the success that its child stored, if any; an older Celery cannot read it."""
    stored = getattr(request, "_success_was_stored", None)
    meta: Mapping[str, Any] | None = (stored() or None) if stored is not None else None
    ended = meta and meta.get("date_done")
    if ended and done_at(ended) < (request.time_start or 0.0):
        return None  # a result of an earlier life of the id
    return meta


def _decide_again(request: Any, ask: Callable[[], object]) -> None:
    """Decide again in a moment; until then the claim stands for as long as that of a killed child."""
    log_event("outcome_undecided", job_id=request.id)
    working = sessions.working_for(request.app)
    if working is not None:
        working.controller.consumer.timer.call_after(_AGAIN, ask)


def _lost(request: Any, error: str, call: Callable[[], Any]) -> Any:
    """Let Celery decide the end of a task whose child is gone, and report that end."""
    vars(request)[_OVER] = vars(request)[_LOST] = True
    try:
        return call()
    finally:
        with contain_errors("report the end of a task", let_pass=StoreUnavailable):
            if vars(request).pop(_LOST, False):
                _report_end(request, error)


def _report_end(request: Any, error: str) -> None:
    working, token = sessions.working_for(request.app), token_of_request(request)
    if working is None or token is None:
        return
    if request.task.acks_late and not request.acknowledged:
        # Older versions of Celery leave the message in place, and the visibility timeout brings it
        # back.
        working.session.release(Claim(token, 0))
        return
    meta = _stored(request)
    if meta is None:
        report(working, token, Outcome.FAILED, request=request._context, error=error)
        return
    # The child counted it in Redis, or was about to; Redis may lose that before the chord goes on.
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
    queue: str = "",
) -> None:
    """Report an end that the main process knows, without a claim at hand."""
    with contain_errors("report the end of a task"):
        working.session.end(
            Claim(token, 0),
            outcome,
            job_id=job_id or getattr(request, "id", None) or "",
            queue=queue or ("" if request is None else queue_of(request)),
            task=getattr(request, "task", None) or "",
            error=error,
            part=part or (None if request is None else part_of(request)),
        )
