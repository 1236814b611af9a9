"""A guarded Celery on a real Redis, with a ledger in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import celery
import pytest
import redis

from jobguard import registry
from jobguard.adapter import Guarded
from jobguard.adapters.celery import CeleryAdapter
from jobguard.adapters.celery.broker import CeleryBroker
from tests.integration.celery.support import FakeTracker

_names = itertools.count()


def add(x: Any = 1, y: Any = 2) -> Any:
    """Add, as the task of that name does."""
    return x + y


def total(numbers: Any) -> Any:
    """Sum up, as the task of that name does."""
    return sum(numbers)


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    """Return a client of the broker's Redis."""
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def make_app(redis_url: str) -> Iterator[Callable[..., celery.Celery]]:
    """Return a function that makes an unguarded app on the test's Redis, with its results there too."""
    made: list[celery.Celery] = []

    def make(**conf: Any) -> celery.Celery:
        given = {"broker_url": redis_url, "result_backend": redis_url, **conf}
        app = celery.Celery(f"app{next(_names)}", set_as_current=False)
        app.conf.update(given)
        made.append(app)

        app.task(add, name="add", shared=False)
        app.task(total, name="total", shared=False)
        return app

    yield make
    for app in made:
        if app.conf.result_backend:  # a result that is garbage-collected later must not connect
            app.backend.result_consumer.stop()
            app.backend.result_consumer.subscribed_to.clear()
        app.close()


@pytest.fixture
def guard(tmp_path: Path) -> Iterator[Callable[[celery.Celery], FakeTracker]]:
    """Return a function that guards an app, and returns its tracker."""
    celery_adapter = CeleryAdapter()
    trackers: list[FakeTracker] = []

    def put_up(app: celery.Celery) -> FakeTracker:
        assert app.conf.broker_url
        guarded = celery_adapter.sources(app, namespace="test", name=None)
        assert isinstance(guarded, Guarded) and guarded.client is not None, guarded
        tracker = FakeTracker(guarded.source, tmp_path / f"calls{len(trackers)}")
        registry.register(tracker)
        celery_adapter.install(registry.registered_tracker(tracker), app)
        trackers.append(tracker)
        return tracker

    yield put_up
    for tracker in trackers:
        celery_adapter.uninstall(tracker)
        registry.unregister(tracker)


@pytest.fixture
def app(make_app: Callable[..., celery.Celery]) -> celery.Celery:
    """Return the host's app."""
    return make_app()


@pytest.fixture
def tracker(app: celery.Celery, guard: Callable[[celery.Celery], FakeTracker]) -> FakeTracker:
    """Guard the host's app."""
    return guard(app)


@pytest.fixture
def broker(tracker: FakeTracker, client: redis.Redis) -> CeleryBroker:
    """Return the reconciler's view of the guarded Redis."""
    return CeleryBroker(tracker.source, client)
