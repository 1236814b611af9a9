"""Announce a guarded worker in the broker's Redis: that it is alive, and which queues it serves.

The leader reads these announcements to distinguish guarded workers from unguarded ones, and to find out
where results are. An announcement expires after seconds if the worker does not repeat it. The
connections that take messages get a name as well, so that a leader can count the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any
from uuid import UUID
from weakref import WeakKeyDictionary

from celery.backends.redis import RedisBackend
from kombu.transport.redis import Channel

from jobguard.adapters.celery import late, lookup
from jobguard.adapters.celery.connection import client_of
from jobguard.adapters.celery.layout import Layout
from jobguard.adapters.celery.push import TIMEOUT
from jobguard.adapters.celery.results import results_of
from jobguard.client_names import label_pool
from jobguard.clients import own_client
from jobguard.fork import OwnerProcess
from jobguard.host_safety import contain_errors
from jobguard.patching import Hooks
from jobguard.scripts import Script

if TYPE_CHECKING:
    from jobguard.adapter import Tracker


_scripts: WeakKeyDictionary[Any, tuple[OwnerProcess, Script]] = WeakKeyDictionary()


def announcement(
    app: Any, *, name: str, queues: Sequence[str], number: int
) -> Callable[[UUID], bool] | None:
    """Return a function that announces this worker; it may be called every few seconds, from any thread.

    ``number``: tells it from other workers that share its session.

    The function returns True if Redis took the announcement. All calls into Celery and kombu are
    made here, in the main thread: both take locks for their lookups, and a child that is forked
    while such a lock is taken would wait for it for ever.
    """
    tracker = lookup.tracker_for(app)
    if tracker is None:
        return None
    about = json.dumps({"name": name, "queues": list(queues), "control": _control(app)})
    results = _results(app, tracker)
    send = _sender(app, tracker)

    def announce_now(session: UUID) -> bool:
        with contain_errors("announce this worker", event="announcement_failed"):
            send(_field(session, number), about, results)
            return True
        return False

    return announce_now


def leave(app: Any, *, session: UUID, number: int) -> None:
    """Remove the announcement of this worker. Raise nothing."""
    with contain_errors("remove an announcement", event="announcement_failed"):
        if (tracker := lookup.tracker_for(app)) is not None:
            _sender(app, tracker)(_field(session, number), "", "")


def _field(session: UUID, number: int) -> str:
    return f"{session.hex}.{number}"


def _sender(app: Any, tracker: Tracker) -> Callable[[str, str, str], None]:
    known = _scripts.get(app)
    if known is None or not known[0].is_current:
        client = own_client(client_of(app.connection_for_write()), timeout=TIMEOUT)
        known = _scripts[app] = (OwnerProcess(), Script(client, __package__, "announce.lua"))
    script, layout = known[1], Layout.parse(tracker.source.prefix)

    def send(worker: str, about: str, results: str) -> None:
        (answer,) = script.run([([layout.workers, layout.about], [worker, about, results])])
        if isinstance(answer, Exception):
            raise answer

    return send


def _control(app: Any) -> str:
    """Return the exchange that controls this app's workers; "" if remote control is off."""
    conf = app.conf
    return str(conf.control_exchange or "celery") if conf.worker_enable_remote_control else ""


def _results(app: Any, tracker: Tracker) -> str:
    backend = app.backend
    if not isinstance(backend, RedisBackend):
        return ""
    results = results_of(backend, tracker.source.address)
    return json.dumps(results.as_fields(), sort_keys=True) if results is not None else ""


def put_on(hooks: Hooks) -> None:
    """Name kombu's consuming connections, in workers and in programs that wait for a reply alike."""
    hooks.put(Channel, "_create_client", create_client)


def create_client(original: Callable[..., Any]) -> Callable[..., Any]:
    """Channel._create_client: ``asynchronous`` marks the client that takes messages."""

    @wraps(original)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        client = original(self, *args, **kwargs)
        if kwargs.get("asynchronous", args[0] if args else False):
            with contain_errors("name the connection that takes messages"):
                _name(self)
        return client

    return hook


def _name(channel: Any) -> None:
    # A program that only asks workers (Flower) sends no task, which would connect its guard.
    for tracker in lookup.trackers_at(channel.connection.client)[:1]:
        if not late.is_late(tracker):
            label_pool(channel.async_pool, tracker.source)
