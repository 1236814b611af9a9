"""Where the hooks hang: on each guarded app, and, with the first of them, on Celery's own classes.

All of them or none, and removed as they were put.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import celery
from celery.signals import beat_init, celeryd_after_setup, worker_init
from celery.worker import WorkController

from jobguard.adapter import tracker_for_worker
from jobguard.adapters.celery import backend, cancellation, client_names, lookup, worker
from jobguard.adapters.celery.contain_errors import contain_errors
from jobguard.adapters.celery.hooks import Hooks
from jobguard.adapters.celery.producer import hook_app, unhook_app
from jobguard.errors import UnsupportedTarget

if TYPE_CHECKING:
    from jobguard.adapter import Tracker

_OLDEST = (5, 4)
_UID = "jobguard.celery.settle"

_lock = threading.RLock()
_hooks = Hooks()
_on = False


def install(tracker: Tracker, app: Any) -> None:
    """Have this app speak to this tracker; raises UnsupportedTarget if this Celery is not known."""
    with _lock:
        _put_on()
        if lookup.add(tracker, app):
            hook_app(app)
            worker.install(tracker, app)


def uninstall(tracker: Tracker) -> None:
    """Have no app speak to this tracker, and take the hooks off with the last."""
    with _lock:
        for app in lookup.remove(tracker):
            worker.uninstall(tracker, app)
            unhook_app(app)
        _take_off()


def wait(app: Any, callback: Callable[[], None]) -> None:
    """Call this back before the first thing that this app does; it need not be configured for this."""
    with _lock:
        _put_on()
        lookup.wait(app, callback)
        hook_app(app)
        worker.install(
            None, app
        )  # a spawned child prepares its tasks before anything is configured


def resolve_config(app: Any) -> None:
    """Have this app configured now, and call back who waits for it."""
    lookup.resolve_config(app)


def prepare() -> None:
    """Guard the app of every worker and beat that begins in this process, by its environment."""
    for signal, receiver in (
        (worker_init, _guard_by_environment),
        (beat_init, _guard_by_environment),
        (celeryd_after_setup, worker.logging_is_set_up),
    ):
        signal.connect(receiver, weak=False, dispatch_uid=f"{_UID}.{receiver.__name__}")


def _guard_by_environment(sender: Any = None, **_: Any) -> None:
    """worker_init, beat_init: nobody may have called guard() for this app."""
    with contain_errors("guard a program by its environment"):
        if lookup.tracker_for(sender.app) is None:
            tracker_for_worker(sender.app)
    _worker_begins(sender)


def _put_on() -> None:
    global _on
    if _on:
        return
    try:
        if celery.VERSION[:2] < _OLDEST:
            raise AttributeError("it is too old")
        for part in (backend, cancellation, client_names):
            part.put_on(_hooks)
    except AttributeError as error:
        _hooks.take_off()
        raise UnsupportedTarget(
            f"Celery {celery.__version__} is not as jobguard knows it ({error}): tasks are not "
            "guarded. Use a Celery from 5.4 on, or upgrade jobguard."
        ) from error
    worker_init.connect(_worker_begins, weak=False, dispatch_uid=_UID)
    _on = True


def _take_off() -> None:
    global _on
    if _on and not lookup.is_guarded():
        worker_init.disconnect(_worker_begins, dispatch_uid=_UID)
        _hooks.take_off()
        _on = False


def _worker_begins(sender: Any = None, **_: Any) -> None:
    """worker_init: an app that was not configured until now is guarded from here on."""
    if isinstance(sender, WorkController) and lookup.tracker_for(sender.app) is not None:
        worker.begin(sender)
