from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fakeredis
import pytest
import redis
import rq.worker
from rq import Queue
from rq.job import Job
from rq.registry import FailedJobRegistry, ScheduledJobRegistry

from jobguard.adapter import Source
from jobguard.adapters.rq import RQAdapter, lookup, patches
from jobguard.adapters.rq.adapter import AllQueues
from jobguard.adapters.rq.layout import Layout
from jobguard.errors import UnsupportedTarget
from jobguard.guard import guard, known_guards

CLASSES = [
    Queue,
    Job,
    FailedJobRegistry,
    ScheduledJobRegistry,
    *rq.worker.SimpleWorker.__mro__,
    rq.worker.Worker,
]


@pytest.fixture
def client() -> redis.Redis:
    """Return a client that is never connected."""
    return redis.Redis(host="LOCALHOST", port=6390, db=3)


@pytest.fixture
def bare() -> Iterator[None]:
    """Remove the hooks of every holder."""
    holders = set(patches._holders)
    for holder in holders:
        patches.uninstall(holder)
    yield
    for holder in holders:
        patches.install(holder)


def snapshot() -> list[dict[str, Any]]:
    """Return the attributes of RQ's classes."""
    return [dict(kind.__dict__) for kind in CLASSES if kind is not object]


def test_installing_and_removing_are_mirror_images(bare: None) -> None:
    """After the last guard is removed, RQ's classes have exactly their old attributes."""
    before = snapshot()
    patches.install("a")
    patches.install("a")
    patches.install("b")
    hooked = snapshot()
    assert hooked != before

    patches.uninstall("a")
    assert snapshot() == hooked
    patches.uninstall("b")
    assert snapshot() == before


def test_hooks_keep_name_and_signature(bare: None) -> None:
    """A hooked method keeps its name and its signature."""
    import inspect

    before = {
        (owner, name): inspect.signature(getattr(owner, name)) for owner, name, _ in patches._plan()
    }
    patches.install("a")
    try:
        for (owner, name), signature in before.items():
            hook = owner.__dict__[name]
            assert hook.__name__ == name
            assert inspect.signature(hook) == signature
    finally:
        patches.uninstall("a")


def test_an_unknown_rq_is_left_alone(bare: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """If one method is missing or has other arguments, nothing is hooked."""

    def retry(self: Job, other: object) -> None:
        """Have other arguments than RQ's method."""

    with monkeypatch.context() as other:
        other.setattr(Job, "retry", retry)
        before = snapshot()
        with pytest.raises(UnsupportedTarget, match=r"Job\.retry\(self, queue, pipeline"):
            patches.install("a")

        assert snapshot() == before


def test_what_others_put_over_ours_stays(bare: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """If another tool wraps a hooked method, removing the hooks keeps that wrapper in place."""
    original = Job.__dict__["save"]
    patches.install("a")

    def over(self: Job, *args: Any, **kwargs: Any) -> None:
        """Wrap the method as another tool does."""

    Job.save = over  # type: ignore[method-assign]
    try:
        patches.uninstall("a")
        assert Job.__dict__["save"] is over
    finally:
        Job.save = original  # type: ignore[method-assign]


class TestSources:
    """The source and the queues of a guarded target."""

    def test_queue(self, client: redis.Redis) -> None:
        """A queue means this queue on its Redis."""
        guarded = RQAdapter().sources(Queue("q", connection=client), namespace="n", name=None)

        assert guarded is not None
        assert guarded.source == Source("n", "rq", "localhost:6390/3", "rq")
        assert guarded.queues == frozenset(["q"])
        assert guarded.inert is None
        assert guarded.client is not None
        own = guarded.client()
        assert own.connection_pool.connection_kwargs["socket_timeout"] <= 5

    def test_list(self, client: redis.Redis) -> None:
        """A list of queues means all of them."""
        queues = [Queue("a", connection=client), Queue("b", connection=client)]
        guarded = RQAdapter().sources(queues, namespace="n", name="named")

        assert guarded is not None
        assert guarded.queues == frozenset(["a", "b"])
        assert guarded.source.name == "named"

    def test_redis(self, client: redis.Redis) -> None:
        """A Redis means every RQ queue on it."""
        guarded = RQAdapter().sources(client, namespace="n", name=None)

        assert guarded is not None
        assert guarded.queues is None

    def test_two_servers(self, client: redis.Redis) -> None:
        """Queues on two servers need two guards."""
        queues = [Queue("a", connection=client), Queue("b", connection=redis.Redis(port=1))]

        with pytest.raises(UnsupportedTarget, match="once for each"):
            RQAdapter().sources(queues, namespace="n", name=None)

    def test_decode_responses(self) -> None:
        """A client that RQ's own workers cannot use is an error at once; the error names the next step."""
        queue = Queue("q", connection=redis.Redis(decode_responses=True))

        with pytest.raises(UnsupportedTarget, match="without it"):
            RQAdapter().sources(queue, namespace="n", name=None)

    @pytest.mark.parametrize("target", [None, "redis://", object(), [], {}, [1]])
    def test_not_ours(self, target: object) -> None:
        """Every other target belongs to another adapter."""
        assert RQAdapter().sources(target, namespace="n", name=None) is None

    def test_test_double(self) -> None:
        """On fakeredis there is nothing to guard, and no connection is made."""
        fake = fakeredis.FakeRedis()
        for target in (fake, Queue("q", connection=fake)):
            guarded = RQAdapter().sources(target, namespace="n", name=None)
            assert guarded is not None
            assert guarded.inert
            assert guarded.client is None

    def test_eager(self, client: redis.Redis) -> None:
        """A queue that runs its jobs at once stores nothing that can be lost."""
        queue = Queue("q", connection=client, is_async=False)
        guarded = RQAdapter().sources(queue, namespace="n", name=None)

        assert guarded is not None
        assert guarded.inert


def test_a_reconciler_needs_no_rq() -> None:
    """The adapter can be imported and returns its broker without RQ installed."""
    code = (
        "import sys; sys.modules['rq'] = None\n"
        "import redis\n"
        "from jobguard.adapter import Source\n"
        "from jobguard.adapters.rq import RQAdapter\n"
        "RQAdapter().broker(Source('n', 'rq', 'a', 'rq'), redis.Redis())\n"
    )
    root = str(Path(__file__).parents[3])
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=120)


@pytest.mark.parametrize("layout", [Layout(), Layout("a:b", "x:", "y:", "z")])
def test_a_layout_is_its_prefix(layout: Layout) -> None:
    """The prefix of a source determines all keys."""
    assert Layout.parse(str(layout)) == layout


def test_a_usual_layout_is_one_word() -> None:
    """The prefix of RQ's own layout is the value of RQ_KEY_PREFIX."""
    assert str(Layout.parse("{rq}")) == "{rq}"
    assert Layout.parse("").job("1") == "rq:job:1"


def test_a_worker_class_guards_a_process_that_uses_no_name_of_the_package() -> None:
    """The import of our worker class is enough: the tracker is made from the environment."""
    program = (
        "from jobguard.adapters.rq import Worker; import redis, sys;"
        "from jobguard.registry import tracker_for_worker;"
        "assert 'jobguard.guard' not in sys.modules;"
        "print(tracker_for_worker(redis.Redis(port=1)).source.library)"
    )
    environ = {**os.environ, "JOBGUARD_POSTGRES_URL": "postgresql://127.0.0.1:1/none"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["rq"], done.stderr


class OwnJob(Job):
    """A job with keys of its own."""

    redis_job_namespace_prefix = "own:job:"


class OwnQueue(Queue):
    """A queue with keys of its own."""

    job_class = OwnJob
    redis_queue_namespace_prefix = "own:queue:"
    redis_queues_keys = "own:queues"


class OwnKeys(Queue):
    """A queue with keys of its own that leaves the class of its jobs to the command line."""

    redis_queue_namespace_prefix = "own:queue:"
    redis_queues_keys = "own:queues"


@pytest.fixture
def by_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give the process a Postgres by its environment, and no tracker yet."""
    monkeypatch.setenv("JOBGUARD_POSTGRES_URL", "postgresql://127.0.0.1:1/none")
    yield
    for made in known_guards():
        made.close()


@pytest.mark.parametrize("queue_class", [OwnQueue, OwnKeys])
def test_a_worker_of_own_classes_guards_their_keys(
    client: redis.Redis, by_environment: None, queue_class: type[Queue]
) -> None:
    """The worker reports to the source of its producers, with every queue of it."""
    producer = guard(OwnQueue("mail", connection=client))
    worker = SimpleNamespace(
        name="w", connection=client, queue_class=queue_class, job_class=OwnJob, queue_names=list
    )
    known = producer._tracker
    assert known is not None and known.source.prefix == "rq|own:job:|own:queue:|own:queues"
    producer.close()
    tracker = lookup.tracker_for(worker)
    assert tracker is not None and tracker.source.id == known.source.id
    assert tracker.guards("mail") and tracker.guards("other")


def test_jobguard_run_guards_queues_of_own_classes(
    client: redis.Redis, by_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each class of queues has its source, also on a Redis that has another one already."""
    monkeypatch.setattr(lookup, "_asked", set())
    found = {
        tracker.source.prefix
        for kind in (Queue, OwnQueue, OwnQueue)
        if (tracker := lookup.tracker_for_queue(kind("mail", connection=client)))
    }
    assert found == {"rq", "rq|own:job:|own:queue:|own:queues"}


def test_jobguard_sends_on_queues_of_own_classes(
    client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that jobguard sends for such a source has the keys of its classes."""
    sent: list[str] = []

    def enqueue(self: Queue, task: str) -> Any:
        sent.append(self.key)
        return SimpleNamespace(id="1")

    monkeypatch.setattr(Queue, "enqueue", lambda self, task, **_: enqueue(self, task))
    RQAdapter().send(AllQueues(client, OwnQueue), "task", (), {}, delay=None, queue="mail")
    assert sent == ["own:queue:mail"]
