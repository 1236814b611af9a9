"""The programs in examples/ run as their docstrings say: one job is sent, one worker completes it."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest

from tests.acceptance.roads import BIN, REPOSITORY, Site
from tests.support import PATIENT, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EXAMPLES = REPOSITORY / "examples"
RQ_WORKER = (
    *(str(BIN / "rq"), "worker", "mail", "--worker-class", "jobguard.adapters.rq.Worker"),
    *("--path", str(EXAMPLES), "--url", "{redis}"),
)
REQUESTED = ("rq_schedules", "rq_sql")
"""Examples whose job the reconciler sends."""
WORKERS = {
    "rq_app": RQ_WORKER,
    "fastapi_app": RQ_WORKER,
    "flask_app": RQ_WORKER,
    "transactions_app": RQ_WORKER,
    "once_app": RQ_WORKER,
    "keys_app": RQ_WORKER,
    "django_rq_app": (sys.executable, str(EXAMPLES / "django_rq_app.py"), "rqworker", "mail"),
    "celery_app": (
        *(str(BIN / "celery"), "-A", "celery_app", "--workdir", str(EXAMPLES)),
        *("worker", "--concurrency", "1"),
    ),
    "django_celery": (
        *(str(BIN / "celery"), "-A", "django_celery", "--workdir", str(EXAMPLES)),
        *("worker", "--concurrency", "1"),
    ),
    "dramatiq_app": (
        *(str(BIN / "dramatiq"), "dramatiq_app", "--path", str(EXAMPLES)),
        *("--processes", "1", "--threads", "1"),
    ),
}


@pytest.fixture
def site(tmp_path: Path, database: str, redis_url: str) -> Iterator[Site]:
    """Give a ledger and a Redis."""
    made = Site(tmp_path, database, redis_url, **PATIENT)
    yield made
    made.close()


def test_every_example_has_a_test() -> None:
    """Every example has a test; an example is a module that sends a job when it is run."""
    programs = {path.stem for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text()}
    assert programs == {*WORKERS, *REQUESTED}


@pytest.mark.parametrize("name", WORKERS)
def test_an_example(site: Site, name: str) -> None:
    """An example sends one job, a worker runs it, and the ledger has its end."""
    path = os.pathsep.join((str(REPOSITORY), str(EXAMPLES)))
    sender = site.start(name, sys.executable, str(EXAMPLES / f"{name}.py"), PYTHONPATH=path)
    sender.ends()
    assert site.ask("select count(*) from jobguard.jobs") == [1], sender.log
    command = [part.replace("{redis}", site.redis_url) for part in WORKERS[name]]
    worker = site.start("worker", *command, PYTHONPATH=path)
    eventually(
        lambda: site.ask("select outcome::text from jobguard.history") == ["completed"],
        60,
        message=f"the job completes:\n{worker.log}",
    )
    worker.stop()


def test_the_examples_whose_jobs_the_reconciler_sends(site: Site) -> None:
    """The reconciler sends the jobs that a schedule and a trigger ask for, and a worker runs each once."""
    path = os.pathsep.join((str(REPOSITORY), str(EXAMPLES)))
    for name in REQUESTED:
        sender = site.start(name, sys.executable, str(EXAMPLES / f"{name}.py"), PYTHONPATH=path)
        assert sender.ends() == 0, sender.log
    assert site.ask("select task from jobguard.requests") == 2 * ["rq_tasks.send_mail"]
    site.reconciler()
    command = [part.replace("{redis}", site.redis_url) for part in RQ_WORKER]
    worker = site.start("worker", *command, PYTHONPATH=path)
    eventually(
        lambda: site.ask("select outcome::text from jobguard.history") == 2 * ["completed"],
        60,
        message=f"the jobs complete:\n{worker.log}",
    )
    worker.stop()
