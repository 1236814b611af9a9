"""Install the hooks on each guarded app, and with the first of them on Celery's own classes.

Either all hooks are installed or none, and they are removed in the same way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import celery
from celery import Celery
from celery.app.control import Control
from celery.signals import beat_init, celeryd_after_setup, worker_init
from celery.worker import WorkController

from jobguard.adapter import second_guard
from jobguard.adapters.celery import (
    announce,
    backend,
    cancellation,
    connection,
    late,
    lookup,
    sessions,
    worker,
)
from jobguard.adapters.celery.producer import hook_app, unhook_app
from jobguard.errors import StoreUnavailable, UnsupportedTarget
from jobguard.host_safety import contain_errors
from jobguard.log import log_event
from jobguard.patching import Hooks
from jobguard.registry import tracker_for_worker

if TYPE_CHECKING:
    from jobguard.adapter import Tracker

_OLDEST = (5, 4)
_UID = "jobguard.celery.worker_init"

_lock = threading.RLock()
_hooks = Hooks()
_on = False
_asked: WeakSet[Any] = WeakSet()
"""The apps for which the environment was asked."""


def install(tracker: Tracker, app: Any) -> None:
    """Connect this app to this tracker. Raise UnsupportedTarget if this Celery is not supported."""
    app = lookup.real(app)
    with _lock:
        other = lookup.other_guard(tracker, app)
        if other is not None:
            raise second_guard("this app", other.source, tracker.source)
        _install_hooks()
        if lookup.add(tracker, app):
            if connection.first_of_several(app.connection_for_write()):
                log_event("brokers_listed", guarded=tracker.source.address)
            hook_app(app)
            worker.install(tracker, app)
            if sessions.working_for(app) is None:
                late.check(tracker, app)


def uninstall(tracker: Tracker, apart: Any = None) -> bool:
    """Disconnect one or several apps from this tracker, and remove the hooks with the last one.

    ``apart``: see ``lookup.remove``. Return True if no app uses the tracker now.
    """
    with _lock:
        for app in lookup.remove(tracker, apart):
            worker.uninstall(app)
            unhook_app(app)
        if lookup.is_used(tracker):
            return False
        sessions.forget(tracker)
        late.forget(tracker)
        _remove_hooks()
        return True


def wait(app: Any, callback: Callable[[], None]) -> None:
    """Call this back before the first action of this app, which may be unconfigured until then."""
    with _lock:
        _install_hooks()
        lookup.wait(app, callback)
        hook_app(app)
        worker.install(
            None, app
        )  # a spawned child prepares its tasks before anything is configured


def prepare() -> None:
    """Guard every app of this process that begins as a worker or beat, or connects, by its environment."""
    Hooks().put(Celery, "connection_for_write", _connection_for_write)
    Hooks().put(Control, "broadcast", _broadcast)
    for signal, receiver in (
        (worker_init, _guard_by_environment),
        (beat_init, _guard_by_environment),
        (celeryd_after_setup, worker.logging_is_set_up),
    ):
        signal.connect(receiver, weak=False, dispatch_uid=f"{_UID}.{receiver.__name__}")


def _guard_by_environment(sender: Any = None, **_: Any) -> None:
    """worker_init, beat_init: guard an app for which no guard() was called."""
    _guard_app_by_environment(sender.app)
    _worker_begins(sender)


def _connection_for_write(original: Callable[..., Any]) -> Callable[..., Any]:
    """Celery.connection_for_write: every task and purge of a program needs it first."""

    @wraps(original)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        _guard_at_first_use(self)
        return original(self, *args, **kwargs)

    return hook


def _broadcast(original: Callable[..., Any]) -> Callable[..., Any]:
    """Control.broadcast: a revoke may be the first act of a program."""

    @wraps(original)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _guard_at_first_use(self.app):
            # The hook for guarded apps is on it now.
            return type(self).broadcast(self, *args, **kwargs)
        return original(self, *args, **kwargs)

    return hook


def _guard_at_first_use(app: Any) -> bool:
    """Guard an app by the environment; return False if that was tried before."""
    if app in _asked:
        return False
    _asked.add(app)  # the guard itself connects
    _guard_app_by_environment(app)
    return True


def _guard_app_by_environment(app: Any) -> None:
    with contain_errors("guard a program by its environment", let_pass=StoreUnavailable):
        if lookup.tracker_for(app) is None:
            tracker_for_worker(app)


def _install_hooks() -> None:
    global _on
    if _on:
        return
    try:
        if celery.VERSION[:2] < _OLDEST:
            raise AttributeError("it is too old")
        for part in (backend, cancellation, connection, announce):
            part.put_on(_hooks)
    except AttributeError as error:
        _hooks.take_off()
        raise UnsupportedTarget(
            f"Celery {celery.__version__} is not as jobguard knows it ({error}): tasks are not "
            "guarded. Use a Celery from 5.4 on, or upgrade jobguard."
        ) from error
    worker_init.connect(_worker_begins, weak=False, dispatch_uid=_UID)
    _on = True


def _remove_hooks() -> None:
    global _on
    if _on and not lookup.is_guarded():
        worker_init.disconnect(_worker_begins, dispatch_uid=_UID)
        _hooks.take_off()
        _on = False


def _worker_begins(sender: Any = None, **_: Any) -> None:
    """worker_init: an app that was not configured until now is guarded from here on."""
    if isinstance(sender, WorkController) and lookup.tracker_for(sender.app) is not None:
        worker.begin(sender)
