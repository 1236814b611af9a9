"""Workers and programs that users run: pools, spawned horses, own worker classes, cron, Django.

Each is a real process, started as its manual says.

Each of these faults made a test fail: no claim in perform_job (the class that executes in its own
way), no tracker for cron ("jobguard run"), no hooks in the fresh Python (RQ's own SpawnWorker),
perform_job claiming without a session of its worker (Sentry after the guard was closed).
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from textwrap import dedent
from typing import TYPE_CHECKING, Any

import pytest
from rq import Queue, Retry

from tests.acceptance import roads
from tests.acceptance.roads import BIN, QUEUE, REPOSITORY, Child, Site, words
from tests.integration.rq.versions import VERSION_OF_RQ
from tests.support import PATIENT, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RQ = str(BIN / "rq")
JOBGUARD = str(BIN / "jobguard")
PYTHON = sys.executable


@pytest.fixture
def site(tmp_path: Path, database: str, redis_url: str) -> Iterator[Site]:
    """Give a ledger and a Redis."""
    made = Site(tmp_path, database, redis_url, **PATIENT)
    yield made
    made.close()


def write(site: Site, name: str, text: str) -> None:
    """Write a module of the user."""
    (site.folder / f"{name}.py").write_text(dedent(text))


def start(site: Site, *command: str, **more: str) -> Child:
    """Start a program that can import the user's modules."""
    path = f"{REPOSITORY}{os.pathsep}{site.folder}"
    return site.start("program", *command, PYTHONPATH=path, **more)


def beating(site: Site) -> int:
    """Count the registered workers."""
    (count,) = site.ask("select count(*) from jobguard.workers where left_at is null")
    return int(count)


def claimed(site: Site) -> list[tuple[str, int | None]]:
    """Return the outcome and the claim number of each ended delivery."""
    return site.ask("select outcome::text, number from jobguard.history order by token")


SPAWNERS = {
    "ours": ("--worker-class", "jobguard.adapters.rq.SpawnWorker"),
    "RQ's own": ("-c", "jobguard.adapters.rq", "--worker-class", "rq.worker.SpawnWorker"),
}


@pytest.mark.skipif(
    VERSION_OF_RQ < (2, 6), reason="tested with the SpawnWorker of RQ 2.6 and later"
)
@pytest.mark.parametrize("kind", SPAWNERS)
def test_a_spawning_worker(site: Site, kind: str) -> None:
    """The horse, a fresh Python, is hooked: it reports its ends, and its retries supersede each other."""
    with site.producer() as (queue, _):
        options = {"retry": Retry(max=1, interval=0), "result_ttl": 0}
        job = queue.enqueue(
            roads.fail_at_first, str(site.ledger), "tried", 1, job_id="a", **options
        )
        start(site, RQ, "worker", "--url", site.redis_url, *SPAWNERS[kind], "--burst", QUEUE).ends()
    lives = site.ask("select outcome::text, attempt, number from jobguard.history order by token")
    assert lives == [("superseded", 1, 1), ("completed", 2, 1)], job.id
    assert words(site.ledger) == {"tried": 2}
    site.nothing_is_owed()


POOLS = {
    "--worker-class": (RQ, "worker-pool", "--worker-class", "jobguard.adapters.rq.Worker"),
    "-c": (RQ, "worker-pool", "-c", "jobguard.adapters.rq"),
    "jobguard run": (JOBGUARD, "run", "--", "rq", "worker-pool"),
}


@pytest.mark.parametrize("way", POOLS)
def test_a_pool_of_workers(site: Site, way: str) -> None:
    """Each worker of a pool beats, and each leaves when the pool is stopped."""
    pool = start(site, *POOLS[way], "--url", site.redis_url, "--num-workers", "2", QUEUE)
    eventually(lambda: beating(site) == 2, 40, message=pool.log)
    with site.producer() as (queue, _):
        jobs = [queue.enqueue(roads.say, str(site.ledger)) for _ in range(4)]
        site.completed(*(job.id for job in jobs))
    assert [number for _, number in claimed(site)] == [1] * 4
    pool.stop()
    eventually(lambda: beating(site) == 0, 20, message=pool.log)
    site.nothing_is_owed()


CLASSES = {
    "a plain subclass": "class Mine(rq.Worker): pass",
    "overrides perform_job": """
        class Mine(rq.Worker):
            def perform_job(self, job, queue, *args):
                tell(job, "mine")
                return super().perform_job(job, queue, *args)
    """,
    "overrides execute_job": """
        class Mine(rq.Worker):
            def execute_job(self, job, queue):
                tell(job, "mine")
                super().execute_job(job, queue)
    """,
    "executes in its own way": """
        class Mine(rq.Worker):
            def execute_job(self, job, queue):
                tell(job, "mine")
                execution = self.prepare_execution(job)
                self.perform_job(job, queue, *([execution] if NEEDS_EXECUTION else []))
    """,
    "overrides handle_job_failure": """
        class Mine(rq.SimpleWorker):
            def handle_job_failure(self, job, queue, *args, **kwargs):
                tell(job, "mine")
                return super().handle_job_failure(job, queue, *args, **kwargs)
    """,
}
HEAD = """
import inspect
import rq
NEEDS_EXECUTION = "execution" in inspect.signature(rq.Worker.perform_job).parameters

def tell(job, word):
    with open(job.args[0], "a") as ledger:
        ledger.write(word + chr(10))
"""


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("result_ttl", [500, 0], ids=["kept", "result_ttl=0"])
def test_an_own_worker_class(site: Site, kind: str, result_ttl: int) -> None:
    """With any overridden method, a start makes a claim, and the worker reports the end itself."""
    write(site, "my_workers", HEAD + dedent(CLASSES[kind]))
    task = roads.fail_at_first if "failure" in kind else roads.say
    args: Any = ("said", 1) if "failure" in kind else ("said",)
    with site.producer() as (queue, _):
        job = queue.enqueue(
            task, str(site.ledger), *args, result_ttl=result_ttl, retry=Retry(max=1)
        )
    worker = start(
        site,
        *(RQ, "worker", "--url", site.redis_url, "-c", "jobguard.adapters.rq"),
        *("--worker-class", "my_workers.Mine", "--burst", QUEUE),
    )
    assert worker.ends() == 0, worker.log
    runs = 2 if "failure" in kind else 1
    assert site.outcomes(job.id) == ["superseded"] * (runs - 1) + ["completed"], worker.log
    assert [number for _, number in claimed(site)] == [1] * runs
    assert words(site.ledger)["said"] == runs
    assert words(site.ledger)["mine"] == (0 if "plain" in kind else 1)
    site.nothing_is_owed()


DAWDLER = """
import os, time
from jobguard.adapters.rq import Worker

class Dawdler(Worker):
    def execute_job(self, job, queue):
        open("popped", "w").close()
        time.sleep(60)
        os._exit(1)  # the test has failed by now
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_job_popped_from_one_of_two_queues_comes_back(site: Site, how: int) -> None:
    """Between BLPOP and the start, Redis does not have the job. If the worker ends then, RQ loses it."""
    write(site, "dawdlers", DAWDLER)
    reconciler = site.reconciler()
    options = ("--url", site.redis_url, "--worker-class", "dawdlers.Dawdler", "other", QUEUE)
    dawdler = start(site, RQ, "worker", *options)
    eventually(lambda: beating(site) == 1, 30, message=dawdler.log)
    site.trusted()
    with site.producer() as (queue, _):
        job = queue.enqueue(roads.say, str(site.ledger))
        eventually((site.folder / "popped").exists, 30, message=dawdler.log)
        assert not queue.job_ids
        dawdler.process.send_signal(how)
        dawdler.ends()
        assert site.owed() == [job.id]
        worker = site.worker()
        eventually(
            lambda: site.outcomes(job.id) == ["completed"],
            40,
            message=f"{worker.log}\n{reconciler.log}",
        )
    assert words(site.ledger).total() == 1
    site.nothing_is_owed()


CRON = """
from rq import cron
from tests.acceptance import roads

cron.register(roads.say, {queue!r}, args=({ledger!r}, "cron"), interval=3600)
"""
GUARDS = """
import jobguard, redis

jobguard.guard(redis.Redis.from_url({url!r}))
"""
CRONS = {
    "jobguard run": (False, (JOBGUARD, "run", "--", "rq", "cron")),
    "a config that calls guard()": (True, (RQ, "cron")),
}


@pytest.mark.skipif(VERSION_OF_RQ < (3, 0), reason="tested with the `rq cron` of RQ 3.0")
@pytest.mark.parametrize("way", CRONS)
def test_rq_cron(site: Site, way: str) -> None:
    """A job that RQ's cron enqueues is recorded before the push."""
    guards, command = CRONS[way]
    text = CRON.format(queue=QUEUE, ledger=str(site.ledger))
    write(site, "my_cron", (GUARDS.format(url=site.redis_url) if guards else "") + text)
    cron = start(site, *command, "--url", site.redis_url, "my_cron")
    eventually(lambda: len(site.owed()) == 1, 30, message=cron.log)
    with site.client() as client:
        (job_id,) = site.owed()
        eventually(lambda: client.lrange(f"rq:queue:{QUEUE}", 0, -1) == [job_id.encode()])
        site.worker()
        site.completed(job_id)
    assert words(site.ledger) == {"cron": 1}
    cron.stop()
    site.nothing_is_owed()


DJANGO = """
import os
import django
from django.apps import AppConfig

SECRET_KEY = "not one"
INSTALLED_APPS = ["django_rq", "guarded.Guarded"]
DATABASES = {{}}
RQ_QUEUES = {{{queue!r}: {{"URL": {url!r}}}}}
"""
DJANGO_APP = """
from django.apps import AppConfig

class Guarded(AppConfig):
    name = "guarded"

    def ready(self):
        import django_rq, jobguard
        jobguard.guard(django_rq.get_queue({queue!r}))
"""
MANAGE = """
import os, sys
os.environ["DJANGO_SETTINGS_MODULE"] = "my_settings"
from django.core.management import execute_from_command_line

if sys.argv[1] == "produce":
    import django, django_rq
    django.setup()
    from tests.acceptance import roads
    django_rq.get_queue(sys.argv[2]).enqueue(roads.say, sys.argv[3], job_id="by-django")
else:
    execute_from_command_line(sys.argv)
"""


@pytest.mark.skipif(not importlib.util.find_spec("django_rq"), reason="django-rq is not installed")
def test_django_rq(site: Site) -> None:
    """With guard() in AppConfig.ready, Django's producers record and its rqworker claims."""
    write(site, "my_settings", DJANGO.format(queue=QUEUE, url=site.redis_url))
    write(site, "guarded", DJANGO_APP.format(queue=QUEUE))
    write(site, "manage", MANAGE)
    producer = start(site, PYTHON, "manage.py", "produce", QUEUE, str(site.ledger))
    assert producer.ends() == 0, producer.log
    assert site.owed() == ["by-django"]
    worker = start(site, PYTHON, "manage.py", "rqworker", "--burst", QUEUE)
    assert worker.ends() == 0, worker.log
    assert claimed(site) == [("completed", 1)], worker.log
    assert words(site.ledger).total() == 1
    site.nothing_is_owed()


SENTRY = """
import sys
import jobguard, redis, rq, sentry_sdk
from rq.queue import Queue
from sentry_sdk.integrations.rq import RqIntegration
from sentry_sdk.transport import Transport
from tests.integration.rq import tasks

heard = []

class Deaf(Transport):
    def capture_envelope(self, envelope):
        heard.extend(item for item in envelope.items if item.type in ("event", "transaction"))

def sentry():
    sentry_sdk.init(
        "http://key@127.0.0.1/1", transport=Deaf, integrations=[RqIntegration()],
        default_integrations=False, traces_sample_rate=1.0,
    )

client = redis.Redis.from_url(sys.argv[2])
queue = rq.Queue({queue!r}, connection=client)
guard = None

def guarded():
    global guard
    guard = jobguard.guard(client)

def work():
    rq.SimpleWorker([queue], connection=redis.Redis.from_url(sys.argv[2])).work(burst=True)

def round(name):
    heard.clear()
    with sentry_sdk.start_transaction(name="producer"):
        job = queue.enqueue(tasks.fail, job_id=name)
    assert "_sentry_trace_headers" in job.get_meta(), "sentry's hook on enqueue is lost"
    work()
    kinds = [item.type for item in heard]
    assert kinds.count("event") == 1, kinds
    assert kinds.count("transaction") == 2, kinds  # the producer's and the worker's

for step in {{"guard first": (guarded, sentry), "sentry first": (sentry, guarded)}}[sys.argv[1]]:
    step()
round("both")
guard.close()
round("unguarded")
guarded()
round("guarded-again")
guard.close()
"""


@pytest.mark.skipif(not importlib.util.find_spec("sentry_sdk"), reason="no sentry-sdk is installed")
@pytest.mark.parametrize("order", ["guard first", "sentry first"])
def test_sentry(site: Site, order: str) -> None:
    """Sentry gets each event once and the ledger each end, in both orders, with the guard on and off."""
    write(site, "with_sentry", SENTRY.format(queue=QUEUE))
    program = start(site, PYTHON, "with_sentry.py", order, site.redis_url)
    assert program.ends() == 0, program.log
    ended = site.ask("select job_id, outcome::text, number from jobguard.history order by token")
    assert ended == [("both", "failed", 1), ("guarded-again", "failed", 1)], program.log
    site.nothing_is_owed()


def test_a_worker_that_listens_to_guarded_and_unguarded_queues(site: Site) -> None:
    """Only the jobs of the guarded queue are claimed. The other jobs run as without jobguard."""
    write(
        site,
        "my_settings",
        f"""
        import jobguard, redis, rq
        REDIS_URL = {site.redis_url!r}
        jobguard.guard(rq.Queue({QUEUE!r}, connection=redis.Redis.from_url(REDIS_URL)))
        """,
    )
    with site.client() as client:
        free = Queue("free", connection=client).enqueue(roads.say, str(site.ledger), "free")
        with site.producer() as (queue, _):
            kept = queue.enqueue(roads.say, str(site.ledger), "kept")
    worker = start(site, RQ, "worker", "-c", "my_settings", "--burst", "free", QUEUE)
    assert worker.ends() == 0, worker.log
    assert words(site.ledger) == {"free": 1, "kept": 1}
    assert site.ask("select job_id, outcome::text from jobguard.history") == [
        (kept.id, "completed")
    ], free.id
    site.nothing_is_owed()
