"""The table of apps and their trackers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

from celery.local import Proxy

from jobguard import same_redis
from jobguard.adapters.celery.connection import broker_address_of, client_of
from jobguard.registry import trackers

if TYPE_CHECKING:
    from jobguard.adapter import Tracker

LIBRARY = "celery"

_lock = threading.RLock()
_guards: WeakKeyDictionary[Any, list[Tracker]] = WeakKeyDictionary()
_waiting: WeakKeyDictionary[Any, list[Callable[[], None]]] = WeakKeyDictionary()
_apart: WeakSet[Any] = WeakSet()
"""Apps that waited: each has a guard of its own, also if it shares a tracker with others."""
_acting: WeakSet[Any] = WeakSet()
"""Apps that sent a message or worked although they were in eager mode."""


def add(tracker: Tracker, app: Any) -> bool:
    """Connect this app to this tracker. Return False if it was connected already."""
    with _lock:
        (_apart.add if app in _waiting else _apart.discard)(app)
        guards = _guards.setdefault(app, [])
        if any(known.source.id == tracker.source.id for known in guards):
            return False
        guards.append(tracker)
        return True


def other_guard(tracker: Tracker, app: Any) -> Tracker | None:
    """Return another tracker that guards this app at the same broker."""
    place = (tracker.source.address, tracker.source.prefix)
    for known in _guards.get(app, ()):
        ours = known.source.id == tracker.source.id
        if not ours and (known.source.address, known.source.prefix) == place:
            return known
    return None


def remove(tracker: Tracker, apart: Any = None) -> list[Any]:
    """Disconnect this app, which has a guard of its own, from this tracker; None: all that have none.

    Return the apps that have no tracker now.
    """
    bare = []
    with _lock:
        for app, guards in list(_guards.items()):
            if app in _apart if apart is None else app is not real(apart):
                continue
            left = [known for known in guards if known.source.id != tracker.source.id]
            if len(left) < len(guards):
                _guards[app] = left
                if not left:
                    del _guards[app]
                    bare.append(app)
    return bare


def real(app: Any) -> Any:
    """Return the app behind a proxy such as ``current_app``."""
    return app._get_current_object() if issubclass(type(app), Proxy) else app


def is_used(tracker: Tracker) -> bool:
    """Return True if an app is connected to this tracker."""
    return any(
        known.source.id == tracker.source.id
        for guards in list(_guards.values())
        for known in guards
    )


def is_guarded() -> bool:
    """Return True if any app is guarded, or will be guarded once it is configured."""
    return bool(_guards or _waiting)


def wait(app: Any, callback: Callable[[], None]) -> None:
    """Call this back before the first action of this app."""
    with _lock:
        _waiting.setdefault(app, []).append(callback)


def eager_because(app: Any) -> str | None:
    """Return why nothing of this app is guarded: it is in eager mode, and has not acted nevertheless."""
    if app in _acting or not app.conf.task_always_eager:
        return None
    return "task_always_eager runs tasks at once, in the caller"


def resolve_config(app: Any, *, acts: bool = False) -> str | None:
    """Call the callbacks that wait for this app's configuration, which is complete now.

    ``acts``: the app sends a message, or works. Otherwise an app in eager mode waits on, and the reason
    is returned. The callbacks stay on the list until they are done: another thread waits here for them too.
    """
    if not _waiting or (app := real(app)) not in _waiting:
        return None
    app.conf.broker_url  # noqa: B018  # configures it
    if acts:
        _acting.add(app)
    if (why := eager_because(app)) is not None:
        return why
    for callback in list(_waiting.get(app, ())):
        callback()
    with _lock:
        _waiting.pop(app, None)
    return None


def tracker_for(app: Any) -> Tracker | None:
    """Return the tracker of this app; None if it is not guarded."""
    resolve_config(app)
    guards = _guards.get(real(app)) if _guards else None
    return guards[0] if guards else _tracker_of_copy(real(app))


def _tracker_of_copy(app: Any) -> Tracker | None:
    """Return the tracker of an app that came into a spawned child as a copy: that of its broker."""
    if not getattr(getattr(app, "amqp_cls", None), "is_hooked", False):
        return None
    tracker = next(iter(trackers_at(app.connection_for_write())), None)
    if tracker is not None:
        add(tracker, app)
    return tracker


def tracker_for_push(app: Any, connection: Any) -> Tracker | None:
    """Return the tracker of the broker that this app pushes to, by this connection.

    An app that came to this process as a copy, spawned or unpickled, is known by its broker.
    """
    resolve_config(app, acts=True)
    guards = _guards.get(real(app))
    return next(iter(at(guards if guards is not None else trackers(), connection)), None)


def trackers_at(connection: Any) -> list[Tracker]:
    """Return all trackers of the broker that this connection leads to, for every app."""
    for app in list(_waiting):
        resolve_config(app)
    return at(trackers(), connection)


def at(known: Iterable[Tracker], connection: Any) -> list[Tracker]:
    """Return those of these trackers that guard the broker that this connection leads to."""
    place = broker_address_of(connection)
    if place is None:
        return []
    ours = [
        tracker
        for tracker in known
        if tracker.source.library == LIBRARY and tracker.source.prefix == place.prefix
    ]
    return same_redis.trackers_at(ours, place.address, lambda: client_of(connection))
