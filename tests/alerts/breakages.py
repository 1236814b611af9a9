"""What each alert is for: each function breaks it, and after its ``yield`` does what the runbook says."""

from __future__ import annotations

import os
import signal
import urllib.request
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit, urlunsplit

import psycopg
import redis
import rq

from tests.acceptance import roads
from tests.acceptance.incident import poison
from tests.acceptance.roads import BIN, QUEUE, Child
from tests.alerts.site import IDLE, WatchedSite
from tests.databases import copy_database
from tests.support import eventually

Steps = Generator[None, None, None]
"""Break something; ``yield``; put it right."""
Play = Callable[[WatchedSite], Steps]

_JUST_LEFT = (
    "select count(*) from jobguard.workers"
    " where coalesce(left_at, dead_at) > now() - interval '6 seconds'"
)
TASK = "tests.acceptance.roads.say"
MANY = 200
"""Jobs of a deleted queue: more than the brake allows to vanish at once."""


@dataclass(frozen=True, slots=True)
class Breakage:
    """One way to make an alert fire."""

    alert: str
    remedy: str
    play: Play
    beside: dict[str, str] = field(default_factory=dict)
    """Other alerts that may fire, each with the reason."""

    @property
    def name(self) -> str:
        """The name on the command line."""
        return self.play.__name__.replace("_", "-")

    @property
    def what(self) -> str:
        """What is broken, in a sentence."""
        return str(self.play.__doc__)


BREAKAGES: list[Breakage] = []

_LAPSED = {
    "JobguardNoLeader": "the lease ran out meanwhile; in the real rule this holds for 30 s before it counts"
}
_AGAIN = {
    "JobguardUnguarded": "a new leader shows once more a worker that ended in the minute before"
}
_UNSEEN = {"JobguardSourceUnwatched": "nothing moves the pulse meanwhile"}
_MISSING = {"JobguardJobsMissing": "the jobs are absent until the remedy"}


def breaks(alert: str, remedy: str, **beside: str) -> Callable[[Play], Play]:
    """Add a breakage to BREAKAGES."""

    def add(play: Play) -> Play:
        BREAKAGES.append(Breakage(alert, remedy, play, beside))
        return play

    return add


# -- jobs ------------------------------------------------------------------------------------------


@breaks("JobguardHeld", "jobguard resume")
def paused(site: WatchedSite) -> Steps:
    """Somebody pauses recoveries."""
    site.run("pause")
    yield
    site.run("resume")


@breaks("JobguardHeld", "jobguard resume --queue", **_MISSING)
def queue_deleted(site: WatchedSite) -> Steps:
    """DEL of a queue."""
    ids = [f"bulk-{n}" for n in range(MANY)]
    site.send(*ids)
    # A worker that left a moment ago may have taken jobs: that is a cause, and they would go back at once.
    eventually(lambda: site.ask(_JUST_LEFT) == [0], 30)
    with site.producer() as (queue, _):
        for _ in range(2):
            site.swept(queue)  # The leader has seen each of them in Redis.
    with site.client() as client:
        client.delete(f"rq:queue:{IDLE}", *(f"rq:job:{one}" for one in ids))
    yield
    site.run("resume", "--queue", IDLE)
    eventually(lambda: site.waiting() == MANY, 60)
    site.worked_off()


@breaks("JobguardNotSent", "jobguard cancel ID")
def request_refused(site: WatchedSite) -> Steps:
    """SQL asks for a job with a number that Python does not read."""
    asked = "select jobguard.enqueue('rq', %s::text, %s::text, args => jsonb_build_array(1e5000))"
    (job_id,) = site.ask(asked, QUEUE, TASK)
    yield
    site.run("cancel", job_id)


@breaks("JobguardNotSent", "jobguard schedules remove")
def schedule_failed(site: WatchedSite) -> Steps:
    """A schedule has no times."""
    asked = "select jobguard.add_schedule('wrong', 'rq', %s::text, %s::text, cron => '61 * * * *')"
    site.ask(asked, QUEUE, TASK)
    yield
    site.run("schedules", "remove", "wrong")


@breaks(
    "JobguardDeadJobs",
    "jobguard dead requeue ID",
    JobguardJobsMissing="the job is absent between two deaths; in the real rule for 5 minutes",
)
def poisoned(site: WatchedSite) -> Steps:
    """A job kills three workers."""
    cure = site.folder / "cure"
    worker = site.worker(queue=IDLE)
    site.send("poison", task=poison, word=str(cure))

    def is_dead() -> bool:
        nonlocal worker
        if worker.process.poll() is not None:
            worker = site.worker(queue=IDLE)
        return bool(site.ask("select from jobguard.history where outcome = 'dead'"))

    eventually(is_dead, 120)
    worker.close()
    yield
    cure.touch()
    site.run("dead", "requeue", "poison")
    site.worked_off()


@breaks("JobguardBacklogOld", "start workers")
def no_worker(site: WatchedSite) -> Steps:
    """No worker takes the jobs of a queue."""
    site.send("old")
    site.ask(
        "update jobguard.jobs set recorded_at = recorded_at - interval '2 hours' returning true"
    )
    yield
    site.worked_off()


# -- workers ---------------------------------------------------------------------------------------


@breaks("JobguardUnflushed", "repair its way to PostgreSQL")
def worker_cut_off(site: WatchedSite) -> Steps:
    """A worker cannot log in to PostgreSQL any more."""
    with application(site) as (connection, worker):
        connection.execute("alter role app nologin")
        connection.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'app'"
        )
        yield
        connection.execute("alter role app login")
        worker.stop()


@breaks("JobguardUnflushed", "jobguard migrate --roles")
def rights_revoked(site: WatchedSite) -> Steps:
    """Somebody revokes a right of the workers."""
    with application(site) as (connection, worker):
        connection.execute("revoke insert, update on jobguard.history from jobguard_app")
        site.send("unwritten")
        yield
        site.run("migrate", "--roles")
        site.completed("unwritten")
        worker.stop()


@contextmanager
def application(site: WatchedSite) -> Iterator[tuple[psycopg.Connection, Child]]:
    """Give a connection of the owner, and a worker of IDLE with a login of its own."""
    parts = urlsplit(site.postgres)
    login = urlunsplit(parts._replace(netloc=f"app@{parts.hostname}:{parts.port}"))
    site.run("migrate", "--roles")
    with psycopg.connect(site.postgres, autocommit=True) as connection:
        if not site.ask("select from pg_roles where rolname = 'app'"):
            connection.execute("create role app login in role jobguard_app")
        yield connection, site.worker(queue=IDLE, JOBGUARD_POSTGRES_URL=login)


@breaks("JobguardUnguarded", "stop it")
def unguarded(site: WatchedSite) -> Steps:
    """A worker without jobguard starts."""
    bare = site.bare_worker()
    yield
    bare.stop()
    site.trusted()


@breaks(
    "JobguardJobsMissing",
    "stop it, then jobguard requeue --queue NAME --all",
    JobguardUnguarded="the worker is unguarded",
)
def job_vanished(site: WatchedSite) -> Steps:
    """A worker without jobguard is frozen, and a job vanishes."""
    site.staffed().stop()
    bare = site.bare_worker()
    eventually(lambda: site.ask("select from jobguard.queues where unguarded <> '{}'"), 30)
    bare.process.send_signal(signal.SIGSTOP)
    site.send("gone", queue=QUEUE)
    with site.client() as client:
        client.delete(f"rq:queue:{QUEUE}", "rq:job:gone")
    yield
    bare.process.send_signal(signal.SIGCONT)
    bare.stop()
    site.trusted()
    site.run("requeue", "--queue", QUEUE, "--all", "--yes")
    site.staffed()
    eventually(lambda: site.outcomes("gone") == ["superseded", "completed"], 30)


# -- the reconcilers -------------------------------------------------------------------------------


@breaks(
    "JobguardNoReconciler",
    "start reconcilers with --http",
    **_LAPSED,
    **_AGAIN,
)
def reconcilers_killed(site: WatchedSite) -> Steps:
    """Both reconcilers are killed."""
    for child in site.reconcilers.values():
        child.close()
    yield
    for number in (0, 1):
        site.reconcile(number)
    site.led()


@breaks(
    "JobguardNoLeader",
    "start a reconciler with the right one",
    **_AGAIN,
)
def no_leader(site: WatchedSite) -> Steps:
    """The leader is killed, and the other one has a wrong JOBGUARD_INSTALLATION."""
    site.reconcile(1, JOBGUARD_INSTALLATION="elsewhere")
    site.led(0)
    site.reconcilers[0].close()
    yield
    site.reconcile(0)
    site.led(0)
    site.reconcile(1)


@breaks(
    "JobguardStuck",
    "restart the process",
    **_UNSEEN,
    **_LAPSED,
)
def stuck(site: WatchedSite) -> Steps:
    """The password file of the leader hangs, as on a dead network file system."""
    secret = site.folder / "secret"
    secret.write_text("secret")
    with site.client() as client:
        client.acl_setuser(
            "reconciler",
            enabled=True,
            reset=True,
            passwords=["+secret"],
            keys=["*"],
            channels=["*"],
            categories=["+@all"],
        )
        url = site.redis_url.replace("://", "://reconciler@") + f"?password_file={secret}"
        site.reconcile(0, JOBGUARD_REDIS_URL=url)
        site.led(1)
        site.reconcilers[1].stop()
        site.led(0)
        site.reconcile(1)
        secret.unlink()
        os.mkfifo(secret)
        client.execute_command("CLIENT", "KILL", "USER", "reconciler")
        yield
        secret.unlink()
        site.reconcile(0)
        client.acl_deluser("reconciler")


# -- the servers -----------------------------------------------------------------------------------


@breaks("JobguardPostgresDown", "start PostgreSQL", **_LAPSED)
def postgres_killed(site: WatchedSite) -> Steps:
    """PostgreSQL is killed."""
    site.server.kill()
    yield
    site.server.start()
    site.led()


@breaks(
    "JobguardPostgresDown",
    "bring PostgreSQL back",
    **_LAPSED,
)
def postgres_frozen(site: WatchedSite) -> Steps:
    """PostgreSQL accepts connections and answers nothing."""
    site.server.pause()
    yield
    site.server.resume()
    site.led()


@breaks("JobguardSourceUnwatched", "bring Redis back")
def redis_frozen(site: WatchedSite) -> Steps:
    """Redis answers nothing."""
    site.redis.pause()
    yield
    site.redis.resume()
    site.staffed()


@breaks(
    "JobguardSourceUnwatched",
    "add the URL to JOBGUARD_REDIS_URL",
    **_LAPSED,
)
def redis_not_watched(site: WatchedSite) -> Steps:
    """An application uses a Redis that no reconciler has the URL of."""
    other = site.redis.database_url(1)
    with redis.Redis.from_url(other) as client, site.producer(client=client) as (queue, _):
        job = queue.enqueue(roads.say, str(site.ledger))
    yield
    site.settings["JOBGUARD_REDIS_URL"] = f"{site.redis_url} {other}"
    for number in (0, 1):
        site.reconcile(number)
    site.led()
    worker = site.start(
        "worker",
        *(str(BIN / "rq"), "worker", "--url", other, "--burst"),
        *("--worker-class", "jobguard.adapters.rq.SimpleWorker", QUEUE),
    )
    assert worker.ends() == 0
    site.completed(job.id)
    # The application is gone. A Redis that is not used any more is no alert.
    del site.settings["JOBGUARD_REDIS_URL"]
    for number in (0, 1):
        site.reconcile(number)
    site.led()
    unwatched = (
        "select count(*) from jobguard.sources where watched_at < now() - interval '35 seconds'"
    )
    eventually(lambda: site.ask(unwatched) == [1], 60)


@breaks(
    "JobguardIncidentOpen",
    "free memory",
    **_MISSING,
    **_UNSEEN,
)
def redis_full(site: WatchedSite) -> Steps:
    """Redis is full when it loses its data."""
    site.send(*(f"full-{n}" for n in range(20)))
    with site.client() as client:
        client.config_set("maxmemory", "1")
        client.flushall()
        yield
        client.config_set("maxmemory", "0")
    eventually(lambda: site.waiting() == 20, 60)
    site.worked_off()


@breaks(
    "JobguardOutboxStuck",
    "bring Redis back",
    **_UNSEEN,
)
def job_accepted(site: WatchedSite) -> Steps:
    """Redis is killed, and an application sends a job."""
    with site.producer() as (queue, _):
        site.redis.kill()
        job = rq.Queue(IDLE, connection=queue.connection).enqueue(roads.say, str(site.ledger))
        assert site.owed() == [job.id]
        yield
    site.redis.start()
    eventually(lambda: site.waiting() == 1, 60)
    site.worked_off()
    site.staffed()


# -- copies ----------------------------------------------------------------------------------------


@breaks(
    "JobguardDatabaseMoved",
    "jobguard resume --moved",
    JobguardSourceUnwatched="the copy names a Redis that its reconciler does not watch yet",
)
def database_copied(site: WatchedSite) -> Steps:
    """A reconciler runs on a copy of the database."""
    copied = site.server.create_database("copy")
    copy_database(site.postgres, copied)
    address = f"127.0.0.1:{site.ports[2]}"
    there = {
        "JOBGUARD_POSTGRES_URL": copied,
        "JOBGUARD_REDIS_URL": site.redis.database_url(2),
    }
    child = site.reconciler("--http", address, leads=False, **there)
    yield
    done = site.command("resume", "--moved", **there)
    assert done.returncode == 0, done.stdout + done.stderr

    def is_over() -> bool:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as page:
            return b"\njobguard_database_moved 0.0\n" in page.read()

    eventually(is_over, 30)
    child.stop()
