"""A message of a topic exchange to two queues: each worker's copy is a job of its own."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from kombu.entity import Exchange, Queue

from tests.integration.celery.rig import PROGRAM, a_rig


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_both_copies_come_back_after_a_workers_death(
    tmp_path: Path, database: str, redis_url: str, pool: str
) -> None:
    """The worker recorded them, by the queues that it consumes and not by their routing key."""
    with a_rig(tmp_path, database, redis_url) as rig:
        rig.reconciler()
        worker = rig.worker(pool, TOPIC="1")
        rig.until(lambda: rig.trusted("one") and rig.trusted("two"))
        news = Exchange("news", type="topic")
        for name in ("one", "two"):
            rig.app.amqp.queues.add(Queue(name, news, routing_key="news.#"))
        rig.app.send_task(f"{PROGRAM}.slow", ("slow", 6.0), exchange=news, routing_key="news.eu")
        rig.until(lambda: rig.said()["slow-begins"] == 2)
        assert rig.ask("select queue from jobguard.jobs order by 1") == [("one",), ("two",)]
        worker.signal(signal.SIGKILL)
        rig.worker(pool, TOPIC="1")
        rig.until(lambda: rig.said()["slow"] == 2)
        rig.until(lambda: not rig.owed())
        assert rig.said() == {"slow-begins": 4, "slow": 2}
        ends = rig.ask("select queue, outcome::text from jobguard.history order by 1")
        assert ends == [("one", "completed"), ("two", "completed")]
