"""The hooks and signals of a guarded worker, from its start to its end.

The hooks are on Celery's classes and on its signals, which know no app: each hook finds the app of
its task. They are put on with the first guarded app of a process, and removed with the last.
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
from celery.worker.components import Pool
from celery.worker.consumer.consumer import Consumer

from jobguard.adapters.celery import (
    chords,
    fence,
    killed_runs,
    kombu_fixes,
    lookup,
    sessions,
    unacked,
    unknown_tasks,
)
from jobguard.adapters.celery.envelope import token_of
from jobguard.errors import StoreUnavailable, host_interrupts
from jobguard.host_safety import contain_errors
from jobguard.log import log_again
from jobguard.model import Outcome
from jobguard.patching import Hooks
from jobguard.registry import trackers

if TYPE_CHECKING:
    from jobguard.adapter import Tracker

# A time limit throws this into a task by a signal, and may do so inside of our code.
host_interrupts(SoftTimeLimitExceeded)

_lock = threading.RLock()
_apps: WeakSet[Any] = WeakSet()
_hooks = Hooks()


def install(tracker: Tracker | None, app: Any) -> None:
    """Hook the workers of this app; None: its tracker is not known yet."""
    with _lock:
        if not _apps:
            for part in (fence, killed_runs, unacked, chords, unknown_tasks):
                part.put_on(_hooks)
            _hooks.put(WorkController, "_process_task", process_task)
            _hooks.put(Pool, "start", pool_starts)
            _hooks.put(Consumer, "add_task_queue", queues_changed)
            _hooks.put(Consumer, "cancel_task_queue", queues_changed)
            for signal, receiver in RECEIVERS:
                signal.connect(receiver, weak=False, dispatch_uid=_uid(receiver))
        _apps.add(app)
        if tracker is not None and tracker.mends_library:
            kombu_fixes.put_on(_hooks)


def uninstall(app: Any) -> None:
    """Remove the hooks of this app."""
    with _lock:
        _apps.discard(app)
        if not _apps:
            for signal, receiver in RECEIVERS:
                signal.disconnect(receiver, dispatch_uid=_uid(receiver))
            _hooks.take_off()


def begin(controller: Any) -> None:
    """Open the session of a worker that is about to start its pool; once."""
    with contain_errors("open the session of a worker", let_pass=StoreUnavailable):
        lookup.resolve_config(controller.app, acts=True)
        if (working := sessions.begin(controller)) is not None:
            unacked.attach(working)


def pool_starts(original: Callable[..., Any]) -> Callable[..., Any]:
    """Pool.start: open the session here if a receiver of worker_init, or a later one, called guard().

    A signal does not call receivers that were connected while it was sent.
    """

    @wraps(original)
    def hook(self: Any, parent: Any) -> Any:
        begin(parent)
        return original(self, parent)

    return hook


def process_task(original: Callable[..., Any]) -> Callable[..., Any]:
    """WorkController._process_task: a request goes to the pool."""

    @wraps(original)
    def hook(self: Any, req: Any) -> Any:
        with contain_errors("prepare a request for a child", let_pass=StoreUnavailable):
            if (working := sessions.working_of(self)) is not None:
                working.hand(req)
        return original(self, req)

    return hook


def queues_changed(original: Callable[..., Any]) -> Callable[..., Any]:
    """Consumer.add_task_queue and cancel_task_queue: the worker consumes another queue, or one less."""

    @wraps(original)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        finally:  # also after a connection error: the change takes effect when the connection is back
            with contain_errors("publish the consumed queues", let_pass=StoreUnavailable):
                if (working := sessions.working_for(self.app)) is not None:
                    working.follow()

    return hook


def worker_begins(sender: Any = None, **_: Any) -> None:
    """worker_init: before the pool, and so before any fork."""
    begin(sender)


def logging_is_set_up(**_: Any) -> None:
    """celeryd_after_setup: from this moment on, lines of a worker reach its log."""
    with contain_errors("repeat early log lines"):
        log_again()


def worker_has_ended(sender: Any = None, **_: Any) -> None:
    """worker_shutdown: the pool is empty, and the tasks that did not begin are back in their queue."""
    with contain_errors("close the session of a worker", let_pass=StoreUnavailable):
        sessions.end(sender)


def child_ends(**_: Any) -> None:
    """worker_process_shutdown: flush, because a child leaves by os._exit, which drops waiting reports."""
    for session in sessions.children():
        session.flush()
    for tracker in trackers():
        tracker.drain_spool()


def was_revoked(sender: Any = None, request: Any = None, expired: bool = False, **_: Any) -> None:
    """task_revoked: by a person, by a stamp, or because it expired, perhaps during its run."""
    with contain_errors("report a revoked task", let_pass=StoreUnavailable):
        working, token = sessions.working_for(sender.app), token_of(vars(request))
        if working is not None and token is not None:
            error = "it expired before it began" if expired else None
            killed_runs.report(working, token, Outcome.CANCELLED, request=request, error=error)


RECEIVERS = (
    (signals.worker_init, worker_begins),
    (signals.celeryd_after_setup, logging_is_set_up),
    (signals.worker_shutdown, worker_has_ended),
    (signals.worker_process_shutdown, child_ends),
    (signals.task_prerun, fence.keep_stored_result),
    (signals.task_failure, fence.keep_error),
    (signals.task_postrun, fence.run_ended),
    (signals.task_revoked, was_revoked),
    (signals.task_rejected, unknown_tasks.was_rejected),
)


def _uid(receiver: Callable[..., Any]) -> str:
    return f"jobguard.celery.{receiver.__name__}"
