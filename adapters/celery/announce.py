"""How a guarded worker makes itself known in the broker's Redis: that it is there, and whom it serves.

By this the leader tells it from an unguarded one, and learns where results are. What it says is
forgotten in seconds, if it does not say it again.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID
from weakref import WeakKeyDictionary

from celery.backends.redis import RedisBackend

from jobguard.adapters.celery import lookup
from jobguard.adapters.celery.layout import Layout
from jobguard.adapters.celery.places import client_of
from jobguard.adapters.celery.push import TIMEOUT
from jobguard.adapters.celery.results import results_of
from jobguard.adapters.celery.scripts import Script
from jobguard.clients import own_client
from jobguard.errors import is_host_interrupt

if TYPE_CHECKING:
    from jobguard.adapter import Tracker

log = logging.getLogger("jobguard")

_scripts: WeakKeyDictionary[Any, tuple[int, Script]] = WeakKeyDictionary()


def announce(app: Any, *, session: UUID, name: str, queues: Sequence[str]) -> None:
    """Say that this worker is there; to be said again every few seconds. Raises nothing."""
    tracker = lookup.tracker_for(app)
    if tracker is None:
        return
    try:
        about = {"name": name, "queues": list(queues), "control": _control(app)}
        _say(app, tracker, session, json.dumps(about), _results(app, tracker))
    except Exception as error:
        if is_host_interrupt(error):
            raise
        log.debug("a worker could not make itself known: %s", error)


def leave(app: Any, *, session: UUID) -> None:
    """Say that this worker is gone. Raises nothing."""
    tracker = lookup.tracker_for(app)
    if tracker is None:
        return
    try:
        _say(app, tracker, session, "", "")
    except Exception as error:
        if is_host_interrupt(error):
            raise
        log.debug("a worker could not say goodbye: %s", error)


def _say(app: Any, tracker: Tracker, session: UUID, about: str, results: str) -> None:
    mine = _scripts.get(app)
    if mine is None or mine[0] != os.getpid():
        client = own_client(client_of(app.connection_for_write()), timeout=TIMEOUT)
        mine = _scripts[app] = (os.getpid(), Script(client, "announce.lua"))
    layout = Layout.parse(tracker.source.prefix)
    (answer,) = mine[1].run([([layout.workers, layout.about], [session.hex, about, results])])
    if isinstance(answer, Exception):
        raise answer


def _control(app: Any) -> str:
    """Return the exchange by which this app's workers are controlled; "": they are not."""
    conf = app.conf
    return str(conf.control_exchange or "celery") if conf.worker_enable_remote_control else ""


def _results(app: Any, tracker: Tracker) -> str:
    backend = app.backend
    if not isinstance(backend, RedisBackend):
        return ""
    results = results_of(backend, tracker.source.address)
    return json.dumps(results.told(), sort_keys=True) if results is not None else ""
