"""Every way by which a worker becomes guarded, and every way by which RQ itself moves a job.

Each of these faults made a test fail: `install_hooks` does nothing (`jobguard run`), the import of
the hooks in the package of the RQ adapter is removed (`-c`), the workers do not install the patches
(`--worker-class`), a retry does not mark the job as moving (the attempts), every draft is fresh and
has no parent (the move by the scheduler), HostTracker.record does nothing in a child of a worker
(the horse).
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
    """In each documented way, the start is a claim, the end is in PostgreSQL, and the worker has beaten."""
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
    """Without any of these ways the job stays owed, so the test above can fail."""
    with site.producer() as (queue, _):
        job = queue.enqueue(roads.say, str(site.ledger))
    worker = site.start("bare", RQ, "worker", "--url", site.redis_url, "--burst", QUEUE)
    assert worker.ends() == 0, worker.log
    assert words(site.ledger).total() == 1
    assert site.owed() == [job.id]


def test_a_job_that_the_scheduler_moves_has_one_life(site: Site) -> None:
    """The move supersedes the delayed delivery in one transaction: the job is owed once and runs once."""
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
    """At once or after a delay, through a real fork, attempts are counted, and the last one is the end."""
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
    assert moves == ([("superseded", 2, 0)] if interval else [])  # the move by the scheduler
    assert end == (last, 2, 1 if last == "failed" else 0)
    assert words(site.ledger) == {"tried": 2}
    assert site.owed() == []
    assert site.ask("select count(*) from jobguard.running") == [0]


def test_a_job_that_enqueues_from_inside_a_horse(site: Site) -> None:
    """The horse records on its own connection, and the connection of the parent stays usable."""
    with site.producer() as (queue, _):
        first = queue.enqueue(roads.hand_on, str(site.ledger), site.redis_url)
        worker = site.worker(kind="Worker")
        assert site.wait_for_runs(3) == {"first": 1, "recorded": 1, "second": 1}
        again = queue.enqueue(roads.say, str(site.ledger), "third")
        site.completed(first.id, again.id)
    eventually(lambda: site.owed() == [])
    ended = site.ask("select outcome::text, number from jobguard.history")
    assert ended == [("completed", 1)] * 3, worker.log
    assert words(site.ledger).total() == 4
