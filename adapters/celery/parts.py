"""Chords, as their header tasks see them: what each adds to the join, and who goes on from there.

Celery's Redis backend counts the parts of a chord in the result Redis. What a part adds is kept with
the report of its end, so that a join can be put back that was lost half counted. ``Part.state`` is
one line of JSON, the group, the task and its index, and after that the very bytes that Celery keeps.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from celery.app.task import Context
from celery.backends.base import Backend
from celery.backends.redis import RedisBackend
from kombu.utils.encoding import str_to_bytes

from jobguard.adapters.celery import lookup
from jobguard.adapters.celery.hooks import Hooks
from jobguard.adapters.celery.run import current_run, joining, no_longer_joining
from jobguard.errors import is_host_interrupt
from jobguard.job import Part

log = logging.getLogger("jobguard")
Hook = Callable[..., Any]

PART = "jobguard-part"
"""The header of a message that is only to be counted: the state of its part, in base64."""
_NOTED = "_jobguard_part"
_SEVERAL = frozenset(("celery.chain", "celery.group", "celery.chord"))


def put_on(hooks: Hooks) -> None:
    """Hear of every part, and of a chord that is given up."""
    hooks.put(RedisBackend, "on_chord_part_return", on_chord_part_return)
    hooks.put(Backend, "chord_error_from_stack", chord_error_from_stack)


def on_chord_part_return(original: Hook) -> Hook:
    """RedisBackend.on_chord_part_return: a header task is counted, and if it is the last, the body sent."""

    @wraps(original)
    def hook(self: Any, request: Any, state: str, result: Any, *args: Any, **kwargs: Any) -> Any:
        group = getattr(request, "group", None)
        if not group or not request.id or lookup.tracker_for(self.app) is None:
            return original(self, request, state, result, *args, **kwargs)
        _note(self, request, state, result)
        with joining(group, _body_of(request)):
            return original(self, request, state, result, *args, **kwargs)

    return hook


def chord_error_from_stack(original: Hook) -> Hook:
    """Backend.chord_error_from_stack: the body will never be sent."""

    @wraps(original)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        group = no_longer_joining()  # what is sent from here on are error callbacks
        tracker = lookup.tracker_for(self.app)
        if group is not None and tracker is not None:
            tracker.close_join(group)
        return original(self, *args, **kwargs)

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
    told = Context(
        vars(request), id=task_id, group=group, group_index=index, chord=_chord_in(request)
    )
    backend.on_chord_part_return(told, state, result)


def _note(backend: Any, request: Any, state: str, result: Any) -> None:
    try:
        member = backend.encode([1, request.id, state, backend.encode_result(result, state)])
        line = json.dumps([request.group, request.id, request.group_index])
        part = Part(request.group, line.encode() + b"\n" + str_to_bytes(member))
    except Exception as error:
        if is_host_interrupt(error):
            raise
        log.debug("the result of a chord's part cannot be kept: %s", error)
        return
    run = current_run()
    if run is not None:
        run.part = part
    else:
        vars(request)[_NOTED] = part


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
