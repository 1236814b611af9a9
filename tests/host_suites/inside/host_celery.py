"""Guards every Celery application in a process of Celery's tests, as soon as it is made."""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

from after_import import after_import  # type: ignore[import-not-found]  # beside this file

_RECORDER = "HOST_SUITE_RECORDER" in os.environ


def guard_here() -> None:
    """Have each application guarded, when there are any."""
    after_import("celery.app.base", _guard_each)
    if _RECORDER:
        after_import("jobguard.adapters.celery", _take_any_broker)


def _guard_each(module: Any) -> None:
    init = module.Celery.__init__

    @functools.wraps(init)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        _guard(self)

    module.Celery.__init__ = guarded


def _guard(app: Any) -> None:
    import jobguard

    try:
        jobguard.guard(app)
    except jobguard.UnsupportedTarget as error:
        print(f"not guarded: {error}", file=sys.stderr)


def _take_any_broker(module: Any) -> None:
    """Hook the applications of the unit tests, whose brokers are in memory, as if they were on Redis."""
    import redis
    from recorder import Recorder  # type: ignore[import-not-found]  # beside this file

    from jobguard.adapter import Guarded, Later, Source
    from jobguard.errors import UnsupportedTarget

    composition: Any = sys.modules["jobguard.guard"]
    composition._tracker = lambda guarded, settings, conninfo: Recorder(guarded.source)
    adapter: Any = module.CeleryAdapter
    sources = adapter.sources

    def any_source(self: Any, target: object, *, namespace: str, name: str | None) -> Any:
        try:
            found = sources(self, target, namespace=namespace, name=name)
        except UnsupportedTarget:
            found = None
        if found is not None and (isinstance(found, Later) or found.inert is None):
            return found
        source = Source(namespace, "celery", "nowhere:0/0", one_body=False)
        return Guarded(source, None, redis.Redis)

    adapter.sources = any_source


def finish() -> None:
    """Write down what the hooks told."""
    if _RECORDER:
        from recorder import write_down

        write_down()
