"""Hooks on chords, on the side of the header tasks: the part that each adds, and the body's push.

Celery's Redis backend counts the parts of a chord in the Redis of the results. The ledger keeps
each part with the report of its end, so that a join whose counters were lost can be put back.
``Part.state`` is one line of JSON, with the group, the task and its index, and after that the exact
bytes that Celery keeps.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import wraps
from typing import TYPE_CHECKING, Any

from celery.app.task import Context
from celery.backends.base import Backend
from celery.backends.redis import RedisBackend
from celery.exceptions import BackendError
from kombu.exceptions import OperationalError
from kombu.utils.encoding import str_to_bytes
from redis.exceptions import RedisError

from jobguard.adapters.celery import lookup
from jobguard.adapters.celery.envelope import PART
from jobguard.adapters.celery.run import current_run, joining, stop_joining
from jobguard.errors import StoreUnavailable
from jobguard.host_safety import contain_errors
from jobguard.log import log_event
from jobguard.model import Outcome, Part
from jobguard.patching import Hooks

if TYPE_CHECKING:
    from jobguard.adapter import Tracker

Hook = Callable[..., Any]

REDIS_FAILED = (RedisError, OperationalError, BackendError, OSError)
"""Errors of the Redis or the backend that takes the result, and not of the task."""
OVER = "_jobguard_over"
"""On a request: its run, after the run's end."""
_NOTED = "_jobguard_part"
_SEVERAL = frozenset(("celery.chain", "celery.group", "celery.chord"))


def put_on(hooks: Hooks) -> None:
    """Record every part, and every chord that Celery gives up."""
    hooks.put(RedisBackend, "on_chord_part_return", on_chord_part_return)
    hooks.put(Backend, "chord_error_from_stack", chord_error_from_stack)
    hooks.put(RedisBackend, "mark_as_failure", mark_as_failure)
    hooks.put(RedisBackend, "mark_as_done", mark)
    hooks.put(RedisBackend, "mark_as_retry", mark)


def on_chord_part_return(original: Hook) -> Hook:
    """RedisBackend.on_chord_part_return: count a header task; the last one sends the body."""

    @wraps(original)
    def hook(self: Any, request: Any, state: str, result: Any, *args: Any, **kwargs: Any) -> Any:
        group, body = None, None
        with contain_errors("keep the part of a chord", let_pass=StoreUnavailable):
            if request.id and request.group and lookup.tracker_for(self.app) is not None:
                _note(part_made_of(self, request, state, result), request)
                group, body = request.group, _body_of(request)
        with joining(group, body) if group else nullcontext():
            return original(self, request, state, result, *args, **kwargs)

    return hook


def chord_error_from_stack(original: Hook) -> Hook:
    """Backend.chord_error_from_stack: the body will never be sent.

    The exception is a failure of Redis while the parts were read: then the leader has them counted
    again.
    """

    @wraps(original)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        broken = isinstance(sys.exc_info()[1], REDIS_FAILED)
        with contain_errors("check a chord that Celery gives up", let_pass=StoreUnavailable):
            if _continues(lookup.tracker_for(self.app), broken=broken):
                return None
        return original(self, *args, **kwargs)

    return hook


def _continues(tracker: Tracker | None, *, broken: bool) -> bool:
    """Return True if a chord that Celery gives up goes on nevertheless; otherwise close its join."""
    group = stop_joining()  # tasks that are sent from here on are error callbacks
    if group is None or tracker is None:
        return False
    run = current_run()
    owed = tracker.recovers([run.claim.token], began=False) if broken and run is not None else ()
    if owed is None or owed:
        log_event("chord_waits", chord=group)
        return True
    tracker.close_join(group)
    return False


def mark(original: Hook) -> Hook:
    """RedisBackend.mark_as_done, mark_as_retry: a failure of Redis here is no failure of the task.

    The function has returned, or the retry is recorded. Celery would report a failure of the task,
    and give up its chord.
    """

    @wraps(original)
    def hook(self: Any, task_id: str, *args: Any, **kwargs: Any) -> Any:
        run = current_run()
        if run is None or run.job_id != task_id:
            return original(self, task_id, *args, **kwargs)
        run.storing = True
        try:
            return original(self, task_id, *args, **kwargs)
        except REDIS_FAILED as error:
            log_event("result_unstored", job_id=task_id, error=error)
            return None

    return hook


def mark_as_failure(original: Hook) -> Hook:
    """RedisBackend.mark_as_failure: ignore a failure that comes after the reported end of the task."""

    @wraps(original)
    def hook(
        self: Any,
        task_id: str,
        exc: Any,
        traceback: Any = None,
        request: Any = None,
        *args: Any,
        **options: Any,
    ) -> Any:
        run = getattr(request, "__dict__", {}).get(OVER)
        if run is None or not run.reported or run.outcome is Outcome.FAILED:
            return original(self, task_id, exc, traceback, request, *args, **options)
        log_event("failure_ignored", job_id=task_id, error=exc)
        return None

    return hook


def part_of(request: Any) -> Part | None:
    """Return the part that a request added to a chord outside of any run; None if there is none."""
    part = vars(request).get(_NOTED)
    return part if isinstance(part, Part) else None


def finish(task: Any, request: Any) -> None:
    """Count a part again whose end is known, as its message asks."""
    text = request.get(PART)
    if not isinstance(text, str):
        return
    line, member = base64.b64decode(text).split(b"\n", 1)
    group, task_id, index = json.loads(line)
    backend = task.backend
    _, _, state, result = backend.decode(member)
    fields = Context(
        vars(request), id=task_id, group=group, group_index=index, chord=_chord_in(request)
    )
    backend.on_chord_part_return(fields, state, result)


def _note(part: Part | None, request: Any) -> None:
    run = current_run()
    if run is not None:
        run.part = part
    else:
        vars(request)[_NOTED] = part


def part_made_of(backend: Any, request: Any, state: str, result: Any) -> Part | None:
    """Return the part that a task adds to its chord, as Celery keeps it; None if it cannot be kept."""
    if not request.group or not isinstance(backend, RedisBackend):
        return None
    with contain_errors("keep the result of a chord's part", event="part_unkept"):
        member = backend.encode([1, request.id, state, backend.encode_result(result, state)])
        line = json.dumps([request.group, request.id, request.group_index])
        return Part(request.group, line.encode() + b"\n" + str_to_bytes(member))
    return None


def _body_of(request: Any) -> str | None:
    """Return the id of a chord's body; None stands for the first task that is sent."""
    chord = getattr(request, "chord", None)
    if not isinstance(chord, Mapping) or chord.get("task") in _SEVERAL:
        return None
    body: str | None = (chord.get("options") or {}).get("task_id")
    return body


def _chord_in(request: Any) -> Any:
    """Return the chord that a task counts for, or the chain that the chord begins."""
    if request.chord:
        return request.chord
    options = ((link.get("options") or {}) for link in request.chain or ())
    return next((option["chord"] for option in options if option.get("chord")), None)
