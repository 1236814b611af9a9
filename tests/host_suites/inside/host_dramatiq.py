"""Guards every RedisBroker in a process of Dramatiq's tests, when the broker is made."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Iterator
from typing import Any
from unittest.mock import MagicMock

import pytest
from after_import import after_import  # type: ignore[import-not-found]  # beside this file

_STUBS_ON_REDIS = "HOST_SUITE_STUBS_ON_REDIS" in os.environ


def guard_here() -> None:
    """Guard each broker that this process makes."""
    after_import("dramatiq.brokers.redis", _guard_each)


def _guard_each(module: Any) -> None:
    init = module.RedisBroker.__init__

    @functools.wraps(init)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> None:
        import jobguard

        init(self, *args, **kwargs)
        jobguard.guard(self)

    module.RedisBroker.__init__ = guarded


def prepare_tests() -> None:
    """Replace Memcached for tests that do not test it."""
    after_import("dramatiq.rate_limits.backends", _without_memcached)
    after_import("dramatiq.results.backends", _without_memcached)


def _without_memcached(module: Any) -> None:
    """Replace the backend: the fixtures make a backend of each kind, and skip all if one is missing."""
    module.MemcachedBackend = lambda **_: MagicMock(pool=_NoPool())


class _NoPool:
    @contextlib.contextmanager
    def reserve(self) -> Iterator[Any]:
        """Give a mock client."""
        yield MagicMock()


def is_asked_for(item: pytest.Item) -> bool:
    """Return True if this test must run: on Redis, only the tests that use a StubBroker."""
    fixtures: Any = getattr(item, "fixturenames", ())
    return not _STUBS_ON_REDIS or "stub_broker" in fixtures


def out_of_reach(item: pytest.Item) -> str | None:
    """Return the reason why this test cannot run here."""
    chosen = getattr(item, "callspec", None)
    if chosen is not None and "memcached" in chosen.params.values():
        return "needs Memcached"
    return None


def prepare_fixtures(module: Any) -> None:
    """Run the tests that use a StubBroker on Redis, if requested: the guard ignores a real stub."""
    if not _STUBS_ON_REDIS or not hasattr(module, "StubBroker"):
        return
    from dramatiq.brokers.redis import RedisBroker

    errors: Any = importlib.import_module("dramatiq.errors")

    class StubBroker(RedisBroker):
        """A Redis broker with the interface of a stub."""

        def __init__(self, middleware: Any = None, **_: Any) -> None:
            init: Any = super().__init__
            init(middleware=middleware)
            self.client.flushall()

        def join(self, queue_name: str, *, timeout: int | None = None, **_: Any) -> None:
            """Wait for the messages; a failed message raises no error."""
            if queue_name not in self.queues:
                raise errors.QueueNotFound(queue_name)
            super().join(queue_name, timeout=timeout)

        def flush_all(self) -> None:
            """Delete everything, for the next test."""
            self.client.flushall()

    module.StubBroker = StubBroker
