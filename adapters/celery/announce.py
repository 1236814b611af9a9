"""How a guarded worker makes itself known in the broker's Redis: that it is there, and whom it serves.

By this the leader tells it from an unguarded one, and learns where results are. What it says is
forgotten in seconds, if it does not say it again.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from uuid import UUID
from weakref import WeakKeyDictionary

from celery.backends.redis import RedisBackend

from jobguard.adapters.celery import lookup
from jobguard.adapters.celery.connection import client_of
from jobguard.adapters.celery.layout import Layout
from jobguard.adapters.celery.push import TIMEOUT
from jobguard.adapters.celery.results import results_of
from jobguard.clients import own_client
from jobguard.errors import is_host_interrupt
from jobguard.scripts import Script

if TYPE_CHECKING:
    from jobguard.adapter import Tracker

log = logging.getLogger("jobguard")

_scripts: WeakKeyDictionary[Any, tuple[int, Script]] = WeakKeyDictionary()


def announcement(app: Any, *, name: str, queues: Sequence[str]) -> Callable[[UUID], bool] | None:
    """Return what says that this worker is there, to be called every few seconds, from any thread.

    It answers whether Redis heard it. All that is asked of Celery and kombu is asked here, in the main
    thread: they lock whatever they look up, and a child that is forked in such a moment would wait for
    that lock for ever.
    """
    tracker = lookup.tracker_for(app)
    if tracker is None:
        return None
    about = json.dumps({"name": name, "queues": list(queues), "control": _control(app)})
    results = _results(app, tracker)
    tell = _teller(app, tracker)

    def again(session: UUID) -> bool:
        with _quietly("make itself known"):
            tell(session, about, results)
            return True
        return False

    return again


def announce(app: Any, *, session: UUID, name: str, queues: Sequence[str]) -> None:
    """Say once that this worker is there. Raises nothing."""
    with _quietly("make itself known"):
        if (tell := announcement(app, name=name, queues=queues)) is not None:
            tell(session)


def leave(app: Any, *, session: UUID) -> None:
    """Say that this worker is gone. Raises nothing."""
    with _quietly("say goodbye"):
        if (tracker := lookup.tracker_for(app)) is not None:
            _teller(app, tracker)(session, "", "")


@contextmanager
def _quietly(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if is_host_interrupt(error):
            raise
        log.debug("a worker could not %s: %s", what, error)


def _teller(app: Any, tracker: Tracker) -> Callable[[UUID, str, str], None]:
    mine = _scripts.get(app)
    if mine is None or mine[0] != os.getpid():
        client = own_client(client_of(app.connection_for_write()), timeout=TIMEOUT)
        mine = _scripts[app] = (os.getpid(), Script(client, __package__, "announce.lua"))
    script, layout = mine[1], Layout.parse(tracker.source.prefix)

    def tell(session: UUID, about: str, results: str) -> None:
        (answer,) = script.run([([layout.workers, layout.about], [session.hex, about, results])])
        if isinstance(answer, Exception):
            raise answer

    return tell


def _control(app: Any) -> str:
    """Return the exchange by which this app's workers are controlled; "": they are not."""
    conf = app.conf
    return str(conf.control_exchange or "celery") if conf.worker_enable_remote_control else ""


def _results(app: Any, tracker: Tracker) -> str:
    backend = app.backend
    if not isinstance(backend, RedisBackend):
        return ""
    results = results_of(backend, tracker.source.address)
    return json.dumps(results.as_fields(), sort_keys=True) if results is not None else ""
