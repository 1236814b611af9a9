"""A guarded RQ on a real Redis, with a ledger in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from rq import Queue

from jobguard import registry
from jobguard.adapters.rq import RQAdapter
from jobguard.adapters.rq.broker import RQBroker
from tests.fakes.adapters import FakeTracker


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    """Return the host's client."""
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def queue(client: redis.Redis) -> Queue:
    """Return the host's queue."""
    return Queue("default", connection=client)


@pytest.fixture
def tracker(queue: Queue, tmp_path: Path) -> Iterator[FakeTracker]:
    """Guard every queue of the host's Redis."""
    rq_adapter = RQAdapter()
    guarded = rq_adapter.sources(queue.connection, namespace="test", name=None)
    assert guarded is not None
    tracker = FakeTracker(guarded.source, tmp_path / "calls")
    registry.register(tracker)
    rq_adapter.install(tracker, None)
    yield tracker
    rq_adapter.uninstall(tracker)
    registry.unregister(tracker)


@pytest.fixture
def broker(tracker: FakeTracker, client: redis.Redis) -> RQBroker:
    """Return the reconciler's view of the guarded Redis."""
    return RQBroker(tracker.source, client)


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """Return the path of a file to which only jobs write."""
    path = tmp_path / "ledger"
    path.touch()
    return path
