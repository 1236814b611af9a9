"""The table of apps and their trackers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

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


def add(tracker: Tracker, app: Any) -> bool:
    """Connect this app to this tracker. Return False if it was connected already."""
    with _lock:
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


def remove(tracker: Tracker) -> list[Any]:
    """Disconnect all apps from this tracker. Return those that have no tracker now."""
    bare = []
    with _lock:
        for app, guards in list(_guards.items()):
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


def is_guarded() -> bool:
    """Return True if any app is guarded, or will be guarded once it is configured."""
    return bool(_guards or _waiting)


def wait(app: Any, callback: Callable[[], None]) -> None:
    """Call this back before the first action of this app."""
    with _lock:
        _waiting.setdefault(app, []).append(callback)


def resolve_config(app: Any) -> None:
    """Call the callbacks that wait for this app's configuration, which is complete now.

    The callbacks stay on the list until they are done: another thread waits here for them as well.
    """
    if not _waiting or (app := real(app)) not in _waiting:
        return
    app.conf.broker_url  # noqa: B018  # configures it
    for callback in list(_waiting.get(app, ())):
        callback()
    with _lock:
        _waiting.pop(app, None)


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
    resolve_config(app)
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
