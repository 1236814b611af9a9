"""The fence: no task is run without a claim, and every run tells its end.

``before_start`` is where Celery itself asks a task before it runs, with the request at hand, after
``task_prerun`` and outside of any swallowing of exceptions. The hook stands on Celery's own ``Task``,
which every task has, whenever and however it was registered; a class with a ``before_start`` of its
own is hooked as well when Celery prepares to run its task, and still has its say. Eager runs are
left alone.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import kombu.compression
import kombu.serialization
from celery import states
from celery.app import trace
from celery.app.task import Task
from celery.worker.consumer import consumer

from jobguard import failpoint
from jobguard.adapter import refuse_ended_member
from jobguard.adapters.celery import killed_runs, lookup, message, sessions
from jobguard.adapters.celery.chords import OVER, REDIS_FAILED, part_made_of
from jobguard.adapters.celery.contain_errors import contain_errors
from jobguard.adapters.celery.header import DEAD, PART, TOKEN, WORKER, token_of
from jobguard.adapters.celery.hooks import Hooks
from jobguard.adapters.celery.run import Run
from jobguard.adapters.celery.sessions import CONTENT, QUEUE
from jobguard.adapters.celery.skip import remember, skip
from jobguard.errors import is_host_interrupt
from jobguard.model import Delivery, Outcome, Refused, new_token

if TYPE_CHECKING:
    from uuid import UUID

try:
    from billiard.common import terminate_handler_fired
except ImportError:  # billiard before 4.3

    def terminate_handler_fired() -> bool:
        """Whether this child is being terminated; an older billiard does not say."""
        return False


log = logging.getLogger("jobguard")
Hook = Callable[..., Any]

OURS = (TOKEN, WORKER, CONTENT, QUEUE, PART, DEAD)
"""Headers of ours, as a task's request has them."""
_ASKED = "_jobguard_asked"
_RUN = "_jobguard_run"
_OURS = "_jobguard_fence"
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
    """Stand before every task that is run in this process."""
    hooks.put(Task, "before_start", before_start)
    hooks.put(trace, "build_tracer", lambda original: build_tracer(original, hooks))
    hooks.put(consumer, "build_tracer", lambda original: the_tracer_of_now(original, hooks))


def before_start(original: Hook) -> Hook:
    """Task.before_start: no start without a claim."""

    @wraps(original)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        _ask(self)
        return original(self, *args, **kwargs)

    # Celery passes by a Task.before_start that is its own; and this tells ours from a user's.
    hook.__module__ = __name__
    vars(hook)[_OURS] = True
    return hook


def build_tracer(original: Hook, hooks: Hooks) -> Hook:
    """trace.build_tracer: a class with a before_start of its own may not call Celery's."""

    @wraps(original)
    def hook(name: str, task: Any, *args: Any, **kwargs: Any) -> Any:
        with contain_errors("stand before a task of its own class"):
            kinds: list[Any] = [k for k in type(task).__mro__ if "before_start" in vars(k)]
            if kinds and not getattr(kinds[0].before_start, _OURS, False):
                hooks.put(kinds[0], "before_start", before_start)
        return original(name, task, *args, **kwargs)

    return hook


def the_tracer_of_now(original: Hook, hooks: Hooks) -> Hook:
    """consumer.build_tracer: look ``trace.build_tracer`` up at each call.

    Our import binds the name in this module early. What another library (Sentry, celery-aio-pool)
    puts into ``trace`` after that must still be called. A function that somebody has put into this
    module itself stays.
    """
    of_celery = original.__module__ == trace.__name__ and not hasattr(original, "__wrapped__")
    if not of_celery and original is not getattr(trace.build_tracer, "__wrapped__", None):
        return build_tracer(original, hooks)

    @wraps(original)
    def hook(*args: Any, **kwargs: Any) -> Any:
        return trace.build_tracer(*args, **kwargs)

    return hook


def _ask(task: Any) -> None:
    """Ask for the claim of the run that is about to begin; raises Ignore if it is refused."""
    request = task.request
    if request.is_eager or request.called_directly:
        return
    asked = (request.id, request.retries, vars(request).get(TOKEN))
    if vars(request).get(_ASKED) == asked:
        return
    vars(request)[_ASKED] = asked
    try:
        refused = _begin(task, request)
    except Exception as error:
        if is_host_interrupt(error):
            raise
        log.exception("jobguard could not claim task %s; it runs unclaimed", request.id)
        return
    if refused is not None:
        raise skip(task, refused)


def _begin(task: Any, request: Any) -> Refused | None:
    tracker = lookup.tracker_for(task.app)
    session = None if tracker is None else sessions.session_for(tracker, request)
    if tracker is None or session is None:
        return None
    token = token_of(vars(request)) or new_token()
    # It is to be counted or told as failed, not run, also where the fence is off.
    if request.get(PART) is not None or request.get(DEAD) is not None:
        ended = refuse_ended_member(tracker, token)
        if ended is not None:
            return ended
    answer = session.start(token, lambda: _describe(task, request, token))
    if isinstance(answer, Refused):
        return answer
    for name in OURS:  # else whatever inherits this task's headers takes them along
        (request.headers or {}).pop(name, None)
    working = sessions.own(session)
    if working is not None:
        sessions.count(working, 1)
    run = Run(
        tracker,
        session,
        answer,
        job_id=request.id,
        queue=queue_of(request),
        task=task.name,
        attempt=(request.retries or 0) + 1,
        left=None if working is None else lambda: sessions.count(working, -1),
    )
    vars(request)[_RUN] = _runs[token] = run
    run.enter()
    failpoint.hit("after_claim")
    return None


def queue_of(request: Any) -> str:
    """Return the queue that a task came from, as its worker was told, or else as its message says."""
    return request.get(QUEUE) or (request.delivery_info or {}).get("routing_key") or ""


def _describe(task: Any, request: Any, token: UUID) -> Delivery:
    """Return the record of a delivery that nobody recorded, encoded anew as it was."""
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


def before_celery_says_started(sender: Any = None, **_: Any) -> None:
    """task_prerun: Celery may be about to overwrite how the task ended before."""
    request = sender.request
    if request.is_eager or lookup.tracker_for(sender.app) is None:
        return
    with contain_errors("read how a task had ended"):
        remember(sender)


def why_it_failed(sender: Any = None, einfo: Any = None, **_: Any) -> None:
    """task_failure, in the process that ran the task: keep the error for the report."""
    run = _run_of(sender.request)
    if run is not None and einfo is not None:
        run.error = str(einfo.traceback or einfo.exception)


def _run_of(request: Any) -> Run | None:
    """Return the run of a request.

    A pool that calls ``before_start`` in another thread than the tracer (celery-aio-pool) shows it
    another request than the tracer has: then the message's token tells.
    """
    if _ASKED in vars(request):
        run: Run | None = vars(request).get(_RUN)
        return run
    token = token_of(vars(request))
    return _runs.get(token) if token is not None else None


def after_the_run(
    sender: Any = None, retval: Any = None, state: str | None = None, **_: Any
) -> None:
    """task_postrun: the run is over, whatever came of it."""
    request = sender.request
    run = _run_of(request)
    if run is None:
        return
    vars(request).pop(_RUN, None)
    _runs.pop(run.claim.token, None)
    vars(request)[OVER] = run
    run.leave()
    if state == states.SUCCESS:
        failpoint.hit("after_return")
    thrown = sys.exc_info()[1]
    try:
        if (
            run.part is None and request.chord
        ):  # Redis may have failed before Celery came to count it
            _note(sender, request, retval, state, thrown, run)
        _tell(run, state, retval, thrown, acks_late=sender.acks_late)
    except Exception as error:
        if is_host_interrupt(error):
            raise
        log.exception("jobguard could not report the end of task %s", run.job_id)
    finally:
        run.finish()


def _note(task: Any, request: Any, retval: Any, state: str | None, thrown: Any, run: Run) -> None:
    if state == states.SUCCESS and _returned(run, thrown):
        run.part = part_made_of(task.backend, request, states.SUCCESS, retval)
    elif state in (states.SUCCESS, states.FAILURE, None) and isinstance(
        thrown or retval, Exception
    ):
        run.part = part_made_of(task.backend, request, states.FAILURE, thrown or retval)


def _tell(
    run: Run, state: str | None, retval: Any, thrown: BaseException | None, *, acks_late: bool
) -> None:
    """Report how a run ended, by the state that Celery gives it; by none where its own word failed it.

    What was acknowledged before it began cannot go back into its queue: that Reject is its end.
    """
    if state == states.SUCCESS:
        # What is thrown now, after the function returned, is Redis that failed Celery's own word of
        # it; or what comes after the function could not be sent, and then the task has failed.
        returned = _returned(run, thrown)
        run.end(*((Outcome.COMPLETED,) if returned else (Outcome.FAILED, repr(thrown))))
    elif state == states.IGNORED:
        run.end(Outcome.COMPLETED)
    elif state == states.FAILURE:
        run.end(Outcome.FAILED, run.error or repr(retval))
    elif state == states.REJECTED:
        if getattr(retval, "requeue", False) and acks_late:
            run.hand_back()
        else:
            run.end(Outcome.FAILED, f"rejected: {getattr(retval, 'reason', retval)!r}")
    elif state == states.RETRY:
        run.end(Outcome.FAILED, "Retry was raised, but nothing was sent again")
    elif isinstance(thrown, Exception):
        run.end(Outcome.FAILED, run.error or repr(thrown.__context__ or thrown))
    elif thrown is not None:
        _broken_off(run, thrown, acks_late=acks_late)


def _broken_off(run: Run, thrown: BaseException, *, acks_late: bool) -> None:
    """Report a run that ended by what is no Exception.

    In a child, an exit and all that follows a signal are for the main process to report. A pool
    without children drops such a run: a message that is acknowledged late stays unacknowledged, and
    Redis delivers it again.
    """
    if not run.in_worker:
        if not isinstance(thrown, SystemExit | KeyboardInterrupt) and not terminate_handler_fired():
            run.end(Outcome.FAILED, repr(thrown))
    elif not killed_runs.is_reported_elsewhere(run.session, run.claim.token, thrown):
        if acks_late and not killed_runs.is_acknowledged_after(thrown):
            run.hand_back()
            killed_runs.let_go(run.session, run.claim.token)
        else:
            run.end(Outcome.FAILED, repr(thrown))


def _returned(run: Run, thrown: BaseException | None) -> bool:
    return thrown is None or (run.storing and isinstance(thrown, REDIS_FAILED))
