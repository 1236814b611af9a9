"""Byte identity: a lost job is restored with the same bytes, and runs once.

Each kind of job of RQ is enqueued into an empty Redis. The test dumps the whole keyspace (every key
with its type, value and time to live), flushes it, restores it from the ledger and dumps it again. The
table ``BY_DESIGN`` lists the intended differences. Every other difference fails the test, and so does
a line of the table that is not needed.

Faults that these tests were seen to catch: no time to live; no group; one parent of several; no time
to live of a child's own set; a score two seconds later; meta or webhooks left out of the record; a
slot that is not taken again, or is taken without its time; a job that waits for its next repeat and
is seen as finished.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import chain
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import redis
import rq
from rq import Callback, Queue, Retry, SimpleWorker
from rq.group import Group
from rq.job import Dependency
from rq.serializers import JSONSerializer

from jobguard.adapters.rq.broker import RQBroker
from jobguard.model import Presence, Restored
from tests.fakes.adapters import FakeTracker, lost, observe, restore
from tests.integration.rq import tasks
from tests.integration.rq.scheduler import move_scheduled
from tests.integration.rq.versions import VERSION_OF_RQ
from tests.support import ended_fork, keyspace

LATER = timedelta(hours=1)
SAY = "tests.integration.rq.tasks.say"


@dataclass
class Bench:
    """The queue, the ledger and the endpoint for the jobs of one kind."""

    queue: Queue
    ledger: str
    """The file that the jobs write to."""
    endpoint: str
    """The URL of a server that also writes to the ledger when it is called."""

    def enqueue(self, word: str = "ran", **options: Any) -> Any:
        """Enqueue a job that writes a word."""
        return self.queue.enqueue(tasks.say, self.ledger, word, **options)

    def data(self, word: str, **options: Any) -> Any:
        """Return the data of such a job for enqueue_many."""
        return Queue.prepare_data(tasks.say, (self.ledger, word), **options)

    def work(self, **limits: Any) -> None:
        """Run the waiting jobs with one of RQ's own workers."""
        queue = self.queue
        worker = SimpleWorker([queue], connection=queue.connection, serializer=queue.serializer)
        worker.work(burst=True, **limits)

    def work_until_killed(self) -> None:
        """Start a worker in a separate process, and let it take a job that kills it."""
        assert ended_fork(self._be_a_worker).exitcode == -signal.SIGKILL

    def _be_a_worker(self) -> None:
        self.queue.connection.connection_pool.reset()  # do not use the sockets of the parent
        self.work()


@dataclass(frozen=True)
class Kind:
    """One kind of job."""

    enqueue: Callable[[Bench], Any]
    words: str
    """The words that its jobs write after the restore, in this order."""
    since: tuple[int, int]
    takeover: bool


KINDS: dict[str, Kind] = {}


def kind(
    words: str = "ran", *, since: tuple[int, int] = (2, 0), takeover: bool = False
) -> Callable[[Callable[[Bench], Any]], None]:
    """Add a kind. ``since``: the first RQ with it; ``takeover``: its worker is known to be dead."""

    def add(enqueue: Callable[[Bench], Any]) -> None:
        KINDS[enqueue.__name__] = Kind(enqueue, words, since, takeover)

    return add


# -- one job, right after its enqueue --------------------------------------------------------------


@kind()
def plain(bench: Bench) -> None:
    """A job without options."""
    bench.enqueue()


@kind("third second first")
def at_front(bench: Bench) -> None:
    """Jobs that are pushed to the front of the queue."""
    bench.enqueue("first")
    bench.enqueue("second", at_front=True)
    bench.enqueue("third", at_front=True)


@kind("ran called")
def every_option_set(bench: Bench) -> None:
    """A job with every option of enqueue."""
    bench.enqueue(
        job_timeout=77,
        result_ttl=10,
        ttl=500,
        failure_ttl=20,
        description="the daily report (é)",
        job_id="every-option",
        at_front=True,
        meta={"some": "meta"},
        retry=Retry(max=3, interval=[1, 2, 3]),
        on_success=Callback(tasks.call_back, timeout=5),
        on_failure=Callback(tasks.call_back, timeout=6),
        on_stopped=Callback(tasks.call_back, timeout=7),
    )


@kind()
def json_serializer(bench: Bench) -> None:
    """A job that is serialized as JSON."""
    bench.queue = Queue(
        bench.queue.name, connection=bench.queue.connection, serializer=JSONSerializer
    )
    bench.queue.enqueue(SAY, bench.ledger)


@kind()
def custom_serializer(bench: Bench) -> None:
    """A job in a format that only its own worker reads."""
    bench.queue = Queue(
        bench.queue.name, connection=bench.queue.connection, serializer=tasks.Backwards
    )
    bench.queue.enqueue(tasks.say, bench.ledger)


@kind()
def string_function(bench: Bench) -> None:
    """A job with the name of a function that the producer cannot import."""
    bench.queue.enqueue(SAY, bench.ledger)


@kind("\xff\x00é")
def any_bytes(bench: Bench) -> None:
    """A job with binary arguments."""
    bench.enqueue("\xff\x00é")


@kind()
def meta(bench: Bench) -> None:
    """A job with meta of the application."""
    bench.enqueue(meta={"bytes": b"\x00\xff", "more": {"é": [1, None]}})


@kind("second")
def same_id_twice(bench: Bench) -> None:
    """One id enqueued twice: RQ keeps the second hash."""
    bench.enqueue("first", job_id="same")
    bench.queue.connection.lrem(bench.queue.key, 1, "same")
    bench.enqueue("second", job_id="same")


@kind(since=(2, 8))
def unique(bench: Bench) -> None:
    """A job with a unique id."""
    bench.enqueue(job_id="unique", unique=True)


# -- after the end of a job ------------------------------------------------------------------------


@kind("ran called")
def success_callback(bench: Bench) -> None:
    """A job with a callback for its success."""
    bench.enqueue(on_success=Callback(tasks.call_back))


@kind("ran called")
def failure_callback(bench: Bench) -> None:
    """A job with a callback for its failure."""
    bench.queue.enqueue(tasks.fail, bench.ledger, on_failure=Callback(tasks.call_back))


@kind()
def stopped_callback(bench: Bench) -> None:
    """A job with a callback for a stop."""
    bench.enqueue(on_stopped=Callback(tasks.call_back))


@kind("ran posted", since=(2, 10))
def webhooks(bench: Bench) -> None:
    """A job that reports its end over HTTP."""
    options: dict[str, Any] = {"method": "POST", "headers": {"X-Of": "ours"}, "timeout": 5}
    bench.enqueue(
        webhooks=[
            rq.Webhook(bench.endpoint, "finished", **options),
            rq.Webhook(bench.endpoint, "failed"),
        ]
    )


@kind()
def ttl(bench: Bench) -> None:
    """A job that RQ drops if it waits for too long."""
    bench.enqueue(ttl=300)


@kind()
def result_ttl_zero(bench: Bench) -> None:
    """A job whose result is not kept."""
    bench.enqueue(result_ttl=0)


@kind()
def failure_ttl(bench: Bench) -> None:
    """A job that is kept for half a minute if it fails."""
    bench.queue.enqueue(tasks.fail, bench.ledger, failure_ttl=30)


# -- later -----------------------------------------------------------------------------------------


@kind("late")
def enqueue_at(bench: Bench) -> None:
    """A scheduled job whose time has passed without a scheduler."""
    bench.queue.enqueue_at(datetime.now(UTC) - LATER, tasks.say, bench.ledger, "late")


@kind()
def enqueue_in(bench: Bench) -> None:
    """A job that is scheduled in an hour."""
    bench.queue.enqueue_in(LATER, tasks.say, bench.ledger, ttl=7200)


# -- dependents ------------------------------------------------------------------------------------


@kind("parent child")
def deferred_child(bench: Bench) -> None:
    """A job that waits for its parent."""
    bench.enqueue("child", depends_on=bench.enqueue("parent"), ttl=300)


@kind("ran child grandchild")
def grandchild_with_allow_failure(bench: Bench) -> None:
    """Jobs that wait for parents that may fail."""
    parent = bench.queue.enqueue(tasks.fail, bench.ledger)
    child = bench.enqueue("child", depends_on=Dependency([parent], allow_failure=True))
    bench.enqueue(
        "grandchild", depends_on=Dependency([child], allow_failure=True, enqueue_at_front=True)
    )


@kind("one two three last")
def several_dependencies(bench: Bench) -> None:
    """A job that waits for three parents."""
    parents = [bench.enqueue(word) for word in ("one", "two", "three")]
    bench.enqueue("last", depends_on=parents)


@kind("front parent free child")
def enqueue_many_with_dependencies(bench: Bench) -> None:
    """Jobs of one call, some of which wait for others."""
    parent = bench.enqueue("parent")
    bench.queue.enqueue_many(
        [
            bench.data("front", at_front=True),
            bench.data("child", depends_on=parent),
            bench.data("free", meta={"a": 1}),
        ]
    )


@kind("0 1 2")
def group(bench: Bench) -> None:
    """A group of three."""
    made = Group.create(connection=bench.queue.connection, name="group")
    made.enqueue_many(bench.queue, [bench.data(str(n)) for n in range(3)])


# -- retries ---------------------------------------------------------------------------------------


@kind("ran ran ran")
def retry_at_once(bench: Bench) -> None:
    """A job with three retries."""
    bench.queue.enqueue(tasks.fail, bench.ledger, retry=Retry(max=2))


@kind("ran ran ran")
def retry_with_intervals(bench: Bench) -> None:
    """A job with three retries and pauses between them."""
    bench.queue.enqueue(tasks.fail, bench.ledger, retry=Retry(max=2, interval=[60, 120]))


@kind("ran ran")
def retry_at_once_after_a_failure(bench: Bench) -> None:
    """A job that failed once and waits again."""
    bench.queue.enqueue(tasks.fail, bench.ledger, retry=Retry(max=2))
    bench.work(max_jobs=1)


@kind("ran ran")
def retry_with_intervals_after_a_failure(bench: Bench) -> None:
    """A job that failed once and is in its pause."""
    bench.queue.enqueue(tasks.fail, bench.ledger, retry=Retry(max=2, interval=[60, 120]))
    bench.work()


@kind("ran ran", since=(2, 3))
def repeat_after_its_first_run(bench: Bench) -> None:
    """A job that ran once and waits for the second of three runs."""
    bench.enqueue(repeat=rq.Repeat(times=2, interval=[60, 120]))
    bench.work()


# -- rate limits -----------------------------------------------------------------------------------


def rate_limit() -> Any:
    """Return a limit of one at a time."""
    from rq.rate_limit import RateLimit

    return RateLimit("key", concurrency=1)


@kind("0 1 2", since=(3, 0))
def rate_limited(bench: Bench) -> None:
    """Jobs with a rate limit: the first has the slot, and the others wait for it."""
    for n in range(3):
        bench.enqueue(str(n), job_id=str(n), rate_limit=rate_limit())  # by id within a second


@kind("ran", since=(3, 0), takeover=True)
def rate_limited_holder_that_ran(bench: Bench) -> None:
    """A job whose worker was killed while the job had the slot."""
    bench.queue.enqueue(tasks.die_once, bench.ledger, rate_limit=rate_limit(), result_ttl=60)
    bench.work_until_killed()


# -- running ---------------------------------------------------------------------------------------


@kind("ran", takeover=True)
def started(bench: Bench) -> None:
    """A job whose worker was killed during the run."""
    bench.queue.enqueue(tasks.die_once, bench.ledger, ttl=300)
    bench.work_until_killed()


# -- the comparison --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """One line of the table: an intended difference, its kinds, and its reason."""

    what: tuple[str, ...]
    """Patterns of ``key``, ``key/field``, ``key@ttl``, ``key@type``; with the suffix " gone" or " new"."""
    why: str
    kinds: tuple[str, ...]
    before: tuple[int, int] = (99, 0)
    """The line applies only to RQ before this version."""


KILLED = ("started", "rate_limited_holder_that_ran")
RAN = (
    *KILLED,
    "retry_at_once_after_a_failure",
    "retry_with_intervals_after_a_failure",
    "repeat_after_its_first_run",
)
BY_DESIGN = (
    Difference(("rq:worker* gone",), "a worker registers itself, and is no job", RAN),
    Difference(
        ("rq:finished:* gone", "rq:results:* gone"),
        "the result of a run that ended was reported",
        ("repeat_after_its_first_run",),
    ),
    Difference(
        ("rq:execution:* gone", "rq:executions:* gone", "rq:wip:* gone"),
        "no worker runs it any more",
        KILLED,
    ),
    Difference(
        (
            "rq:job:*/started_at",
            "rq:job:*/last_heartbeat",
            "rq:job:*/worker_name",
            "rq:job:*/status",
            "rq:queue:* new",
        ),
        "a job that was started waits again, as it was recorded",
        KILLED,
    ),
    Difference(
        ("rq:job:*@ttl",), "its time to live, which its start had stopped, runs again", ("started",)
    ),
    Difference(
        ("rq:job:*/enqueued_at",),
        "a lost slot of a rate limit is taken again, and RQ's time of the enqueue is that moment",
        ("rate_limited", "rate_limited_holder_that_ran"),
    ),
    Difference(
        ("rq:job:*/status",),
        'RQ sets "finished" on a job that waits for its next repeat; a restore sets "scheduled"',
        ("repeat_after_its_first_run",),
        before=(2, 7),
    ),
)
"""The token is not in this table: a restore is the same delivery, and has the same token."""

HOUSEKEEPING = ("jobguard:*", "rq:clean_*")
"""The keys of jobguard, and the times of RQ's own maintenance."""
IN_PLACE = {Presence.WAITING, Presence.SCHEDULED}
WITHIN_A_SECOND = ("rq:deferred:*", "rq:rl:*:rate_limited")
"""Scores that are the second of the push. RQ and jobguard each read the clock once."""
TAKEN_AGAIN = ("rq:rl:*:allowed",)
"""Scores that are the second when a slot was taken."""


def dump(client: redis.Redis) -> dict[str, Any]:
    """Return all data of a Redis without jobguard's: by key, by field for hashes, with times to live."""
    found: dict[str, Any] = {}
    asked: Any = client
    for key, value in keyspace(client).items():
        if matches(key, *HOUSEKEEPING):
            continue
        found[f"{key}@ttl"] = deadline(client, key)
        found[f"{key}@type"] = kind = asked.type(key)
        if isinstance(value, dict) and kind == b"hash":
            found |= {f"{key}/{name.decode()}": field for name, field in value.items()}
        else:
            found[key] = value
    return found


def deadline(client: redis.Redis, key: str) -> int:
    """Return the time when a key expires, in milliseconds of Redis' clock; -1: never."""
    with client.pipeline() as pipe:
        pipe.time()
        pipe.pttl(key)
        (seconds, micros), left = pipe.execute()
    return -1 if left < 0 else seconds * 1000 + micros // 1000 + left


def differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the differences; times to live and scores in seconds may differ by one second."""
    differ = {}
    for name in sorted(before.keys() | after.keys()):
        one, other = before.get(name), after.get(name)
        if not same(name, one, other):
            how = " gone" if other is None else " new" if one is None else ""
            differ[name + how] = (one, other)
    return differ


def same(name: str, one: Any, other: Any) -> bool:
    """Return True if these two values are the same."""
    if one is None or other is None:
        return one is other
    if name.endswith("@ttl"):
        return bool((one < 0) == (other < 0) and abs(one - other) <= 1000)
    if matches(name, *TAKEN_AGAIN):
        return bool(one.keys() == other.keys())
    if isinstance(one, dict) and matches(name, *WITHIN_A_SECOND):
        return one.keys() == other.keys() and all(
            one[m] == other[m] or abs(one[m] - other[m]) <= 1 for m in one
        )
    return bool(one == other)


def matches(name: str, *patterns: str) -> bool:
    """Return True if one of the patterns matches."""
    return any(fnmatch(name, pattern) for pattern in patterns)


@pytest.fixture
def endpoint(ledger: Path) -> Iterator[str]:
    """Return the URL of a server that writes each call to the ledger."""

    class Called(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            """Write the call to the ledger."""
            tasks.say(str(ledger), "posted")
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Log nothing."""

    with HTTPServer(("127.0.0.1", 0), Called) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", KINDS)
def test_kind(
    name: str,
    queue: Queue,
    tracker: FakeTracker,
    broker: RQBroker,
    client: redis.Redis,
    ledger: Path,
    endpoint: str,
) -> None:
    """After a restore, RQ's data is the same, and each restored job runs once, as without the loss."""
    chosen = KINDS[name]
    if chosen.since > VERSION_OF_RQ:
        pytest.skip(f"needs RQ {chosen.since[0]}.{chosen.since[1]}")
    bench = Bench(queue, str(ledger), endpoint)
    chosen.enqueue(bench)
    owed = list(tracker.owed.values())
    if not chosen.takeover:
        assert {observe(broker, one).presence for one in owed} <= IN_PLACE
    before = dump(client)
    client.flushdb()
    ledger.write_text("")
    deliveries = [lost(one, takeover=chosen.takeover) for one in owed]
    assert set(restore(broker, *deliveries)) == {Restored.RESTORED}
    after = dump(client)
    assert {observe(broker, one).presence for one in owed} <= IN_PLACE
    assert set(restore(broker, *deliveries)) == {Restored.PRESENT}
    assert not differences(after, dump(client)), "the second time it does nothing"

    differ = differences(before, after)
    by_design = [d.what for d in BY_DESIGN if name in d.kinds and d.before > VERSION_OF_RQ]
    unexpected = {d: v for d, v in differ.items() if not matches(d, *chain(*by_design))}
    assert not unexpected
    assert all(any(matches(d, *what) for d in differ) for what in by_design), "a line too many"

    bench.work()
    while scheduled := queue.scheduled_job_registry.get_job_ids():
        client.zadd(f"rq:scheduled:{queue.name}", dict.fromkeys(scheduled, time.time() - 1))
        move_scheduled(queue)
        bench.work()
    assert ledger.read_text().split() == chosen.words.split()
    assert not tracker.owed
