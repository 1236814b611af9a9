"""Where each job of RQ's ends in the ledger, whatever way it went, and with Redis lost on the way.

A road is a way into Redis and the steps that RQ then takes. Its jobs must leave the deliveries that
are listed, in this order, and nothing that is owed; and they must do so as well if everything in
Redis is lost before any one of the steps. The leader that puts it back is a process of its own.

Planted once, each seen to fail: `moving()` not set in lives.retry (the retries) and in
worker.handle_job_success (the repeats), the group or the parents left out of the routing (losses of
these), `_intend_to_cancel` left out of intent.cancel (the cancels), a horse that tells nothing (the
roads with a ttl of 0, which leave nothing in Redis to find out from).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

import psycopg
import pytest
import redis
import rq
from rq import Callback, Queue, Retry, SimpleWorker, Worker
from rq.group import Group
from rq.job import Dependency, Job
from rq.registry import FailedJobRegistry
from rq.scheduler import RQScheduler
from rq.serializers import JSONSerializer

import jobguard.schema
from jobguard.guard import JobGuard
from tests.acceptance.roads import QUEUE, Site
from tests.integration.rq import tasks
from tests.integration.rq.versions import VERSION_OF_RQ
from tests.support import PATIENT, eventually

if TYPE_CHECKING:
    from jobguard.demo.servers import NamedPostgres, NamedRedis

TASKS = "tests.integration.rq.tasks"


class Trip:
    """One job's way through a real installation."""

    def __init__(self, site: Site, queue: Queue, guard: JobGuard, ledger: str) -> None:
        self.site, self.queue, self.guard, self.ledger = site, queue, guard, ledger
        self.kind: Any = SimpleWorker
        self.serializer: Any = None

    @property
    def redis(self) -> redis.Redis:
        """The host's client."""
        return self.queue.connection

    @property
    def said(self) -> list[str]:
        """What the jobs said, in order."""
        with open(self.ledger, encoding="utf-8") as file:
            return file.read().split()

    def job(self, job_id: str = "a") -> Job:
        """The job, as it stands in Redis."""
        return Job.fetch(job_id, connection=self.redis, serializer=self.serializer)

    def lives(self) -> dict[str, list[str]]:
        """Every delivery of each job: how it ended, its attempt, and > if the next took its place."""
        rows = self.site.ask(
            "select job_id, format('%%s %%s', outcome, attempt)"
            "  || case next when lead(token) over (partition by job_id order by token) then ' >'"
            "     else '' end"
            " from (select job_id, token, outcome::text, attempt, next from jobguard.history"
            "  union all select job_id, token, 'owed', attempt, null from jobguard.jobs) as lives"
            " order by token"
        )
        lives: dict[str, list[str]] = {}
        for job_id, life in rows:
            lives.setdefault(job_id, []).append(life)
        return lives

    def lose_everything(self) -> None:
        """Lose all of Redis, and wait until what is owed is back, as the same deliveries."""
        owed = self.site.ask("select token, recoveries from jobguard.jobs")
        self.redis.flushdb()
        eventually(lambda: all(self._is_back(token, before) for token, before in owed), 20)
        # Its incident is over, so that the next loss is another one.
        running = "select count(*) from jobguard.incidents where closed_at is null"
        eventually(lambda: self.site.ask(running) == [0], 20)

    def _is_back(self, token: Any, before: int) -> bool:
        now = self.site.ask("select job_id, recoveries from jobguard.jobs where token = %s", token)
        if not now:
            return True  # its end came first; the lives tell whether that was right
        ((job_id, recoveries),) = now
        return bool(
            recoveries == before + 1
            and self.redis.hget(f"rq:job:{job_id}", "jg") == token.hex.encode()
        )


def work(trip: Trip, **limits: Any) -> None:
    """Work the queue off."""
    known = trip.redis.connection_pool.connection_kwargs
    # A client of its own: RQ's worker changes the timeouts of the one it is given.
    client = redis.Redis(host=known["host"], port=known["port"], db=known["db"])
    with client:
        worker = trip.kind([QUEUE], connection=client, serializer=trip.serializer)
        worker.work(burst=True, **limits)


def work_one(trip: Trip) -> None:
    """Work one job off."""
    work(trip, max_jobs=1)


def move(trip: Trip) -> None:
    """Have what is scheduled come due, and RQ's scheduler move it."""
    key = f"rq:scheduled:{QUEUE}"
    # A Redis that was slow for a moment has the job from the leader, a moment later.
    ids: Any = eventually(lambda: trip.redis.zrange(key, 0, -1), 20)
    trip.redis.zadd(key, {one: time.time() - 1 for one in ids})
    scheduler: Any = RQScheduler([trip.queue], connection=trip.redis)
    scheduler.acquire_locks()
    scheduler.enqueue_scheduled_jobs()
    scheduler.release_locks()


def abandon(trip: Trip) -> None:
    """Have a worker that nobody knows of take the job and die, and RQ notice; the leader puts it back."""
    job = trip.job()
    trip.redis.lpop(trip.queue.key)
    trip.redis.hset(job.key, "status", "started")
    trip.redis.zadd(f"rq:wip:{QUEUE}", {f"{job.id}:dead": 1})
    trip.queue.started_job_registry.cleanup()
    eventually(lambda: trip.queue.job_ids == ["a"], 20)


def wait_for_the_leader(trip: Trip) -> None:
    """Have the leader find out by itself."""
    eventually(lambda: not trip.site.owed(), 20)


def wait_for_a_release(trip: Trip) -> None:
    """Have the leader release a child, unless RQ has done it."""
    eventually(lambda: trip.queue.job_ids or not trip.site.owed(), 20)


def enqueue_in_a_pipeline(trip: Trip) -> None:
    """Enqueue on the caller's own transaction."""
    with trip.redis.pipeline() as pipe:
        trip.queue.enqueue(tasks.say, trip.ledger, job_id="a", pipeline=pipe)
        pipe.execute()


def enqueue_family(trip: Trip, **depends: Any) -> None:
    """Enqueue a parent and its child."""
    trip.queue.enqueue(tasks.say, trip.ledger, "parent", job_id="a")
    trip.queue.enqueue(
        tasks.say, trip.ledger, "child", job_id="b", depends_on=Dependency("a", **depends)
    )


def enqueue_two_parents(trip: Trip) -> None:
    """Enqueue a child of two."""
    for parent in "ab":
        trip.queue.enqueue(tasks.say, trip.ledger, parent, job_id=parent)
    trip.queue.enqueue(tasks.say, trip.ledger, "child", job_id="c", depends_on=["a", "b"])


def enqueue_child_of_a_failure(trip: Trip) -> None:
    """Enqueue a child that does not mind its parent's failure."""
    trip.queue.enqueue(tasks.fail, trip.ledger, job_id="a")
    depends = Dependency("a", allow_failure=True)
    trip.queue.enqueue(tasks.say, trip.ledger, "child", job_id="b", depends_on=depends)


def enqueue_many(trip: Trip) -> None:
    """Enqueue several at once, of which one waits for another."""
    first = trip.queue.enqueue(tasks.say, trip.ledger, "first", job_id="a")
    trip.queue.enqueue_many(
        [
            Queue.prepare_data(tasks.say, (trip.ledger, "free"), job_id="b"),
            Queue.prepare_data(tasks.say, (trip.ledger, "child"), job_id="c", depends_on=first),
        ]
    )


def enqueue_group(trip: Trip) -> None:
    """Enqueue a group."""
    datas = [Queue.prepare_data(tasks.say, (trip.ledger, one), job_id=one) for one in "ab"]
    group: Any = Group.create(connection=trip.redis, name="g")
    group.enqueue_many(trip.queue, datas)


def the_group_is_whole(trip: Trip) -> None:
    """See that RQ finds the group's jobs."""
    group: Any = Group.fetch("g", trip.redis)
    assert sorted(job.id for job in group.get_jobs()) == ["a", "b"]


def enqueue_unique(trip: Trip) -> None:
    """Enqueue one that RQ takes, and one that it refuses."""
    trip.queue.enqueue(tasks.say, trip.ledger, job_id="a", unique=True)
    refuse_unique(trip)


def refuse_unique(trip: Trip) -> None:
    """See that RQ refuses the same id."""
    from rq.exceptions import DuplicateJobError

    with pytest.raises(DuplicateJobError):
        trip.queue.enqueue(tasks.say, trip.ledger, "again", job_id="a", unique=True)


def enqueue_twice(trip: Trip) -> None:
    """Enqueue the same id twice."""
    for word in ("old", "new"):
        trip.queue.enqueue(tasks.say, trip.ledger, word, job_id="a")


def enqueue_rate_limited(trip: Trip) -> None:
    """Enqueue three jobs, of which one may run at a time."""
    from rq.rate_limit import RateLimit

    limit = RateLimit("key", concurrency=1)
    for one in "abc":
        trip.queue.enqueue(tasks.say, trip.ledger, one, job_id=one, rate_limit=limit)


def enqueue_by_cron(trip: Trip) -> None:
    """Have RQ's cron enqueue."""
    from rq.cron import CronScheduler

    cron: Any = CronScheduler(connection=trip.redis)
    cron.register(tasks.say, QUEUE, args=(trip.ledger, "cron"), interval=3600)
    cron.enqueue_jobs()


def enqueue_with_webhook(trip: Trip) -> None:
    """Enqueue a job that calls a web server of ours when it has finished."""
    from rq.webhook import Webhook

    ledger = trip.ledger

    class Heard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            tasks.say(ledger, "webhook")
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = HTTPServer(("127.0.0.1", 0), Heard)
    threading.Thread(target=server.handle_request, daemon=True).start()
    hook = Webhook(f"http://127.0.0.1:{server.server_port}/", "finished")
    trip.queue.enqueue(tasks.say, trip.ledger, job_id="a", webhooks=[hook])


def serialized(serializer: Any) -> Callable[[Trip], None]:
    """Enqueue with a serializer other than RQ's own."""

    def enqueue(trip: Trip) -> None:
        trip.serializer = serializer
        queue = Queue(QUEUE, connection=trip.redis, serializer=serializer)
        queue.enqueue(f"{TASKS}.say", trip.ledger, job_id="a")

    return enqueue


def plainly(task: Any = tasks.say, **options: Any) -> Callable[[Trip], None]:
    """Enqueue one job with these options."""

    def enqueue(trip: Trip) -> None:
        trip.queue.enqueue(task, trip.ledger, job_id="a", **options)

    return enqueue


ONE = {"a": ["completed 1"]}


@dataclass(frozen=True)
class Road:
    """A way into Redis, RQ's steps from there on, and the deliveries that the ledger then knows."""

    enqueue: Callable[[Trip], object]
    lives: Mapping[str, Sequence[str]]
    steps: tuple[Callable[[Trip], object], ...] = (work,)
    said: Sequence[str] | None = None
    losable: tuple[int, ...] | None = None
    """Before which steps everything is lost; None: before any."""
    forks: bool = False
    """Whether a worker that forks has another way here."""
    since: tuple[int, int] = (2, 0)
    """The RQ that brought it."""


ROADS: dict[str, Road] = {
    "enqueue": Road(plainly(), ONE, said=["ran"], forks=True),
    "a function by its name": Road(plainly(f"{TASKS}.say"), ONE, said=["ran"]),
    "enqueue_call": Road(
        lambda trip: trip.queue.enqueue_call(tasks.say, (trip.ledger,), job_id="a", timeout=9),
        ONE,
        losable=(),
    ),
    "enqueue_job": Road(
        lambda trip: trip.queue.enqueue_job(
            Job.create(tasks.say, (trip.ledger,), connection=trip.redis, id="a")
        ),
        ONE,
        losable=(),
    ),
    "a pipeline of the caller's": Road(enqueue_in_a_pipeline, ONE, losable=()),
    "at_front": Road(
        lambda trip: [
            trip.queue.enqueue(tasks.say, trip.ledger, one, job_id=one, at_front=True)
            for one in "abc"
        ],
        {one: ["completed 1"] for one in "abc"},
        said=["c", "b", "a"],
    ),
    "meta": Road(plainly(tasks.say_meta, meta={"word": "meta"}), ONE, said=["meta"]),
    "JSON": Road(serialized(JSONSerializer), ONE, said=["ran"]),
    "a serializer of one's own": Road(serialized(tasks.Reversed), ONE, said=["ran"]),
    "callback of a success": Road(
        plainly(on_success=Callback(tasks.on_success)),
        ONE,
        said=["ran", "succeeded"],
        losable=(),
        forks=True,
    ),
    "callback of a failure": Road(
        plainly(tasks.fail, on_failure=Callback(tasks.on_failure)),
        {"a": ["failed 1"]},
        said=["ran", "failed"],
        forks=True,
    ),
    "a broken callback of a success": Road(
        plainly(on_success=Callback(tasks.broken)),
        {"a": ["failed 1"]},
        said=["ran"],
        losable=(),
        forks=True,
    ),
    "a broken callback of a failure": Road(
        plainly(tasks.fail, on_failure=Callback(tasks.broken)), {"a": ["failed 1"]}, losable=()
    ),
    "a function that is not there": Road(
        plainly("nowhere.to.be.found"), {"a": ["failed 1"]}, losable=()
    ),
    "a timeout": Road(
        plainly(tasks.too_long, job_timeout=1), {"a": ["failed 1"]}, losable=(), forks=True
    ),
    "webhook": Road(enqueue_with_webhook, ONE, said=["ran", "webhook"], since=(2, 10), forks=True),
    "result_ttl=0": Road(plainly(result_ttl=0), ONE, losable=(), forks=True),
    "failure_ttl=0": Road(plainly(tasks.fail, failure_ttl=0), {"a": ["failed 1"]}, forks=True),
    "ttl": Road(plainly(ttl=1), {"a": ["cancelled 1"]}, (wait_for_the_leader,), said=[]),
    "scheduled": Road(
        lambda trip: trip.queue.enqueue_in(timedelta(hours=1), tasks.say, trip.ledger, job_id="a"),
        {"a": ["superseded 1 >", "completed 1"]},
        (move, work),
    ),
    "enqueue_at": Road(
        lambda trip: trip.queue.enqueue_at(
            datetime.now(UTC) + timedelta(hours=1), tasks.say, trip.ledger, job_id="a"
        ),
        {"a": ["superseded 1 >", "completed 1"]},
        (move, work),
        losable=(),
    ),
    "depends_on": Road(
        enqueue_family,
        {"a": ["completed 1"], "b": ["superseded 1 >", "completed 1"]},
        (work_one, work),
        said=["parent", "child"],
        forks=True,
    ),
    "two parents": Road(
        enqueue_two_parents,
        {"a": ["completed 1"], "b": ["completed 1"], "c": ["superseded 1 >", "completed 1"]},
        # Lost between its parents' ends, the child is the leader's to release.
        (work_one, work, wait_for_a_release, work),
        said=["a", "b", "child"],
    ),
    "a parent that fails": Road(
        enqueue_child_of_a_failure,
        {"a": ["failed 1"], "b": ["superseded 1 >", "completed 1"]},
        (work_one, work),
        said=["ran", "child"],
        forks=True,
    ),
    "enqueue_many with dependencies": Road(
        enqueue_many,
        {"a": ["completed 1"], "b": ["completed 1"], "c": ["superseded 1 >", "completed 1"]},
        (work_one, work),
    ),
    "group": Road(
        enqueue_group,
        {"a": ["completed 1"], "b": ["completed 1"]},
        (the_group_is_whole, work),
    ),
    "unique": Road(enqueue_unique, ONE, (refuse_unique, work), said=["ran"], since=(2, 8)),
    "the same id twice": Road(
        enqueue_twice, {"a": ["superseded 1 >", "completed 1"]}, said=["new"], forks=True
    ),
    "rate limits": Road(
        enqueue_rate_limited,
        {one: ["completed 1"] for one in "abc"},
        (work_one, work),
        said=["a", "b", "c"],
        since=(3, 0),
        forks=True,
    ),
    "cron": Road(enqueue_by_cron, {"*": ["completed 1"]}, said=["cron"], since=(3, 0)),
    "repeat at once": Road(
        lambda trip: plainly(repeat=rq.Repeat(times=2, interval=0))(trip),
        {"a": ["completed 1 >", "completed 1 >", "completed 1"]},
        (work_one, work_one, work),
        since=(2, 3),
        forks=True,
    ),
    "repeat later": Road(
        lambda trip: plainly(repeat=rq.Repeat(times=1, interval=60))(trip),
        {"a": ["completed 1 >", "superseded 1 >", "completed 1"]},
        (work, move, work),
        since=(2, 3),
        forks=True,
    ),
    "retry at once": Road(
        plainly(tasks.fail, retry=Retry(max=2)),
        {"a": ["superseded 1 >", "superseded 2 >", "failed 3"]},
        (work_one, work_one, work),
        said=["ran"] * 3,
        forks=True,
    ),
    "retry later": Road(
        plainly(tasks.fail, retry=Retry(max=1, interval=60)),
        {"a": ["superseded 1 >", "superseded 2 >", "failed 2"]},
        (work, move, work),
        said=["ran"] * 2,
        forks=True,
    ),
    "a returned Retry": Road(
        lambda trip: trip.queue.enqueue(tasks.ask_again, trip.ledger, 1, job_id="a"),
        {"a": ["superseded 1 >", "completed 2"]},
        (work_one, work),
        said=["ran"] * 2,
        since=(2, 1),
        forks=True,
    ),
    "a returned Retry too many": Road(
        plainly(tasks.return_retry),
        {"a": ["superseded 1 >", "failed 2"]},
        (work_one, work),
        said=["ran"] * 2,
        since=(2, 1),
        forks=True,
    ),
    "requeue from the registry": Road(
        plainly(tasks.fail),
        {"a": ["failed 1", "failed 1"]},
        (work, lambda trip: FailedJobRegistry(queue=trip.queue).requeue("a"), work),
        losable=(0, 2),  # what has failed is not owed, and gone with Redis
        said=["ran"] * 2,
    ),
    "Job.requeue": Road(
        plainly(tasks.fail),
        {"a": ["failed 1", "failed 1"]},
        (work, lambda trip: trip.job().requeue(), work),
        losable=(0, 2),
        said=["ran"] * 2,
        forks=True,
    ),
    "abandoned": Road(plainly(), ONE, (abandon, work), losable=(0,), said=["ran"]),
    "abandoned, with retries": Road(
        # A worker's death is not a failure: the same delivery goes back, and no retry is spent.
        plainly(retry=Retry(max=1)),
        ONE,
        (abandon, work),
        losable=(0,),
        said=["ran"],
    ),
    "cancel": Road(plainly(), {"a": ["cancelled 1"]}, (lambda trip: trip.job().cancel(), work)),
    "cancel what is scheduled": Road(
        lambda trip: trip.queue.enqueue_in(timedelta(hours=1), tasks.say, trip.ledger, job_id="a"),
        {"a": ["cancelled 1"]},
        (lambda trip: trip.job().cancel(), work),
        losable=(0,),
    ),
    "cancel with dependents": Road(
        enqueue_family,
        {"a": ["cancelled 1"], "b": ["superseded 1 >", "completed 1"]},
        (lambda trip: trip.job().cancel(enqueue_dependents=True), work),
        said=["child"],
    ),
    "delete": Road(
        plainly(), {"a": ["cancelled 1"]}, (lambda trip: trip.job().delete(), work), losable=(0,)
    ),
    "delete with dependents": Road(
        enqueue_family,
        {"a": ["cancelled 1"], "b": ["cancelled 1"]},
        (lambda trip: trip.job().delete(delete_dependents=True), work),
        said=[],
        losable=(0,),
    ),
    "Queue.empty": Road(
        plainly(),
        {"a": ["cancelled 1"]},
        (lambda trip: cast(Any, trip.queue).empty(), work),
        said=[],
        losable=(0,),
    ),
    "Queue.delete": Road(
        plainly(),
        {"a": ["cancelled 1"]},
        (lambda trip: trip.queue.delete(), work),
        said=[],
        losable=(0,),
    ),
    "Queue.delete without its jobs": Road(
        plainly(),
        {"a": ["cancelled 1"]},
        (lambda trip: trip.queue.delete(delete_jobs=False), work),
        said=[],
        losable=(0,),
    ),
    "Queue.remove": Road(
        plainly(),
        {"a": ["cancelled 1"]},
        (lambda trip: trip.queue.remove("a"), work),
        said=[],
        losable=(0,),
    ),
    "ScheduledJobRegistry.remove": Road(
        lambda trip: trip.queue.enqueue_in(timedelta(hours=1), tasks.say, trip.ledger, job_id="a"),
        {"a": ["cancelled 1"]},
        (lambda trip: trip.queue.scheduled_job_registry.remove("a"), work),
        said=[],
        losable=(0,),
    ),
}

RUNS: list[tuple[str, Any]] = [
    (name, kind)
    for name, road in ROADS.items()
    for kind in ((SimpleWorker, Worker) if road.forks else (SimpleWorker,))
]
LOSSES = [
    (name, at)
    for name, road in ROADS.items()
    for at in (range(len(road.steps)) if road.losable is None else road.losable)
]


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory,
    postgres_server: NamedPostgres,
    template_database: str,
    redis_server: NamedRedis,
    redis_databases: Iterator[int],
) -> Iterator[Site]:
    """Give an installation with a name of its own, a leader, and a queue that is trusted."""
    name = f"jobguard_test_{uuid4().hex}"
    url = postgres_server.create_database(name, template_database)
    jobguard.schema.migrate(url, installation="lineage")
    with psycopg.connect(url) as connection:
        jobguard.schema.accept_move(connection)
    made = Site(
        tmp_path_factory.mktemp("lineage"),
        url,
        redis_server.database_url(next(redis_databases)),
        JOBGUARD_INSTALLATION="lineage",
        **PATIENT,
    )
    try:
        with made.client() as client:
            client.flushdb()
        made.reconciler()
        worker = made.worker()
        made.trusted()
        worker.stop()  # its trust outlives it
        yield made
    finally:
        made.close()
        with made.client() as client, suppress(redis.RedisError):
            client.flushdb()
        postgres_server.drop_database(name)


@pytest.fixture
def trip(site: Site, tmp_path: Any) -> Iterator[Trip]:
    """Give a way through the installation, on which nobody goes but this test."""
    ledger = tmp_path / "ledger"
    ledger.touch()
    with psycopg.connect(site.postgres) as connection:
        connection.execute("delete from jobguard.history")
    with site.producer() as (queue, guard):
        yield Trip(site, queue, guard, str(ledger))
        # Not to be the next test's trouble.
        with psycopg.connect(site.postgres) as connection:
            for table in ("jobs", "running", "suspects", "outbox"):
                connection.execute(f"delete from jobguard.{table}".encode())
        queue.connection.delete(*(queue.connection.keys("rq:*") or ["nothing"]))


def go(trip: Trip, road: Road, lost_before: int | None = None) -> None:
    """Go this road, and see where it ends."""
    if road.since > VERSION_OF_RQ:
        pytest.skip(f"RQ {'.'.join(map(str, road.since))} brought it")
    road.enqueue(trip)
    # On a busy machine its push may be left to the leader, and a step would find nothing to be dealt to.
    eventually(lambda: not trip.site.ask("select 1 from jobguard.outbox"), 20)
    for at, step in enumerate(road.steps):
        if at == lost_before:
            trip.lose_everything()
        step(trip)

    def arrived() -> bool:
        lives = trip.lives()
        if "*" in road.lives:
            (life,) = lives.values()
            lives = {"*": life}
        assert lives == road.lives
        return True

    eventually(arrived)  # a last report may have to be written twice on a busy machine
    if road.said is not None:
        assert trip.said == road.said
    trip.site.nothing_is_owed()


@pytest.mark.parametrize(("name", "kind"), RUNS, ids=[f"{name} {k.__name__}" for name, k in RUNS])
def test_every_job_ends_where_it_belongs(name: str, kind: Any, trip: Trip) -> None:
    """Each delivery is superseded by the next, the last has the job's end, and nothing is owed."""
    trip.kind = kind
    go(trip, ROADS[name])


@pytest.mark.parametrize(("name", "at"), LOSSES, ids=[f"{name} {at}" for name, at in LOSSES])
def test_a_loss_on_the_way_changes_nothing(name: str, at: int, trip: Trip) -> None:
    """What is owed when Redis is lost comes back, and goes on as if nothing had been."""
    go(trip, ROADS[name], lost_before=at)


@pytest.mark.skipif(VERSION_OF_RQ < (2, 8), reason="unique= came with RQ 2.8")
def test_a_unique_job_that_is_enqueued_again_after_a_loss(trip: Trip) -> None:
    """RQ takes the id again, it being lost: the newer one stays, and runs once."""
    trip.queue.enqueue(tasks.say, trip.ledger, "old", job_id="a", unique=True)
    trip.redis.flushdb()
    trip.queue.enqueue(tasks.say, trip.ledger, "new", job_id="a", unique=True)
    eventually(lambda: trip.lives() == {"a": ["superseded 1", "owed 1"]}, 20)
    work(trip)
    assert trip.said == ["new"]
    assert trip.lives() == {"a": ["superseded 1", "completed 1"]}
    trip.site.nothing_is_owed()
