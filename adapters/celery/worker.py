"""A guarded worker: which of Celery's signals and methods are heard, from its start to its goodbye.

The hooks are on Celery's classes and on its signals, which know no app: each asks whose task it is.
They are put on with the first guarded app of a process and come off with the last.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from celery import signals
from celery.exceptions import SoftTimeLimitExceeded
from celery.worker import WorkController
from celery.worker.consumer.consumer import Consumer

from jobguard.adapter import trackers
from jobguard.adapters.celery import (
    chords,
    fence,
    killed_runs,
    kombu_fixes,
    lookup,
    sessions,
    unacked_marks,
    unknown_tasks,
)
from jobguard.adapters.celery.contain_errors import contain_errors
from jobguard.adapters.celery.header import token_of
from jobguard.adapters.celery.hooks import Hooks
from jobguard.errors import host_interrupts
from jobguard.log import say_again
from jobguard.model import Outcome

if TYPE_CHECKING:
    from jobguard.adapter import Tracker

# What a time limit throws into a task by a signal; it may strike inside of our code.
host_interrupts(SoftTimeLimitExceeded)

_lock = threading.RLock()
_apps: WeakSet[Any] = WeakSet()
_hooks = Hooks()


def install(tracker: Tracker | None, app: Any) -> None:
    """Hear what the workers of this app do; None: it is not known yet to whom that is told."""
    with _lock:
        if not _apps:
            for part in (fence, killed_runs, unacked_marks, chords, unknown_tasks):
                part.put_on(_hooks)
            _hooks.put(WorkController, "_process_task", process_task)
            _hooks.put(Consumer, "add_task_queue", consumes_others)
            _hooks.put(Consumer, "cancel_task_queue", consumes_others)
            for signal, receiver in HEARD:
                signal.connect(receiver, weak=False, dispatch_uid=_uid(receiver))
        _apps.add(app)
        if tracker is not None and tracker.mends_library:
            kombu_fixes.put_on(_hooks)


def uninstall(tracker: Tracker, app: Any) -> None:
    """Hear it no more."""
    with _lock:
        sessions.forget(tracker)
        _apps.discard(app)
        if not _apps:
            for signal, receiver in HEARD:
                signal.disconnect(receiver, dispatch_uid=_uid(receiver))
            _hooks.take_off()


def begin(controller: Any) -> None:
    """Open the session of a worker that is about to start its pool; once."""
    with contain_errors("open a session for a worker"):
        sessions.begin(controller)


def process_task(original: Callable[..., Any]) -> Callable[..., Any]:
    """WorkController._process_task: a request goes to the pool."""

    @wraps(original)
    def hook(self: Any, req: Any) -> Any:
        with contain_errors("tell a child of its task"):
            if (working := sessions.working_for(self.app)) is not None:
                working.hand(req)
        return original(self, req)

    return hook


def consumes_others(original: Callable[..., Any]) -> Callable[..., Any]:
    """Consumer.add_task_queue and cancel_task_queue: somebody has it consume another queue, or one less."""

    @wraps(original)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        finally:  # a broken connection, too: when it is back, so is what was added or left
            with contain_errors("tell which queues are consumed"):
                if (working := sessions.working_for(self.app)) is not None:
                    working.follow()

    return hook


def worker_begins(sender: Any = None, **_: Any) -> None:
    """worker_init: before the pool, and so before any fork."""
    begin(sender)


def logging_is_set_up(**_: Any) -> None:
    """celeryd_after_setup: the first moment at which a line of a worker reaches its log."""
    with contain_errors("repeat what was said"):
        say_again()


def worker_has_ended(sender: Any = None, **_: Any) -> None:
    """worker_shutdown: the pool is empty, and what was not begun is back in its queue."""
    with contain_errors("say goodbye"):
        if (tracker := lookup.tracker_for(sender.app)) is not None:
            sessions.end(tracker)


def child_ends(**_: Any) -> None:
    """worker_process_shutdown: a child leaves by os._exit, where nothing that waits would be written."""
    for session in sessions.children():
        session.flush()
    for tracker in trackers():
        tracker.drain_spool()


def was_revoked(sender: Any = None, request: Any = None, expired: bool = False, **_: Any) -> None:
    """task_revoked: by a person, by a stamp, or because it expired; perhaps while it ran."""
    with contain_errors("report that a task was revoked"):
        working, token = sessions.working_for(sender.app), token_of(vars(request))
        if working is not None and token is not None:
            error = "it expired before it began" if expired else None
            killed_runs.report(working, token, Outcome.CANCELLED, request=request, error=error)


HEARD = (
    (signals.worker_init, worker_begins),
    (signals.celeryd_after_setup, logging_is_set_up),
    (signals.worker_shutdown, worker_has_ended),
    (signals.worker_process_shutdown, child_ends),
    (signals.task_prerun, fence.before_celery_says_started),
    (signals.task_failure, fence.why_it_failed),
    (signals.task_postrun, fence.after_the_run),
    (signals.task_revoked, was_revoked),
    (signals.task_rejected, unknown_tasks.was_rejected),
)


def _uid(receiver: Callable[..., Any]) -> str:
    return f"jobguard.celery.{receiver.__name__}"
