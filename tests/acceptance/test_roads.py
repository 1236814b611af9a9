"""Every road by which a worker comes to be guarded, and every way RQ moves a job by itself.

Planted once, each seen to fail: `install_hooks` doing nothing (`jobguard run`), the import of the
hooks in adapters/rq/__init__.py removed (`-c`), `patches.install` in workers.py removed
(`--worker-class`), `moving()` not set in lives.retry (the attempts), every draft fresh and without a
parent (the scheduler's move), HostTracker.record doing nothing in a worker's child (the horse).
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from rq import Retry

from tests.acceptance import roads
from tests.acceptance.roads import BIN, QUEUE, Site, words
from tests.support import PATIENT, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RQ = str(BIN / "rq")
PYTHON = str(BIN / "python")
JOBGUARD = str(BIN / "jobguard")


@pytest.fixture
def site(tmp_path: Path, database: str, redis_url: str) -> Iterator[Site]:
    """Give a ledger and a Redis."""
    made = Site(tmp_path, database, redis_url, **PATIENT)
    yield made
    made.close()


WAYS = {
    "-c a module that calls guard()": (RQ, "worker", "-c", "settings_of_the_app"),
    "-c jobguard.adapters.rq": (RQ, "worker", "-c", "jobguard.adapters.rq"),
    "--worker-class Worker": (RQ, "worker", "--worker-class", "jobguard.adapters.rq.Worker"),
    "--worker-class SimpleWorker": (
        RQ,
        "worker",
        "--worker-class",
        "jobguard.adapters.rq.SimpleWorker",
    ),
    "jobguard run -- rq": (JOBGUARD, "run", "--", "rq", "worker"),
    "jobguard run -- python -m rq.cli": (
        JOBGUARD,
        "run",
        "--",
        "python",
        "-m",
        "rq.cli",
        "worker",
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_worker_is_guarded_by_every_documented_way(site: Site, way: str) -> None:
    """Its start is a claim, its end is in Postgres, and it beat while it was there."""
    (site.folder / "settings_of_the_app.py").write_text(
        "import jobguard, redis, rq\n"
        f"REDIS_URL = {site.redis_url!r}\n"
        f"jobguard.guard(rq.Queue({QUEUE!r}, connection=redis.Redis.from_url(REDIS_URL)))\n"
    )
    with site.producer() as (queue, _):
        job = queue.enqueue(roads.say, str(site.ledger))
    path = f"{roads.REPOSITORY}{os.pathsep}{site.folder}"
    worker = site.start(
        "worker", *WAYS[way], "--url", site.redis_url, "--burst", QUEUE, PYTHONPATH=path
    )
    assert worker.ends() == 0, worker.log
    ended = site.ask(
        "select h.outcome::text, h.number, w.queues, w.left_at is not null"
        " from jobguard.history h join jobguard.workers w on w.id = h.worker where h.job_id = %s",
        job.id,
    )
    assert ended == [("completed", 1, [QUEUE], True)], worker.log
    assert site.owed() == []
    assert site.ask("select count(*) from jobguard.running") == [0]
    assert words(site.ledger).total() == 1


def test_a_plain_worker_reports_nothing(site: Site) -> None:
    """The test above can fail: without any of the ways the job stays owed."""
    with site.producer() as (queue, _):
        job = queue.enqueue(roads.say, str(site.ledger))
    worker = site.start("bare", RQ, "worker", "--url", site.redis_url, "--burst", QUEUE)
    assert worker.ends() == 0, worker.log
    assert words(site.ledger).total() == 1
    assert site.owed() == [job.id]


def test_a_job_that_the_scheduler_moves_has_one_life(site: Site) -> None:
    """The move takes the place of the delay in one transaction: owed once, run once, completed."""
    with site.producer() as (queue, _):
        job = queue.enqueue_in(timedelta(seconds=1), roads.say, str(site.ledger))
    assert site.ask("select due_at is not null from jobguard.jobs") == [True]
    worker = site.worker("--with-scheduler", kind="Worker")
    eventually(lambda: "completed" in site.outcomes(job.id), 30, message=worker.log)
    moved, run = site.ask(
        "select token, outcome::text, next, attempt from jobguard.history"
        " where job_id = %s order by token",
        job.id,
    )
    assert (moved[1], moved[2]) == ("superseded", run[0])
    assert (run[1], run[2]) == ("completed", None)
    assert (moved[3], run[3]) == (1, 1)  # a move is no attempt
    assert words(site.ledger).total() == 1
    assert site.owed() == []


@pytest.mark.parametrize("interval", [0, 1])
@pytest.mark.parametrize("times", [1, 2], ids=["then it returns", "and it fails for good"])
def test_each_retry_supersedes_the_attempt_before(site: Site, interval: int, times: int) -> None:
    """At once or after a wait, through a real fork: attempts are counted, the last one is the end."""
    with site.producer() as (queue, guard):
        job = queue.enqueue(
            roads.fail_at_first,
            *(str(site.ledger), "tried", times),
            retry=Retry(max=1, interval=interval),
        )
        worker = site.worker("--with-scheduler", kind="Worker")
        last = "completed" if times == 1 else "failed"
        eventually(lambda: last in site.outcomes(job.id), 30, message=worker.log)
        assert guard.stats().total == 1
    lives = site.ask(
        "select outcome::text, attempt, coalesce(cardinality(errors), 0) from jobguard.history"
        " where job_id = %s order by token",
        job.id,
    )
    first, *moves, end = lives
    assert first[:2] == ("superseded", 1)
    assert moves == ([("superseded", 2, 0)] if interval else [])  # the scheduler's move
    assert end == (last, 2, 1 if last == "failed" else 0)
    assert words(site.ledger) == {"tried": 2}
    assert site.owed() == []
    assert site.ask("select count(*) from jobguard.running") == [0]


def test_a_job_that_enqueues_from_inside_a_horse(site: Site) -> None:
    """The horse records on a connection of its own, and the parent's goes on being the parent's."""
    with site.producer() as (queue, _):
        first = queue.enqueue(roads.hand_on, str(site.ledger), site.redis_url)
        worker = site.worker(kind="Worker")
        assert site.said(3) == {"first": 1, "recorded": 1, "second": 1}
        again = queue.enqueue(roads.say, str(site.ledger), "third")
        site.completed(first.id, again.id)
    eventually(lambda: site.owed() == [])
    ended = site.ask("select outcome::text, number from jobguard.history")
    assert ended == [("completed", 1)] * 3, worker.log
    assert words(site.ledger).total() == 4
