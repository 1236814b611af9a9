from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from rq import Queue, SimpleWorker
from rq.scheduler import RQScheduler

from jobguard.adapters.rq import producer
from jobguard.adapters.rq.broker import RQBroker
from jobguard.demo.servers import RedisServer
from jobguard.model import Restorable, Restored
from tests.fakes.adapters import FakeTracker
from tests.integration.rq import tasks


@pytest.fixture
def queue(own_redis: RedisServer) -> Iterator[Queue]:
    """Return a queue on a Redis server for this test alone."""
    with redis.Redis.from_url(
        own_redis.url, socket_timeout=0.3, retry=Retry(NoBackoff(), 0)
    ) as client:
        yield Queue("default", connection=client)


@pytest.mark.parametrize("known", [False, True])
def test_killed_while_a_producer_enqueues(
    known: bool, own_redis: RedisServer, queue: Queue, tracker: FakeTracker, ledger: Path
) -> None:
    """Jobs that were accepted while Redis was dead run once when it is back, with or without its data."""
    if known:  # a client that was connected before; else one that never was
        queue.enqueue(tasks.say, str(ledger))
    own_redis.kill()
    queue.enqueue(tasks.say, str(ledger))
    own_redis.restart(keep_data=False)
    assert not queue.job_ids

    lost = [
        Restorable(one.token, one.job_id, one.queue, one.envelope, one.due_at, one.expires_at)
        for one in tracker.owed.values()
    ]
    done = RQBroker(tracker.source, queue.connection).restore(lost, deadline=time.time() + 60)
    assert set(done.values()) == {Restored.RESTORED}
    SimpleWorker([queue], connection=queue.connection).work(burst=True)
    assert len(ledger.read_text().splitlines()) == 1 + known
    assert not tracker.withdrawn


def test_paused_while_a_producer_enqueues(
    own_redis: RedisServer, queue: Queue, tracker: FakeTracker
) -> None:
    """A push that Redis may have received is never withdrawn."""
    queue.enqueue(tasks.add, 1)
    own_redis.pause()
    try:
        job = queue.enqueue(tasks.add, 2)
    finally:
        own_redis.resume()

    assert tracker.recorded[1].job_id == job.id
    assert tracker.recorded[1].token in tracker.outbox
    assert not tracker.withdrawn


def test_no_wait_while_redis_is_known_to_be_away(
    own_redis: RedisServer, queue: Queue, tracker: FakeTracker
) -> None:
    """While Redis is known to be away, an enqueue does not wait."""
    own_redis.pause()
    tracker.in_doubt = True
    try:
        queue.enqueue(tasks.add, 1)
        queue.enqueue_many([Queue.prepare_data(tasks.add, (1,))])
    finally:
        own_redis.resume()

    assert not tracker.notes("broker_failed")  # no push was tried
    assert len(tracker.outbox) == 2


@pytest.mark.parametrize("mends", [True, False])
def test_a_scheduler_outlives_an_outage(
    mends: bool, queue: Queue, tracker: FakeTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RQ's scheduler continues when Redis is back, unless the fixes for the library are off."""
    monkeypatch.setattr(FakeTracker, "mends_library", mends)
    monkeypatch.setattr(producer, "_SCHEDULER_WAITS", 0.01)
    job = queue.enqueue_in(timedelta(seconds=-5), tasks.add, 1)

    class Scheduler(RQScheduler):
        failures = iter([redis.ConnectionError("gone"), redis.exceptions.ReadOnlyError("replica")])

        def _install_signal_handlers(self) -> None:
            """Keep the signal handlers of the tests."""

        def heartbeat(self) -> None:
            for failure in self.failures:
                raise failure
            super().heartbeat()  # type: ignore[no-untyped-call]
            self._stop_requested = True

    scheduler: Any = Scheduler([queue.name], connection=queue.connection, interval=1)
    scheduler.acquire_locks()
    if not mends:
        with pytest.raises(redis.ConnectionError):
            scheduler.work()
        return
    scheduler.work()
    assert queue.get_job_ids() == [job.id]


def test_a_scheduler_whose_worker_is_gone_ends(
    queue: Queue, tracker: FakeTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not wait for Redis for ever: no process is left that would stop it."""

    class Gone:
        def is_alive(self) -> bool:
            return False

    class Scheduler(RQScheduler):
        def _install_signal_handlers(self) -> None:
            """Keep the signal handlers of the tests."""

        def heartbeat(self) -> None:
            raise redis.ConnectionError("gone")

    monkeypatch.setattr("multiprocessing.parent_process", Gone)
    scheduler: Any = Scheduler([queue.name], connection=queue.connection, interval=1)
    scheduler.acquire_locks()
    with pytest.raises(redis.ConnectionError):
        scheduler.work()
