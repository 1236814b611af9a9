"""Functions of the application that are called at the events of guarded jobs: ``@guard.on("error")``.

They are called in the process and the thread where the event happens, one after the other. Their errors are
logged and contained. They run inside the job, so that a slow function makes the job slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import iscoroutinefunction
from typing import Any

from jobguard.current import CurrentJob
from jobguard.errors import ConfigurationError
from jobguard.host_safety import contain_errors
from jobguard.log import log_event

EVENTS = ("start", "finish", "error", "recovered", "heartbeat", "update", "dead")
_HELD = (
    "a hold is no event of a process of the application: the leader holds a queue, and the leader runs no "
    "code of the application. Set JOBGUARD_NOTIFY_URL or --notify-command of `jobguard reconcile` to learn "
    "of holds"
)
_SLOW = 1.0
"""Seconds after which a function is reported as slow."""


@dataclass(frozen=True, slots=True)
class JobEvent:
    """One event of a guarded job."""

    name: str
    job: CurrentJob
    """The running job. For a heartbeat by ``guard.heartbeat`` only its id is known."""
    error: BaseException | None = None
    """With ``error``: what the function raised. With ``dead``: the error that the library was given."""
    progress: float | None = None
    attrs: Mapping[str, Any] = field(default_factory=dict)
    """With ``heartbeat`` and ``update``: what was reported."""


Hook = Callable[[JobEvent], object]
_hooks: dict[tuple[int, str], list[Hook]] = {}
"""By source and event."""


def add(source: int, event: str, hook: Hook) -> None:
    """Call this function at an event of a source from now on. Raises ConfigurationError."""
    check(event, hook)
    _hooks.setdefault((source, event), []).append(hook)


def check(event: str, hook: Hook) -> None:
    """Raise ConfigurationError for an unknown event, and for what cannot be called or would not run."""
    if event == "held":
        raise ConfigurationError(_HELD)
    if event not in EVENTS:
        raise ConfigurationError(f"there is no event {event!r}; there are {', '.join(EVENTS)}")
    call = getattr(hook, "__call__", None)  # noqa: B004 - of an object, this is the method
    if call is None or iscoroutinefunction(hook) or iscoroutinefunction(call):
        raise ConfigurationError(
            f"{hook!r} cannot be called at {event!r}: give a plain function. A coroutine would never run, "
            "because a hook is called where no event loop is"
        )


def heard(source: int, event: str) -> bool:
    """Return True if this process calls any function at this event of this source."""
    return (source, event) in _hooks


def remove_all(source: int) -> None:
    """Call no function of this source any more."""
    for event in EVENTS:
        _hooks.pop((source, event), None)


def reported(
    source: int, job: CurrentJob, progress: float | None, attrs: Mapping[str, Any] | None
) -> None:
    """Call the functions of a heartbeat, and of an update if it reports anything."""
    details = {"progress": progress, "attrs": attrs or {}}
    fire(source, "heartbeat", job, **details)
    if progress is not None or attrs:
        fire(source, "update", job, **details)


def fire(source: int, event: str, job: CurrentJob, **details: Any) -> None:
    """Call the functions of an event. Raises nothing but what the host raises by a signal."""
    for hook in _hooks.get((source, event), ()):
        began = time.monotonic()
        with contain_errors("call a function of the application", event="hook_failed", hook=event):
            hook(JobEvent(event, job, **details))
        took = time.monotonic() - began
        if took > _SLOW:
            log_event("hook_slow", hook=event, seconds=round(took, 1))
