"""Guards every Celery application in a process of Celery's tests, when the application is made."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from typing import Any

from after_import import after_import  # type: ignore[import-not-found]  # beside this file

_RECORDER = "HOST_SUITE_RECORDER" in os.environ


def guard_here() -> None:
    """Guard each application that this process makes."""
    after_import("celery.app.base", _guard_each)
    if _RECORDER:
        after_import("jobguard.adapters.celery", _take_any_broker)
        after_import("jobguard.adapters.celery.connection", _see_redis)


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

    from jobguard.adapter import Guarded, Source

    connection_module: Any = importlib.import_module("jobguard.adapters.celery.connection")
    composition: Any = sys.modules["jobguard.guard"]
    composition._tracker = lambda guarded, settings, conninfo: Recorder(guarded.source)
    adapter: Any = module.CeleryAdapter
    sources = adapter.sources

    def any_source(self: Any, target: Any, *, namespace: str, name: str | None) -> Any:
        found = sources(self, target, namespace=namespace, name=name)
        if getattr(found, "inert", None) is None or target.conf.task_always_eager:
            return found
        broker_address = connection_module.broker_address_of(target.connection_for_write())
        source = Source(
            namespace, "celery", broker_address.address, str(broker_address.layout), one_body=False
        )
        return Guarded(source, None, redis.Redis)

    adapter.sources = any_source


def _see_redis(module: Any) -> None:
    """Answer questions about a broker in memory as for a broker in Redis."""
    kombu: Any = importlib.import_module("kombu")

    def on_redis(connection: Any) -> Any:
        in_memory = (
            isinstance(connection, kombu.Connection) and connection.transport_cls == "memory"
        )
        return kombu.Connection("redis://") if in_memory else connection

    for name in ("broker_address_of", "client_of", "on_paper"):
        asked = getattr(module, name)
        setattr(module, name, lambda connection, asked=asked: asked(on_redis(connection)))


def finish() -> None:
    """Write the counts of the recorder into a file."""
    if _RECORDER:
        from recorder import write_down

        write_down()
