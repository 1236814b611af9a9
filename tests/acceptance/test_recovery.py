from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobguard.servers import RedisServer
from tests.acceptance.rig import Rig
from tests.support import eventually


@pytest.fixture
def rig(tmp_path: Path, database: str, own_redis: RedisServer) -> Iterator[Rig]:
    """Give a rig without processes."""
    rig = Rig(tmp_path, database, own_redis)
    yield rig
    rig.close()


def test_a_flushed_redis_gets_back_what_waited_and_it_runs_once(rig: Rig) -> None:
    """FLUSHALL of 2,000 waiting jobs: all of them run once, and the incident is closed."""
    rig.reconciler()
    worker = rig.worker()
    rig.trust()
    worker.pause()
    labels = rig.enqueue(2000)
    worker.resume()
    eventually(lambda: rig.runs().total() >= 20)

    rig.redis.flushall()
    at = time.monotonic()
    eventually(rig.waiting)
    print(f"first job back after {time.monotonic() - at:.2f} s")
    rig.all_ended(labels)
    print(f"all jobs ended after {time.monotonic() - at:.2f} s")
    rig.nothing_is_owed()

    assert set(rig.runs("start").values()) == {1}
    closed = "select missing, restored from jobguard.incidents where closed_at is not null"
    ((missing, restored),) = eventually(lambda: rig.ask(closed))
    assert missing >= restored > 1000
