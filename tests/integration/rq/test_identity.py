"""Byte identity: what was lost comes back as it was, and runs once.

Each kind of job that RQ knows is put into an empty Redis; the whole keyspace is dumped (every key with
its type, its value and its time to live), flushed, restored from the ledger and dumped again. What
differs by design is in one table, ``BY_DESIGN``; a difference that is not there fails, and so does a
line of the table that is not needed.

Planted once, each seen to fail: no time to live, no group, one parent of several, no time to live of a
child's own set, a score two seconds later, meta or webhooks left out of the record, a slot not taken
again, or without the time at which it was, what waits for its next repeat seen as finished.
"""

from __future__ import annotations

import multiprocessing
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
from tests.support import keyspace

LATER = timedelta(hours=1)
SAY = "tests.integration.rq.tasks.say"


@dataclass
class RedisIdentityCheck:
    """Where a kind is enqueued."""

    queue: Queue
    ledger: str
    """The file that the jobs write to."""
    endpoint: str
    """Who is called here leaves a word in the ledger, too."""

    def enqueue(self, word: str = "ran", **options: Any) -> Any:
        """Enqueue a job that says a word."""
        return self.queue.enqueue(tasks.say, self.ledger, word, **options)

    def data(self, word: str, **options: Any) -> Any:
        """Return the same for enqueue_many."""
        return Queue.prepare_data(tasks.say, (self.ledger, word), **options)

    def work(self, **limits: Any) -> None:
        """Have one of RQ's own workers do what waits now."""
        queue = self.queue
        worker = SimpleWorker([queue], connection=queue.connection, serializer=queue.serializer)
        worker.work(burst=True, **limits)

    def work_until_killed(self) -> None:
        """Have a worker that is a process of its own take a job that kills it."""
        worker = multiprocessing.get_context("fork").Process(target=self._be_a_worker)
        worker.start()
        worker.join(30)
        assert worker.exitcode == -signal.SIGKILL

    def _be_a_worker(self) -> None:
        self.queue.connection.connection_pool.reset()  # the parent's sockets are the parent's
        self.work()


@dataclass(frozen=True)
class Kind:
    """One kind of job."""

    enqueue: Callable[[RedisIdentityCheck], Any]
    says: str
    """What its jobs say, in this order, once they are restored."""
    since: tuple[int, int]
    takeover: bool


KINDS: dict[str, Kind] = {}


def kind(
    says: str = "ran", *, since: tuple[int, int] = (2, 0), takeover: bool = False
) -> Callable[[Callable[[RedisIdentityCheck], Any]], None]:
    """Add a kind. ``since``: the RQ that brought it; ``takeover``: its worker is known to be dead."""

    def add(enqueue: Callable[[RedisIdentityCheck], Any]) -> None:
        KINDS[enqueue.__name__] = Kind(enqueue, says, since, takeover)

    return add


# -- one job, as it was enqueued -------------------------------------------------------------------


@kind()
def plain(place: RedisIdentityCheck) -> None:
    """As most are."""
    place.enqueue()


@kind("third second first")
def at_front(place: RedisIdentityCheck) -> None:
    """Each before those that wait."""
    place.enqueue("first")
    place.enqueue("second", at_front=True)
    place.enqueue("third", at_front=True)


@kind("ran called")
def every_option_set(place: RedisIdentityCheck) -> None:
    """All that enqueue takes."""
    place.enqueue(
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
def json_serializer(place: RedisIdentityCheck) -> None:
    """Not pickled."""
    place.queue = Queue(
        place.queue.name, connection=place.queue.connection, serializer=JSONSerializer
    )
    place.queue.enqueue(SAY, place.ledger)


@kind()
def custom_serializer(place: RedisIdentityCheck) -> None:
    """In bytes that only its own worker reads."""
    place.queue = Queue(
        place.queue.name, connection=place.queue.connection, serializer=tasks.Backwards
    )
    place.queue.enqueue(tasks.say, place.ledger)


@kind()
def string_function(place: RedisIdentityCheck) -> None:
    """A function that the producer could not import."""
    place.queue.enqueue(SAY, place.ledger)


@kind("\xff\x00é")
def any_bytes(place: RedisIdentityCheck) -> None:
    """Arguments that are no text."""
    place.enqueue("\xff\x00é")


@kind()
def meta(place: RedisIdentityCheck) -> None:
    """What the application notes on a job."""
    place.enqueue(meta={"bytes": b"\x00\xff", "more": {"é": [1, None]}})


@kind("second")
def same_id_twice(place: RedisIdentityCheck) -> None:
    """RQ keeps one body per id: the second."""
    place.enqueue("first", job_id="same")
    place.queue.connection.lrem(place.queue.key, 1, "same")
    place.enqueue("second", job_id="same")


@kind(since=(2, 8))
def unique(place: RedisIdentityCheck) -> None:
    """An id that may stand once."""
    place.enqueue(job_id="unique", unique=True)


# -- what happens afterwards -----------------------------------------------------------------------


@kind("ran called")
def success_callback(place: RedisIdentityCheck) -> None:
    """Called when it has returned."""
    place.enqueue(on_success=Callback(tasks.call_back))


@kind("ran called")
def failure_callback(place: RedisIdentityCheck) -> None:
    """Called when it has raised."""
    place.queue.enqueue(tasks.fail, place.ledger, on_failure=Callback(tasks.call_back))


@kind()
def stopped_callback(place: RedisIdentityCheck) -> None:
    """Called if somebody stops it."""
    place.enqueue(on_stopped=Callback(tasks.call_back))


@kind("ran posted", since=(2, 10))
def webhooks(place: RedisIdentityCheck) -> None:
    """Somebody is told over HTTP."""
    reported: dict[str, Any] = {"method": "POST", "headers": {"X-Of": "ours"}, "timeout": 5}
    place.enqueue(
        webhooks=[
            rq.Webhook(place.endpoint, "finished", **reported),
            rq.Webhook(place.endpoint, "failed"),
        ]
    )


@kind()
def ttl(place: RedisIdentityCheck) -> None:
    """Dropped, if it waits for longer."""
    place.enqueue(ttl=300)


@kind()
def result_ttl_zero(place: RedisIdentityCheck) -> None:
    """Leaves nothing."""
    place.enqueue(result_ttl=0)


@kind()
def failure_ttl(place: RedisIdentityCheck) -> None:
    """Remembered for half a minute, if it fails."""
    place.queue.enqueue(tasks.fail, place.ledger, failure_ttl=30)


# -- later -----------------------------------------------------------------------------------------


@kind("late")
def enqueue_at(place: RedisIdentityCheck) -> None:
    """At a time, that has passed while nobody looked."""
    place.queue.enqueue_at(datetime.now(UTC) - LATER, tasks.say, place.ledger, "late")


@kind()
def enqueue_in(place: RedisIdentityCheck) -> None:
    """In an hour."""
    place.queue.enqueue_in(LATER, tasks.say, place.ledger, ttl=7200)


# -- families --------------------------------------------------------------------------------------


@kind("parent child")
def deferred_child(place: RedisIdentityCheck) -> None:
    """After its parent."""
    place.enqueue("child", depends_on=place.enqueue("parent"), ttl=300)


@kind("ran child grandchild")
def grandchild_with_allow_failure(place: RedisIdentityCheck) -> None:
    """After parents that may fail."""
    parent = place.queue.enqueue(tasks.fail, place.ledger)
    child = place.enqueue("child", depends_on=Dependency([parent], allow_failure=True))
    place.enqueue(
        "grandchild", depends_on=Dependency([child], allow_failure=True, enqueue_at_front=True)
    )


@kind("one two three last")
def several_dependencies(place: RedisIdentityCheck) -> None:
    """After all of three."""
    parents = [place.enqueue(word) for word in ("one", "two", "three")]
    place.enqueue("last", depends_on=parents)


@kind("front parent free child")
def enqueue_many_with_dependencies(place: RedisIdentityCheck) -> None:
    """In one call, some after others."""
    parent = place.enqueue("parent")
    place.queue.enqueue_many(
        [
            place.data("front", at_front=True),
            place.data("child", depends_on=parent),
            place.data("free", meta={"a": 1}),
        ]
    )


@kind("0 1 2")
def group(place: RedisIdentityCheck) -> None:
    """A group of three."""
    made = Group.create(connection=place.queue.connection, name="group")
    made.enqueue_many(place.queue, [place.data(str(n)) for n in range(3)])


# -- again -----------------------------------------------------------------------------------------


@kind("ran ran ran")
def retry_at_once(place: RedisIdentityCheck) -> None:
    """Tried three times."""
    place.queue.enqueue(tasks.fail, place.ledger, retry=Retry(max=2))


@kind("ran ran ran")
def retry_with_intervals(place: RedisIdentityCheck) -> None:
    """Tried three times, with pauses."""
    place.queue.enqueue(tasks.fail, place.ledger, retry=Retry(max=2, interval=[60, 120]))


@kind("ran ran")
def retry_at_once_after_a_failure(place: RedisIdentityCheck) -> None:
    """Failed once, waits again."""
    place.queue.enqueue(tasks.fail, place.ledger, retry=Retry(max=2))
    place.work(max_jobs=1)


@kind("ran ran")
def retry_with_intervals_after_a_failure(place: RedisIdentityCheck) -> None:
    """Failed once, in its pause."""
    place.queue.enqueue(tasks.fail, place.ledger, retry=Retry(max=2, interval=[60, 120]))
    place.work()


@kind("ran ran", since=(2, 3))
def repeat_after_its_first_run(place: RedisIdentityCheck) -> None:
    """Ran once, waits for the second of three."""
    place.enqueue(repeat=rq.Repeat(times=2, interval=[60, 120]))
    place.work()


# -- rate limits -----------------------------------------------------------------------------------


def rate_limit() -> Any:
    """Return a limit of one at a time."""
    from rq.rate_limit import RateLimit

    return RateLimit("key", concurrency=1)


@kind("0 1 2", since=(3, 0))
def rate_limited(place: RedisIdentityCheck) -> None:
    """The first holds the slot, the others wait for it."""
    for n in range(3):
        place.enqueue(str(n), job_id=str(n), rate_limit=rate_limit())  # one second: by id


@kind("ran", since=(3, 0), takeover=True)
def rate_limited_holder_that_ran(place: RedisIdentityCheck) -> None:
    """Its worker was killed, and held the slot."""
    place.queue.enqueue(tasks.die_once, place.ledger, rate_limit=rate_limit(), result_ttl=60)
    place.work_until_killed()


# -- running ---------------------------------------------------------------------------------------


@kind("ran", takeover=True)
def started(place: RedisIdentityCheck) -> None:
    """Its worker was killed in the middle of it."""
    place.queue.enqueue(tasks.die_once, place.ledger, ttl=300)
    place.work_until_killed()


# -- the comparison --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """One line of the table: what differs, for which kinds, and why that is right."""

    what: tuple[str, ...]
    """Patterns of ``key``, ``key/field``, ``key@ttl``, ``key@type``; with " gone" or " new" behind it."""
    why: str
    kinds: tuple[str, ...]
    before: tuple[int, int] = (99, 0)
    """Only with an RQ older than this."""


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
        "the result of a run that ended has been told",
        ("repeat_after_its_first_run",),
    ),
    Difference(
        ("rq:execution:* gone", "rq:executions:* gone", "rq:wip:* gone"),
        "nobody runs it any more",
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
        "what was started waits again, as it was recorded",
        KILLED,
    ),
    Difference(
        ("rq:job:*@ttl",), "its time to live, which its start had stopped, runs again", ("started",)
    ),
    Difference(
        ("rq:job:*/enqueued_at",),
        "a slot of a rate limit that was lost is taken again, and that is when it was enqueued",
        ("rate_limited", "rate_limited_holder_that_ran"),
    ),
    Difference(
        ("rq:job:*/status",),
        "RQ calls finished what waits for its next repeat; restored, it is scheduled",
        ("repeat_after_its_first_run",),
        before=(2, 7),
    ),
)
"""Our token is none of them: a restore is the same delivery, and carries the same one."""

HOUSEKEEPING = ("jobguard:*", "rq:clean_*")
"""Ours, and what says when RQ has tidied up."""
IN_PLACE = {Presence.WAITING, Presence.SCHEDULED}
WITHIN_A_SECOND = ("rq:deferred:*", "rq:rl:*:rate_limited")
"""Scores that are the second of the push, read once by RQ and once by us."""
TAKEN_AGAIN = ("rq:rl:*:allowed",)
"""Scores that are the second in which a slot was taken."""


def dump(client: redis.Redis) -> dict[str, Any]:
    """Return all that is in a Redis but ours: by key, and of hashes by field, with times to live."""
    reported: dict[str, Any] = {}
    asked: Any = client
    for key, value in keyspace(client).items():
        if matches(key, *HOUSEKEEPING):
            continue
        reported[f"{key}@ttl"] = deadline(client, key)
        reported[f"{key}@type"] = kind = asked.type(key)
        if isinstance(value, dict) and kind == b"hash":
            reported |= {f"{key}/{name.decode()}": field for name, field in value.items()}
        else:
            reported[key] = value
    return reported


def deadline(client: redis.Redis, key: str) -> int:
    """Return when a key will be gone, in milliseconds of Redis' clock; -1: never."""
    with client.pipeline() as pipe:
        pipe.time()
        pipe.pttl(key)
        (seconds, micros), left = pipe.execute()
    return -1 if left < 0 else seconds * 1000 + micros // 1000 + left


def differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what is not the same: times to live, and what is a second's number, within a second."""
    differ = {}
    for name in sorted(before.keys() | after.keys()):
        one, other = before.get(name), after.get(name)
        if not same(name, one, other):
            how = " gone" if other is None else " new" if one is None else ""
            differ[name + how] = (one, other)
    return differ


def same(name: str, one: Any, other: Any) -> bool:
    """Whether these two are the same."""
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
    """Whether one of the patterns fits."""
    return any(fnmatch(name, pattern) for pattern in patterns)


@pytest.fixture
def endpoint(ledger: Path) -> Iterator[str]:
    """Give the URL of a server that notes in the ledger who calls it."""

    class Called(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            """Note it."""
            tasks.say(str(ledger), "posted")
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Be quiet."""

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
    """Nothing that RQ reads differs, and the restored jobs run as they would have, each once."""
    chosen = KINDS[name]
    if chosen.since > VERSION_OF_RQ:
        pytest.skip(f"RQ {chosen.since[0]}.{chosen.since[1]} brought it")
    place = RedisIdentityCheck(queue, str(ledger), endpoint)
    chosen.enqueue(place)
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

    place.work()
    while scheduled := queue.scheduled_job_registry.get_job_ids():
        client.zadd(f"rq:scheduled:{queue.name}", dict.fromkeys(scheduled, time.time() - 1))
        move_scheduled(queue)
        place.work()
    assert ledger.read_text().split() == chosen.says.split()
    assert not tracker.owed
