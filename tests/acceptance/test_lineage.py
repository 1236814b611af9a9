"""The end of each job of RQ in the ledger, for every way into Redis, and with Redis lost in between.

A road is a way into Redis and the steps that RQ then takes. The jobs of a road must leave the
expected deliveries in this order, and nothing that is owed. The result must be the same if all of
Redis is lost before any one of the steps. The leader that restores the jobs is a process of its
own.

Each of these faults made a test fail: a retry does not mark the job as moving (the retries), nor
does a successful run (the repeats); the group or the parents are missing in the routing (losses of
these); a cancel is not recorded (the cancels); a horse reports nothing (the roads with a ttl of 0,
which leave nothing in Redis).
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
    """The way of one job through a real installation."""

    def __init__(self, site: Site, queue: Queue, guard: JobGuard, ledger: str) -> None:
        self.site, self.queue, self.guard, self.ledger = site, queue, guard, ledger
        self.kind: Any = SimpleWorker
        self.serializer: Any = None

    @property
    def redis(self) -> redis.Redis:
        """The client of the host."""
        return self.queue.connection

    @property
    def output(self) -> list[str]:
        """The words that the jobs have written, in order."""
        with open(self.ledger, encoding="utf-8") as file:
            return file.read().split()

    def job(self, job_id: str = "a") -> Job:
        """Return the job as it is in Redis now."""
        return Job.fetch(job_id, connection=self.redis, serializer=self.serializer)

    def lives(self) -> dict[str, list[str]]:
        """Return each delivery of each job: its end, its attempt, and > if the next one superseded it."""
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
        """Delete all of Redis, and wait until the owed jobs are back, as the same deliveries."""
        owed = self.site.ask("select token, recoveries from jobguard.jobs")
        self.redis.flushdb()
        eventually(lambda: all(self._is_back(token, before) for token, before in owed), 20)
        # The incident must be closed, so that the next loss is another incident.
        running = "select count(*) from jobguard.incidents where closed_at is null"
        eventually(lambda: self.site.ask(running) == [0], 20)

    def _is_back(self, token: Any, before: int) -> bool:
        now = self.site.ask("select job_id, recoveries from jobguard.jobs where token = %s", token)
        if not now:
            return True  # its end came first; the test checks later if that was right
        ((job_id, recoveries),) = now
        return bool(
            recoveries == before + 1
            and self.redis.hget(f"rq:job:{job_id}", "jg") == token.hex.encode()
        )


def work(trip: Trip, **limits: Any) -> None:
    """Run a worker until the queue is empty."""
    known = trip.redis.connection_pool.connection_kwargs
    # The worker has its own client, because RQ's worker changes the timeouts of the client that it
    # gets.
    client = redis.Redis(host=known["host"], port=known["port"], db=known["db"])
    with client:
        worker = trip.kind([QUEUE], connection=client, serializer=trip.serializer)
        worker.work(burst=True, **limits)


def work_one(trip: Trip) -> None:
    """Run one job of the queue."""
    work(trip, max_jobs=1)


def move(trip: Trip) -> None:
    """Make the scheduled jobs due, and have RQ's scheduler move them."""
    key = f"rq:scheduled:{QUEUE}"
    # If Redis was slow for a moment, the leader pushes the job, a moment later.
    ids: Any = eventually(lambda: trip.redis.zrange(key, 0, -1), 20)
    trip.redis.zadd(key, {one: time.time() - 1 for one in ids})
    scheduler: Any = RQScheduler([trip.queue], connection=trip.redis)
    scheduler.acquire_locks()
    scheduler.enqueue_scheduled_jobs()
    scheduler.release_locks()


def abandon(trip: Trip) -> None:
    """Let an unguarded worker take the job and die. RQ finds it abandoned, and the leader puts it back."""
    job = trip.job()
    trip.redis.lpop(trip.queue.key)
    trip.redis.hset(job.key, "status", "started")
    trip.redis.zadd(f"rq:wip:{QUEUE}", {f"{job.id}:dead": 1})
    trip.queue.started_job_registry.cleanup()
    eventually(lambda: trip.queue.job_ids == ["a"], 20)


def wait_for_the_leader(trip: Trip) -> None:
    """Wait until the leader has found the end by itself."""
    eventually(lambda: not trip.site.owed(), 20)


def wait_for_a_release(trip: Trip) -> None:
    """Have the leader release a child, unless RQ has released it."""
    eventually(lambda: trip.queue.job_ids or not trip.site.owed(), 20)


def enqueue_in_a_pipeline(trip: Trip) -> None:
    """Enqueue in the caller's own transaction."""
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
    """Enqueue a child of two parents."""
    for parent in "ab":
        trip.queue.enqueue(tasks.say, trip.ledger, parent, job_id=parent)
    trip.queue.enqueue(tasks.say, trip.ledger, "child", job_id="c", depends_on=["a", "b"])


def enqueue_child_of_a_failure(trip: Trip) -> None:
    """Enqueue a child that runs although its parent fails."""
    trip.queue.enqueue(tasks.fail, trip.ledger, job_id="a")
    depends = Dependency("a", allow_failure=True)
    trip.queue.enqueue(tasks.say, trip.ledger, "child", job_id="b", depends_on=depends)


def enqueue_many(trip: Trip) -> None:
    """Enqueue several jobs at once, of which one waits for another."""
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
    """Check that RQ finds the jobs of the group."""
    group: Any = Group.fetch("g", trip.redis)
    assert sorted(job.id for job in group.get_jobs()) == ["a", "b"]


def enqueue_unique(trip: Trip) -> None:
    """Enqueue one job that RQ accepts, and one that RQ refuses."""
    trip.queue.enqueue(tasks.say, trip.ledger, job_id="a", unique=True)
    refuse_unique(trip)


def refuse_unique(trip: Trip) -> None:
    """Check that RQ refuses the same id."""
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
    """Have RQ's cron enqueue a job."""
    from rq.cron import CronScheduler

    cron: Any = CronScheduler(connection=trip.redis)
    cron.register(tasks.say, QUEUE, args=(trip.ledger, "cron"), interval=3600)
    cron.enqueue_jobs()


def enqueue_with_webhook(trip: Trip) -> None:
    """Enqueue a job that calls a web server of this test when it has finished."""
    from rq.webhook import Webhook

    ledger = trip.ledger

    class Heard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            tasks.say(ledger, "webhook")
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Log nothing."""

    server = HTTPServer(("127.0.0.1", 0), Heard)
    threading.Thread(target=server.handle_request, daemon=True).start()
    hook = Webhook(f"http://127.0.0.1:{server.server_port}/", "finished")
    trip.queue.enqueue(tasks.say, trip.ledger, job_id="a", webhooks=[hook])


def serialized(serializer: Any) -> Callable[[Trip], None]:
    """Return a function that enqueues with another serializer than RQ's own."""

    def enqueue(trip: Trip) -> None:
        trip.serializer = serializer
        queue = Queue(QUEUE, connection=trip.redis, serializer=serializer)
        queue.enqueue(f"{TASKS}.say", trip.ledger, job_id="a")

    return enqueue


def plainly(task: Any = tasks.say, **options: Any) -> Callable[[Trip], None]:
    """Return a function that enqueues one job with these options."""

    def enqueue(trip: Trip) -> None:
        trip.queue.enqueue(task, trip.ledger, job_id="a", **options)

    return enqueue


ONE = {"a": ["completed 1"]}


@dataclass(frozen=True)
class Road:
    """A way into Redis, RQ's next steps, and the deliveries that the ledger must have then."""

    enqueue: Callable[[Trip], object]
    lives: Mapping[str, Sequence[str]]
    steps: tuple[Callable[[Trip], object], ...] = (work,)
    output: Sequence[str] | None = None
    losable: tuple[int, ...] | None = None
    """The steps before which everything is lost; None: each step."""
    forks: bool = False
    """True if a worker that forks has another way here."""
    since: tuple[int, int] = (2, 0)
    """The first version of RQ that has this way."""


ROADS: dict[str, Road] = {
    "enqueue": Road(plainly(), ONE, output=["ran"], forks=True),
    "a function by its name": Road(plainly(f"{TASKS}.say"), ONE, output=["ran"]),
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
        output=["c", "b", "a"],
    ),
    "meta": Road(plainly(tasks.say_meta, meta={"word": "meta"}), ONE, output=["meta"]),
    "JSON": Road(serialized(JSONSerializer), ONE, output=["ran"]),
    "a serializer of one's own": Road(serialized(tasks.Reversed), ONE, output=["ran"]),
    "callback of a success": Road(
        plainly(on_success=Callback(tasks.on_success)),
        ONE,
        output=["ran", "succeeded"],
        losable=(),
        forks=True,
    ),
    "callback of a failure": Road(
        plainly(tasks.fail, on_failure=Callback(tasks.on_failure)),
        {"a": ["failed 1"]},
        output=["ran", "failed"],
        forks=True,
    ),
    "a broken callback of a success": Road(
        plainly(on_success=Callback(tasks.broken)),
        {"a": ["failed 1"]},
        output=["ran"],
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
    "webhook": Road(
        enqueue_with_webhook, ONE, output=["ran", "webhook"], since=(2, 10), forks=True
    ),
    "result_ttl=0": Road(plainly(result_ttl=0), ONE, losable=(), forks=True),
    "failure_ttl=0": Road(plainly(tasks.fail, failure_ttl=0), {"a": ["failed 1"]}, forks=True),
    "ttl": Road(plainly(ttl=1), {"a": ["cancelled 1"]}, (wait_for_the_leader,), output=[]),
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
        output=["parent", "child"],
        forks=True,
    ),
    "two parents": Road(
        enqueue_two_parents,
        {"a": ["completed 1"], "b": ["completed 1"], "c": ["superseded 1 >", "completed 1"]},
        # If the child is lost between the ends of its parents, the leader must release it.
        (work_one, work, wait_for_a_release, work),
        output=["a", "b", "child"],
    ),
    "a parent that fails": Road(
        enqueue_child_of_a_failure,
        {"a": ["failed 1"], "b": ["superseded 1 >", "completed 1"]},
        (work_one, work),
        output=["ran", "child"],
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
    "unique": Road(enqueue_unique, ONE, (refuse_unique, work), output=["ran"], since=(2, 8)),
    "the same id twice": Road(
        enqueue_twice, {"a": ["superseded 1 >", "completed 1"]}, output=["new"], forks=True
    ),
    "rate limits": Road(
        enqueue_rate_limited,
        {one: ["completed 1"] for one in "abc"},
        (work_one, work),
        output=["a", "b", "c"],
        since=(3, 0),
        forks=True,
    ),
    "cron": Road(enqueue_by_cron, {"*": ["completed 1"]}, output=["cron"], since=(3, 0)),
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
        output=["ran"] * 3,
        forks=True,
    ),
    "retry later": Road(
        plainly(tasks.fail, retry=Retry(max=1, interval=60)),
        {"a": ["superseded 1 >", "superseded 2 >", "failed 2"]},
        (work, move, work),
        output=["ran"] * 2,
        forks=True,
    ),
    "a returned Retry": Road(
        lambda trip: trip.queue.enqueue(tasks.ask_again, trip.ledger, 1, job_id="a"),
        {"a": ["superseded 1 >", "completed 2"]},
        (work_one, work),
        output=["ran"] * 2,
        since=(2, 1),
        forks=True,
    ),
    "a returned Retry too many": Road(
        plainly(tasks.return_retry),
        {"a": ["superseded 1 >", "failed 2"]},
        (work_one, work),
        output=["ran"] * 2,
        since=(2, 1),
        forks=True,
    ),
    "requeue from the registry": Road(
        plainly(tasks.fail),
        {"a": ["failed 1", "failed 1"]},
        (work, lambda trip: FailedJobRegistry(queue=trip.queue).requeue("a"), work),
        losable=(0, 2),  # a failed job is not owed, and is lost with Redis
        output=["ran"] * 2,
    ),
    "Job.requeue": Road(
        plainly(tasks.fail),
        {"a": ["failed 1", "failed 1"]},
        (work, lambda trip: trip.job().requeue(), work),
        losable=(0, 2),
        output=["ran"] * 2,
        forks=True,
    ),
    "abandoned": Road(plainly(), ONE, (abandon, work), losable=(0,), output=["ran"]),
    "abandoned, with retries": Road(
        # The death of a worker is not a failure: the same delivery goes back, and no retry is used.
        plainly(retry=Retry(max=1)),
        ONE,
        (abandon, work),
        losable=(0,),
        output=["ran"],
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
        output=["child"],
    ),
    "delete": Road(
        plainly(), {"a": ["cancelled 1"]}, (lambda trip: trip.job().delete(), work), losable=(0,)
    ),
    "delete with dependents": Road(
        enqueue_family,
        {"a": ["cancelled 1"], "b": ["cancelled 1"]},
        (lambda trip: trip.job().delete(delete_dependents=True), work),
        output=[],
        losable=(0,),
    ),
    "Queue.empty": Road(
        plainly(),
        {"a": ["cancelled 1"]},
        (lambda trip: cast(Any, trip.queue).empty(), work),
        output=[],
        losable=(0,),
    ),
    "Queue.delete": Road(
        plainly(),
        {"a": ["cancelled 1"]},
        (lambda trip: trip.queue.delete(), work),
        output=[],
        losable=(0,),
    ),
    "Queue.delete without its jobs": Road(
        plainly(),
        {"a": ["cancelled 1"]},
        (lambda trip: trip.queue.delete(delete_jobs=False), work),
        output=[],
        losable=(0,),
    ),
    "Queue.remove": Road(
        plainly(),
        {"a": ["cancelled 1"]},
        (lambda trip: trip.queue.remove("a"), work),
        output=[],
        losable=(0,),
    ),
    "ScheduledJobRegistry.remove": Road(
        lambda trip: trip.queue.enqueue_in(timedelta(hours=1), tasks.say, trip.ledger, job_id="a"),
        {"a": ["cancelled 1"]},
        (lambda trip: trip.queue.scheduled_job_registry.remove("a"), work),
        output=[],
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
    """Give an installation with its own name, a leader, and a trusted queue."""
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
        worker.stop()  # its trust stays when the worker has left
        yield made
    finally:
        made.close()
        with made.client() as client, suppress(redis.RedisError):
            client.flushdb()
        postgres_server.drop_database(name)


@pytest.fixture
def trip(site: Site, tmp_path: Any) -> Iterator[Trip]:
    """Give a way through the installation that only this test uses."""
    ledger = tmp_path / "ledger"
    ledger.touch()
    with psycopg.connect(site.postgres) as connection:
        connection.execute("delete from jobguard.history")
    with site.producer() as (queue, guard):
        yield Trip(site, queue, guard, str(ledger))
        # Delete the rest, so that it does not disturb the next test.
        with psycopg.connect(site.postgres) as connection:
            for table in ("jobs", "running", "suspects", "outbox"):
                connection.execute(f"delete from jobguard.{table}".encode())
        queue.connection.delete(*(queue.connection.keys("rq:*") or ["nothing"]))


def go(trip: Trip, road: Road, lost_before: int | None = None) -> None:
    """Take the steps of this road, and check the deliveries at its end."""
    if road.since > VERSION_OF_RQ:
        pytest.skip(f"RQ {'.'.join(map(str, road.since))} brought it")
    road.enqueue(trip)
    # On a busy machine the leader may have to push, and a step would find no job before that.
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

    eventually(arrived)  # on a busy machine, a last report may have to be written twice
    if road.output is not None:
        assert trip.output == road.output
    trip.site.nothing_is_owed()


@pytest.mark.parametrize(("name", "kind"), RUNS, ids=[f"{name} {k.__name__}" for name, k in RUNS])
def test_every_job_ends_where_it_belongs(name: str, kind: Any, trip: Trip) -> None:
    """Each delivery is superseded by the next, the last has the job's end, and nothing is owed."""
    trip.kind = kind
    go(trip, ROADS[name])


@pytest.mark.parametrize(("name", "at"), LOSSES, ids=[f"{name} {at}" for name, at in LOSSES])
def test_a_loss_on_the_way_changes_nothing(name: str, at: int, trip: Trip) -> None:
    """Jobs that are owed when Redis is lost come back, and continue as if there had been no loss."""
    go(trip, ROADS[name], lost_before=at)


@pytest.mark.skipif(VERSION_OF_RQ < (2, 8), reason="unique= came with RQ 2.8")
def test_a_unique_job_that_is_enqueued_again_after_a_loss(trip: Trip) -> None:
    """RQ accepts the id again, since the first job is lost: the newer job stays, and runs once."""
    trip.queue.enqueue(tasks.say, trip.ledger, "old", job_id="a", unique=True)
    trip.redis.flushdb()
    trip.queue.enqueue(tasks.say, trip.ledger, "new", job_id="a", unique=True)
    eventually(lambda: trip.lives() == {"a": ["superseded 1", "owed 1"]}, 20)
    work(trip)
    assert trip.output == ["new"]
    assert trip.lives() == {"a": ["superseded 1", "completed 1"]}
    trip.site.nothing_is_owed()
