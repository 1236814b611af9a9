"""Answers of a Redis that cannot serve for a while: a worker connects again, as after a lost connection."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobguard.demo.servers import RedisServer
from tests.integration.celery.rig import a_rig


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "solo"])
def test_a_worker_survives_a_redis_that_is_a_replica_for_a_moment(
    tmp_path: Path, database: str, own_redis: RedisServer, pool: str
) -> None:
    """After READONLY or UNBLOCKED, the messages return to this or another worker, and run once."""
    with a_rig(tmp_path, database, own_redis.url) as rig:
        rig.reconciler()
        worker = rig.worker(pool)
        rig.until(rig.trusted)
        sent = [rig.send("ok", f"w{n}", countdown=4) for n in range(4)]
        rig.until(lambda: rig.redis.hlen("unacked") == 4)
        rig.redis.replicaof("127.0.0.1", "1")
        rig.until(lambda: "Connection to broker lost" in worker.text)
        rig.redis.replicaof("no", "one")
        rig.until(lambda: not rig.owed(), 90)
        assert [rig.ended(job_id) for job_id in sent] == [["completed"]] * 4
        assert rig.written() == {f"w{n}": 1 for n in range(4)}
        assert not worker.ended
