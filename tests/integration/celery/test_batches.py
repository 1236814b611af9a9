"""Tasks that Celery never starts one by one: celery-batches has a strategy of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.celery.rig import Rig, a_rig

pytest.importorskip("celery_batches")
WORDS = [f"w{n}" for n in range(7)]


@pytest.fixture
def rig(tmp_path: Path, database: str, redis_url: str) -> Iterator[Rig]:
    """Give real workers with a leader, and a guarded application."""
    with a_rig(tmp_path, database, redis_url) as rig:
        rig.reconciler()
        yield rig


@pytest.mark.parametrize("conf", [{}, {"task_acks_late": True}, {"task_track_started": True}])
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_each_runs_once_and_nothing_is_owed(rig: Rig, pool: str, conf: dict[str, object]) -> None:
    """Each task runs once, and the acknowledgement of its strategy ends it."""
    worker = rig.worker(pool, concurrency=1, conf=conf)
    jobs = [rig.send("batch", word) for word in WORDS]
    rig.until(lambda: rig.written().keys() >= set(WORDS))
    rig.until(lambda: not rig.owed())
    assert set(rig.written().values()) == {1}
    assert [rig.ended(job_id) for job_id in jobs] == [["completed"]] * len(jobs)
    assert "jobguard failed" not in worker.text
    assert "Traceback" not in worker.text
