"""`jobguard run --` before other commands: jobs that such a command enqueues or removes are recorded.

The commands find the ledger by their environment, and a command that guarded nothing reports it at
its end.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import TYPE_CHECKING

import pytest

from tests.acceptance import roads
from tests.acceptance.roads import BIN, QUEUE, REPOSITORY, Site, words
from tests.support import PATIENT, eventually

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path

RUN = "run"


@pytest.fixture
def site(tmp_path: Path, database: str, redis_url: str) -> Iterator[Site]:
    """Give a ledger and a Redis."""
    made = Site(tmp_path, database, redis_url, **PATIENT)
    yield made
    made.close()


def run(site: Site, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command under `jobguard run --`."""
    done = site.command(RUN, "--", *words, **{"PYTHONPATH": str(REPOSITORY), **more})
    assert done.returncode == 0, done.stderr
    return done


def rq(site: Site, command: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command of `rq`."""
    return run(site, "rq", command, "--url", site.redis_url, *words)


def test_rq_enqueue(site: Site) -> None:
    """A job that `rq enqueue` pushes is recorded."""
    rq(site, "enqueue", "--queue", QUEUE, "tests.acceptance.roads.say", str(site.ledger))
    assert len(site.owed()) == 1


def test_rq_empty(site: Site) -> None:
    """A job that `rq empty` removes does not come back."""
    with site.producer() as (queue, _):
        job = queue.enqueue(roads.say, str(site.ledger))
        rq(site, "empty", QUEUE)
        assert site.outcomes(job.id) == ["cancelled"]
    assert site.owed() == []


def test_rq_requeue(site: Site) -> None:
    """A job that `rq requeue` puts back is another delivery, and runs once."""
    with site.producer() as (queue, _):
        job = queue.enqueue(roads.fail_at_first, str(site.ledger), "tried", 1)
        site.worker("--burst").ends()
        assert site.outcomes(job.id) == ["failed"]
        rq(site, "requeue", "--queue", QUEUE, job.id)
        assert site.owed() == [job.id]
        site.worker("--burst").ends()
        assert words(site.ledger) == {"tried": 2}
    site.nothing_is_owed()


CELERY = """
import os, celery
app = celery.Celery("shop", broker=os.environ["REDIS"])
app.conf.update(task_default_queue="mail", task_ignore_result=True)
@app.task(name="say")
def say(): ...
if __name__ == "__main__":
    print(say.delay().id, say.delay().id)
"""


def test_commands_of_celery(site: Site) -> None:
    """What a script sends, `control revoke` and `purge` are recorded for an app that calls no guard()."""
    app = site.folder / "shop.py"
    app.write_text(CELERY)
    environ = {"REDIS": site.redis_url, "PYTHONPATH": str(site.folder)}
    revoked, purged = run(site, str(app), **environ).stdout.split()
    assert sorted(site.owed()) == sorted([revoked, purged])
    command = (RUN, "--", "celery", "-A", "shop")
    site.command(*command, "control", "-t", "0.1", "revoke", revoked, **environ)
    assert site.outcomes(revoked) == ["cancelled"]
    site.command(*command, "purge", "-f", **environ)
    assert site.outcomes(purged) == ["cancelled"]
    assert site.owed() == []


DRAMATIQ = """
import os, dramatiq
from dramatiq.brokers.redis import RedisBroker
class Own(RedisBroker):
    def enqueue(self, message, *, delay=None):
        print("enqueue", flush=True)
        return super().enqueue(message, delay=delay)
broker = Own(url=os.environ["REDIS"])
@dramatiq.actor(broker=broker, queue_name="mail")
def say(): ...
first, _ = say.send(), broker.flush("mail")
print(first.message_id, say.send().message_id)
"""


def test_a_producer_of_dramatiq(site: Site) -> None:
    """A script whose broker has no guard() is recorded from its first message on."""
    script = site.folder / "sends.py"
    script.write_text(DRAMATIQ)
    lines = run(site, str(script), REDIS=site.redis_url).stdout.splitlines()
    flushed, sent = lines.pop().split()
    assert lines == ["enqueue", "enqueue"]
    assert site.outcomes(flushed) == ["cancelled"]
    assert site.owed() == [sent]


def test_a_command_that_guards_nothing_reports_it(site: Site) -> None:
    """A script that uses no queue, and a command without a ledger, print that nothing was guarded."""
    script = site.folder / "script.py"
    script.write_text("print('done')\n")
    assert "nothing was guarded" in run(site, str(script)).stderr
    assert "nothing was guarded" not in run(site, str(script), JOBGUARD_DISABLED="1").stderr
    job = ("rq", "enqueue", "--url", site.redis_url, "--queue", QUEUE, "operator.add", ":1", ":2")
    assert "nothing was guarded" in run(site, *job, JOBGUARD_POSTGRES_URL="").stderr
    assert "nothing was guarded" not in run(site, *job).stderr
    pool = ("rq", "worker-pool", "--url", site.redis_url, "--burst", QUEUE)
    assert "nothing was guarded" not in run(site, *pool).stderr  # its children are


SCHEDULES = """
import sys
from datetime import timedelta
import logging
import jobguard, redis, rq_scheduler
from tests.acceptance import roads

logging.basicConfig()
client = redis.Redis.from_url(sys.argv[1])
guard = jobguard.guard(client)
scheduler = rq_scheduler.Scheduler({queue!r}, connection=client)
for _ in range(2):
    scheduler.enqueue_in(timedelta(seconds=-1), roads.say, sys.argv[2])
"""


@pytest.mark.skipif(
    not importlib.util.find_spec("rq_scheduler"), reason="no rq-scheduler is installed"
)
def test_rq_scheduler(site: Site) -> None:
    """A job that rq-scheduler enqueues is recorded, and a log line warns once of its unrecorded store."""
    script = site.folder / "schedules.py"
    script.write_text(SCHEDULES.format(queue=QUEUE))
    path = f"{REPOSITORY}{os.pathsep}{site.folder}"
    command = (sys.executable, str(script), site.redis_url, str(site.ledger))
    app = site.start("app", *command, PYTHONPATH=path)
    assert app.ends() == 0, app.log
    assert app.log.count("is scheduled outside of RQ's own registry") == 1
    assert site.owed() == []

    scheduler = (
        str(BIN / "jobguard"),
        RUN,
        "--",
        "rqscheduler",
        "--url",
        site.redis_url,
        "--burst",
    )
    moved = site.start("scheduler", *scheduler, PYTHONPATH=path)
    assert moved.ends() == 0, moved.log
    eventually(lambda: len(site.owed()) == 2, message=moved.log)
    site.worker("--burst").ends()
    assert words(site.ledger) == {"ran": 2}
    site.nothing_is_owed()


def test_a_worker_says_whether_it_is_guarded(site: Site) -> None:
    """The first lines of a worker's log, by RQ's own logger, report if it is guarded."""
    worker = site.worker("--burst")
    assert worker.ends() == 0
    assert f"guarded by jobguard: {QUEUE} of rq at" in "\n".join(worker.log.splitlines()[:3])
    rq_worker = ("rq", "worker", "--url", site.redis_url, "--burst", QUEUE)
    done = run(site, *rq_worker, JOBGUARD_POSTGRES_URL="")
    assert "not guarded by jobguard" in done.stdout + done.stderr
