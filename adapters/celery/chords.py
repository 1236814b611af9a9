"""Chords, as their header tasks see them: what each adds to the join, and who goes on from there.

Celery's Redis backend counts the parts of a chord in the result Redis. What a part adds is kept with
the report of its end, so that a join can be put back that was lost half counted. ``Part.state`` is
one line of JSON, the group, the task and its index, and after that the very bytes that Celery keeps.
"""

from __future__ import annotations

import base64
import json
import logging
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
from jobguard.adapters.celery.contain_errors import contain_errors
from jobguard.adapters.celery.header import PART
from jobguard.adapters.celery.hooks import Hooks
from jobguard.adapters.celery.run import current_run, joining, no_longer_joining
from jobguard.errors import is_host_interrupt
from jobguard.model import Outcome, Part

if TYPE_CHECKING:
    from jobguard.adapter import Tracker

log = logging.getLogger("jobguard")
Hook = Callable[..., Any]

REDIS_FAILED = (RedisError, OperationalError, BackendError, OSError)
"""What says that it was not the task, but the Redis that should hear of it."""
OVER = "_jobguard_over"
"""On a request: its run, after its end."""
_NOTED = "_jobguard_part"
_SEVERAL = frozenset(("celery.chain", "celery.group", "celery.chord"))


def put_on(hooks: Hooks) -> None:
    """Hear of every part, and of a chord that is given up."""
    hooks.put(RedisBackend, "on_chord_part_return", on_chord_part_return)
    hooks.put(Backend, "chord_error_from_stack", chord_error_from_stack)
    hooks.put(RedisBackend, "mark_as_failure", mark_as_failure)
    hooks.put(RedisBackend, "mark_as_done", mark)
    hooks.put(RedisBackend, "mark_as_retry", mark)


def on_chord_part_return(original: Hook) -> Hook:
    """RedisBackend.on_chord_part_return: a header task is counted, and if it is the last, the body sent."""

    @wraps(original)
    def hook(self: Any, request: Any, state: str, result: Any, *args: Any, **kwargs: Any) -> Any:
        group, body = None, None
        with contain_errors("note a part of a chord"):
            if request.id and request.group and lookup.tracker_for(self.app) is not None:
                _note(part_made_of(self, request, state, result), request)
                group, body = request.group, _body_of(request)
        with joining(group, body) if group else nullcontext():
            return original(self, request, state, result, *args, **kwargs)

    return hook


def chord_error_from_stack(original: Hook) -> Hook:
    """Backend.chord_error_from_stack: the body will never be sent.

    But if it was Redis that failed, while the parts were read, the leader has them counted again.
    """

    @wraps(original)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        broken = isinstance(sys.exc_info()[1], REDIS_FAILED)
        with contain_errors("see whether a chord is given up"):
            if _goes_on(lookup.tracker_for(self.app), broken=broken):
                return None
        return original(self, *args, **kwargs)

    return hook


def _goes_on(tracker: Tracker | None, *, broken: bool) -> bool:
    """Whether a chord that Celery gives up goes on all the same; if not, it is closed."""
    group = no_longer_joining()  # what is sent from here on are error callbacks
    if group is None or tracker is None:
        return False
    run = current_run()
    owed = tracker.recovers([run.claim.token], began=False) if broken and run is not None else ()
    if owed is None or owed:
        log.warning("Redis failed as chord %s was to go on: it goes on when Redis is back", group)
        return True
    tracker.close_join(group)
    return False


def mark(original: Hook) -> Hook:
    """RedisBackend.mark_as_done, mark_as_retry: should Redis fail now, that is no failure of the task.

    Its function has returned, or its retry is recorded. Celery would say that it failed, and give up
    its chord.
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
            log.warning("what became of task %s could not be stored: %r", task_id, error)
            return None

    return hook


def mark_as_failure(original: Hook) -> Hook:
    """RedisBackend.mark_as_failure: what failed after the end was told is Celery's own word of it."""

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
        log.warning("task %s has not failed, but Celery's word of it: %r", task_id, exc)
        return None

    return hook


def part_of(request: Any) -> Part | None:
    """Return what a request has added to a chord outside of any run, if anything."""
    part = vars(request).get(_NOTED)
    return part if isinstance(part, Part) else None


def finish(task: Any, request: Any) -> None:
    """Have the library count a part again whose end is known, as the message asks."""
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
    """Return what a task adds to its chord, as Celery will keep it; None: nothing that can be kept."""
    if not request.group or not isinstance(backend, RedisBackend):
        return None
    try:
        member = backend.encode([1, request.id, state, backend.encode_result(result, state)])
        line = json.dumps([request.group, request.id, request.group_index])
        return Part(request.group, line.encode() + b"\n" + str_to_bytes(member))
    except Exception as error:
        if is_host_interrupt(error):
            raise
        log.debug("the result of a chord's part cannot be kept: %s", error)
        return None


def _body_of(request: Any) -> str | None:
    """Return the id of a chord's body; None: whatever is sent first."""
    chord = getattr(request, "chord", None)
    if not isinstance(chord, Mapping) or chord.get("task") in _SEVERAL:
        return None
    body: str | None = (chord.get("options") or {}).get("task_id")
    return body


def _chord_in(request: Any) -> Any:
    """Return the chord that a task counts for, or the chain that it begins."""
    if request.chord:
        return request.chord
    options = ((link.get("options") or {}) for link in request.chain or ())
    return next((option["chord"] for option in options if option.get("chord")), None)
