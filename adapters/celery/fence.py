"""The fence: no task runs without a claim, and every run reports its end.

Celery calls ``before_start`` on a task before it runs: the request is at hand, ``task_prerun`` has
been sent, and no exception is swallowed. The hook replaces this method on Celery's own ``Task``,
which every task inherits, at any time and in any way that it was registered. A class with a
``before_start`` of its own is hooked as well, when Celery prepares to run its task, and its own
method still runs. Eager runs are not touched.

A task that may not run is skipped: it is ignored, and its message acknowledged, as Celery does with
every ``Ignore``. If the task has ended before, the result that our start has overwritten is put back:
with ``task_track_started`` Celery writes STARTED before it asks the fence. A result that Redis has lost
is not invented, because it is unknown. If another worker runs the task, its run is not touched.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import kombu.compression
import kombu.serialization
from celery import states
from celery.app import trace
from celery.app.task import Task
from celery.backends.base import BaseKeyValueStoreBackend
from celery.exceptions import Ignore, WorkerLostError
from celery.worker.consumer import consumer

from jobguard import failpoint
from jobguard.adapter import refuse_ended_member, report_dead
from jobguard.adapters.celery import chords, killed_runs, lookup, message, sessions
from jobguard.adapters.celery.chords import OVER, REDIS_FAILED, part_made_of
from jobguard.adapters.celery.envelope import DEAD, PART, TOKEN, WORKER, token_of
from jobguard.adapters.celery.run import Run
from jobguard.adapters.celery.sessions import CONTENT, FANOUT, QUEUE, queue_of
from jobguard.host_safety import contain_errors
from jobguard.log import log_event
from jobguard.model import Delivery, Outcome, Refusal, Refused, new_token
from jobguard.patching import Hooks

if TYPE_CHECKING:
    from uuid import UUID

try:
    from billiard.common import terminate_handler_fired
except ImportError:  # billiard before 4.3

    def terminate_handler_fired() -> bool:
        """Return False: an older billiard does not show that this child is being terminated."""
        return False


Hook = Callable[..., Any]

OURS = (TOKEN, WORKER, CONTENT, QUEUE, FANOUT, PART, DEAD)
"""Our headers, as the request of a task has them."""
_WAITS = 8
"""A start waits for this part of its time limit at most, up to three times."""
_CLAIMED = "_jobguard_asked"
_RUN = "_jobguard_run"
_OURS = "_jobguard_fence"
_BEFORE = "_jobguard_before"
_runs: dict[UUID, Run] = {}
"""The runs of this process, by token."""
_NOT_OF_THE_MESSAGE = frozenset(
    {
        *("args", "kwargs", "callbacks", "errbacks", "chain", "chord", "headers"),
        *("properties", "reply_to", "correlation_id", "hostname", "delivery_info"),
        *("is_eager", "called_directly", "loglevel", "logfile", "time_limit", "soft_time_limit"),
        *OURS,
    }
)


def put_on(hooks: Hooks) -> None:
    """Put the fence before every task that runs in this process."""
    hooks.put(Task, "before_start", before_start)
    hooks.put(trace, "build_tracer", lambda original: build_tracer(original, hooks))
    hooks.put(consumer, "build_tracer", lambda original: current_tracer(original, hooks))


def before_start(original: Hook) -> Hook:
    """Task.before_start: no start without a claim."""

    @wraps(original)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        _claim(self)
        return original(self, *args, **kwargs)

    # Celery skips a before_start of its own module, so the hook gets the name of this module. The
    # flag marks our hook, which a user's own method does not have.
    hook.__module__ = __name__
    vars(hook)[_OURS] = True
    return hook


def build_tracer(original: Hook, hooks: Hooks) -> Hook:
    """trace.build_tracer: hook a class that has a before_start of its own, which may not call Celery's."""

    @wraps(original)
    def hook(name: str, task: Any, *args: Any, **kwargs: Any) -> Any:
        with contain_errors("hook a before_start of its own class"):
            kinds: list[Any] = [k for k in type(task).__mro__ if "before_start" in vars(k)]
            if kinds and not getattr(kinds[0].before_start, _OURS, False):
                hooks.put(kinds[0], "before_start", before_start)
        return original(name, task, *args, **kwargs)

    return hook


def current_tracer(original: Hook, hooks: Hooks) -> Hook:
    """consumer.build_tracer: look ``trace.build_tracer`` up at each call.

    Our import binds the name in this module early. A tracer that another library (Sentry,
    celery-aio-pool) puts into ``trace`` after that must still be called. A function that somebody
    has put into this module itself stays.
    """
    of_celery = original.__module__ == trace.__name__ and not hasattr(original, "__wrapped__")
    if not of_celery and original is not getattr(trace.build_tracer, "__wrapped__", None):
        return build_tracer(original, hooks)

    @wraps(original)
    def hook(*args: Any, **kwargs: Any) -> Any:
        return trace.build_tracer(*args, **kwargs)

    return hook


def _claim(task: Any) -> None:
    """Ask for the claim of the run that is about to begin. Raise Ignore if it is refused."""
    request = task.request
    if request.is_eager or request.called_directly:
        return
    claimed = (request.id, request.retries, vars(request).get(TOKEN))
    if vars(request).get(_CLAIMED) == claimed:
        return
    vars(request)[_CLAIMED] = claimed
    refused = None
    with contain_errors("claim a task, which runs unclaimed", job_id=request.id):
        refused = _begin(task, request)
    if refused is not None:
        raise skip(task, refused)


def _begin(task: Any, request: Any) -> Refused | None:
    lookup.resolve_config(task.app, acts=True)
    tracker = lookup.tracker_for(task.app)
    session = None if tracker is None else sessions.session_for(tracker, request)
    if tracker is None or session is None or request.get(FANOUT):
        return None
    token = token_of(vars(request)) or new_token()
    # The message is to be counted or reported as failed, not run, also where the fence is off.
    if request.get(PART) is not None or request.get(DEAD) is not None:
        ended = refuse_ended_member(tracker, token)
        if ended is not None:
            return ended
    answer = session.start(
        token, lambda: _describe(task, request, token), patience=_patience(task, request)
    )
    if isinstance(answer, Refused):
        return answer
    for name in OURS:  # otherwise a message that inherits this task's headers takes them along
        (request.headers or {}).pop(name, None)
    here = bool(sessions.own(session))
    if here:
        sessions.count(tracker, 1)
    run = Run(
        tracker,
        session,
        answer,
        job_id=request.id,
        queue=queue_of(request),
        task=task.name,
        attempt=(request.retries or 0) + 1,
        left=(lambda: sessions.count(tracker, -1)) if here else None,
    )
    vars(request)[_RUN] = _runs[token] = run
    run.enter()
    failpoint.hit("after_claim")
    return None


def _patience(task: Any, request: Any) -> float | None:
    """Return how long one wait of a start may be: the time limits of the task run already."""
    hard, soft = (request.timelimit or (None, None))[:2]
    limits = [limit for limit in (hard or task.time_limit, soft or task.soft_time_limit) if limit]
    return min(limits) / _WAITS if limits else None


def _describe(task: Any, request: Any, token: UUID) -> Delivery:
    """Return the record of a delivery that was not recorded, encoded again as it was."""
    given = vars(request)
    headers = {
        key: value
        for key, value in given.items()
        if key not in _NOT_OF_THE_MESSAGE and key[0] != "_"
    }
    embed = {key: given.get(key) for key in ("callbacks", "errbacks", "chain", "chord")}
    kind = given.get(CONTENT) or "application/json"
    content_type, content_encoding, body = kombu.serialization.dumps(
        [list(request.args), request.kwargs, embed],
        serializer=kombu.serialization.registry.type_to_name.get(kind, kind),
    )
    if headers.get("compression"):
        body, _ = kombu.compression.compress(body, headers["compression"])
    properties = dict(request.properties or {})
    return message.describe(
        task.app,
        headers,
        body,
        content_type,
        content_encoding,
        properties,
        queue=queue_of(request),
        priority=properties.get("priority") or 0,
        token=token,
    )


def keep_stored_result(sender: Any = None, **_: Any) -> None:
    """task_prerun: keep the stored result, because Celery may be about to overwrite it with STARTED."""
    request = sender.request
    if request.is_eager or lookup.tracker_for(sender.app) is None:
        return
    with contain_errors("read the stored result of a task"):
        remember(sender)


def keep_error(sender: Any = None, einfo: Any = None, **_: Any) -> None:
    """task_failure, in the process that ran the task: keep the error for the report."""
    run = _run_of(sender.request)
    if run is not None and einfo is not None:
        run.error = str(einfo.traceback or einfo.exception)


def _run_of(request: Any) -> Run | None:
    """Return the run of a request.

    A pool that calls ``before_start`` in another thread than the tracer (celery-aio-pool) shows it
    another request than the tracer has. In that case the token of the message identifies the run.
    """
    if _CLAIMED in vars(request):
        run: Run | None = vars(request).get(_RUN)
        return run
    token = token_of(vars(request))
    return _runs.get(token) if token is not None else None


def run_ended(sender: Any = None, retval: Any = None, state: str | None = None, **_: Any) -> None:
    """task_postrun: the run is over, in any way; report its end."""
    request = sender.request
    run = _run_of(request)
    if run is None:
        return
    vars(request).pop(_RUN, None)
    _runs.pop(run.claim.token, None)
    vars(request)[OVER] = run
    failed = state not in (states.SUCCESS, states.IGNORED) and isinstance(retval, BaseException)
    run.leave(retval if failed else None)
    if state == states.SUCCESS:
        failpoint.hit("after_return")
    thrown = sys.exc_info()[1]
    try:
        with contain_errors("report the end of a task", job_id=run.job_id):
            # Redis may have failed before Celery could count it.
            if run.part is None and request.chord:
                _keep_part(sender, request, retval, state, thrown, run)
            _report_end(run, state, retval, thrown, acks_late=sender.acks_late)
    finally:
        run.finish()


def _keep_part(
    task: Any, request: Any, retval: Any, state: str | None, thrown: Any, run: Run
) -> None:
    if state == states.SUCCESS and _returned(run, thrown):
        run.part = part_made_of(task.backend, request, states.SUCCESS, retval)
    elif state in (states.SUCCESS, states.FAILURE, None) and isinstance(
        thrown or retval, Exception
    ):
        run.part = part_made_of(task.backend, request, states.FAILURE, thrown or retval)


def _report_end(
    run: Run, state: str | None, retval: Any, thrown: BaseException | None, *, acks_late: bool
) -> None:
    """Report how a run ended, by the state that Celery gives it; the state is empty if storing it failed.

    A message that was acknowledged before its run cannot go back into its queue, so its Reject is
    its end.
    """
    if state == states.SUCCESS:
        # An exception at this point comes after the function returned. Either Redis failed while
        # Celery stored the result, or the tasks that follow could not be sent; in the second case
        # the task has failed.
        returned = _returned(run, thrown)
        run.end(*((Outcome.COMPLETED,) if returned else (Outcome.FAILED, repr(thrown))))
    elif state == states.IGNORED:
        run.end(Outcome.COMPLETED)
    elif state == states.FAILURE:
        run.end(Outcome.FAILED, run.error or repr(retval))
    elif state == states.REJECTED:
        if getattr(retval, "requeue", False) and acks_late:
            run.release()
        else:
            run.end(Outcome.FAILED, f"rejected: {getattr(retval, 'reason', retval)!r}")
    elif state == states.RETRY:
        run.end(Outcome.FAILED, "Retry was raised, but nothing was sent again")
    elif isinstance(thrown, Exception):
        run.end(Outcome.FAILED, run.error or repr(thrown.__context__ or thrown))
    elif thrown is not None:
        _report_interrupted(run, thrown, acks_late=acks_late)


def _report_interrupted(run: Run, thrown: BaseException, *, acks_late: bool) -> None:
    """Report a run that ended with a BaseException that is no Exception.

    In a child, the main process reports an exit and all that follows a signal. A pool without
    children drops such a run: a message that is acknowledged late stays unacknowledged, and Redis
    delivers it again.
    """
    if not run.in_worker:
        if not isinstance(thrown, SystemExit | KeyboardInterrupt) and not terminate_handler_fired():
            run.end(Outcome.FAILED, repr(thrown))
    elif not killed_runs.is_reported_elsewhere(run.session, run.claim.token, thrown):
        if acks_late and not killed_runs.is_acknowledged_after(thrown):
            run.release(interrupted=True)
            killed_runs.stop_renewing(run.session, run.claim.token)
        else:
            run.end(Outcome.FAILED, repr(thrown))


def _returned(run: Run, thrown: BaseException | None) -> bool:
    return thrown is None or (run.storing and isinstance(thrown, REDIS_FAILED))


def remember(task: Any) -> None:
    """Keep the stored result of a task before Celery writes STARTED."""
    request, backend = task.request, task.backend
    # A batch of celery-batches has no id of its own.
    if request.id and task.track_started and not request.ignore_result and _keeps(backend):
        vars(request)[_BEFORE] = backend.get(backend.get_key_for_task(request.id))


def skip(task: Any, refused: Refused) -> Ignore:
    """Return the exception to raise, after everything is put right; errors are logged."""
    request = task.request
    why = refused.outcome or refused.reason
    log_event("task_skipped", job_id=request.id, task=task.name, reason=why.value)
    with contain_errors("restore the result of a skipped task", job_id=request.id):
        reported = refused.outcome is Outcome.DEAD and request.get(DEAD) is not None
        if reported or refused.reason is Refusal.SPENT:
            _fail(task)
        elif refused.reason is Refusal.ENDED:
            _put_back(task)
            chords.finish(task, request)
    return Ignore(f"jobguard: {why}")


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
    """Fail a task whose crash budget is spent, and so inform its callers, error callbacks and chord."""
    request = task.request
    tracker = lookup.tracker_for(task.app)
    if tracker is not None:
        report_dead(tracker, request.id, attempt=(request.retries or 0) + 1)
    task.backend.mark_as_failure(
        request.id,
        WorkerLostError("jobguard: too many workers died while they ran this task"),
        request=request,
        store_result=not request.ignore_result,
    )
