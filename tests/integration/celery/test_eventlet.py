"""A worker on eventlet: it is guarded, and it ends on request."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.integration.celery.rig import a_rig


@pytest.mark.skipif(not importlib.util.find_spec("eventlet"), reason="eventlet is not installed")
def test_a_worker_on_eventlet_is_guarded(tmp_path: Path, database: str, redis_url: str) -> None:
    """Many tasks run at once, each claimed and ended; the worker does not hang at its shutdown."""
    with a_rig(tmp_path, database, redis_url) as rig:
        worker = rig.worker("eventlet", concurrency=8)
        sent = [rig.send("slow", f"w{n}", 0.2) for n in range(24)]
        failed = rig.send("fail")
        rig.until(lambda: not rig.owed())
        assert [rig.ended(job_id) for job_id in sent] == [["completed"]] * 24
        assert rig.ended(failed) == ["failed"]
        assert rig.ask("select distinct number from jobguard.history") == [(1,)]
        assert "without a claim" not in worker.text
        assert worker.stop() == 0
        assert rig.ask("select 1 from jobguard.workers where left_at is not null")
