from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fakeredis
import pytest
import redis
import rq.worker
from rq import Queue
from rq.job import Job
from rq.registry import FailedJobRegistry, ScheduledJobRegistry

from jobguard.adapter import Source
from jobguard.adapters.rq import RQAdapter, patches
from jobguard.adapters.rq.layout import Layout
from jobguard.errors import UnsupportedTarget

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
    """Take the hooks off, whoever put them on."""
    holders = set(patches._holders)
    for holder in holders:
        patches.uninstall(holder)
    yield
    for holder in holders:
        patches.install(holder)


def snapshot() -> list[dict[str, Any]]:
    """Return what stands in RQ's classes."""
    return [dict(kind.__dict__) for kind in CLASSES if kind is not object]


def test_installing_and_removing_are_mirror_images(bare: None) -> None:
    """After the last guard is gone RQ's classes are what they were, entry for entry."""
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


def test_hooks_look_like_what_they_hook(bare: None) -> None:
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
    """If one method is missing, or is another one by its arguments, nothing is hooked."""

    def retry(self: Job, other: object) -> None:
        """Not what RQ has."""

    with monkeypatch.context() as other:
        other.setattr(Job, "retry", retry)
        before = snapshot()
        with pytest.raises(UnsupportedTarget, match=r"Job\.retry\(self, queue, pipeline"):
            patches.install("a")

        assert snapshot() == before


def test_what_others_put_over_ours_stays(bare: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that was wrapped again after us is not torn out from under its wrapper."""
    original = Job.__dict__["save"]
    patches.install("a")

    def over(self: Job, *args: Any, **kwargs: Any) -> None:
        """Somebody else's."""

    Job.save = over  # type: ignore[method-assign]
    try:
        patches.uninstall("a")
        assert Job.__dict__["save"] is over
    finally:
        Job.save = original  # type: ignore[method-assign]


class TestSources:
    """What guarding a target means."""

    def test_queue(self, client: redis.Redis) -> None:
        """A queue is itself on its Redis."""
        guarded = RQAdapter().sources(Queue("q", connection=client), namespace="n", name=None)

        assert guarded is not None
        assert guarded.source == Source("n", "rq", "localhost:6390/3", "rq")
        assert guarded.queues == frozenset(["q"])
        assert guarded.inert is None
        assert guarded.client is not None
        own = guarded.client()
        assert own.connection_pool.connection_kwargs["socket_timeout"] <= 5

    def test_list(self, client: redis.Redis) -> None:
        """A list of queues is all of them."""
        queues = [Queue("a", connection=client), Queue("b", connection=client)]
        guarded = RQAdapter().sources(queues, namespace="n", name="named")

        assert guarded is not None
        assert guarded.queues == frozenset(["a", "b"])
        assert guarded.source.name == "named"

    def test_redis(self, client: redis.Redis) -> None:
        """A Redis is every RQ queue on it."""
        guarded = RQAdapter().sources(client, namespace="n", name=None)

        assert guarded is not None
        assert guarded.queues is None

    def test_two_servers(self, client: redis.Redis) -> None:
        """Queues on two servers are two guards."""
        queues = [Queue("a", connection=client), Queue("b", connection=redis.Redis(port=1))]

        with pytest.raises(UnsupportedTarget, match="once for each"):
            RQAdapter().sources(queues, namespace="n", name=None)

    def test_decode_responses(self) -> None:
        """A client that RQ's own workers cannot use is an error at once, with the next step."""
        queue = Queue("q", connection=redis.Redis(decode_responses=True))

        with pytest.raises(UnsupportedTarget, match="without it"):
            RQAdapter().sources(queue, namespace="n", name=None)

    @pytest.mark.parametrize("target", [None, "redis://", object(), [], {}, [1]])
    def test_not_ours(self, target: object) -> None:
        """Anything else belongs to another adapter."""
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
        """A queue that runs its jobs at once keeps nothing that could be lost."""
        queue = Queue("q", connection=client, is_async=False)
        guarded = RQAdapter().sources(queue, namespace="n", name=None)

        assert guarded is not None
        assert guarded.inert


def test_a_reconciler_needs_no_rq() -> None:
    """The adapter is imported, and gives its broker, where RQ is not installed."""
    code = (
        "import sys; sys.modules['rq'] = None\n"
        "import redis\n"
        "from jobguard.adapter import Source\n"
        "from jobguard.adapters.rq import RQAdapter\n"
        "RQAdapter().broker(Source('n', 'rq', 'a', 'rq'), redis.Redis())\n"
    )
    root = str(Path(__file__).parents[3])
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=30)


@pytest.mark.parametrize("layout", [Layout(), Layout("a:b", "x:", "y:", "z")])
def test_a_layout_is_its_prefix(layout: Layout) -> None:
    """A source's prefix says where all keys are."""
    assert Layout.parse(str(layout)) == layout


def test_a_usual_layout_is_one_word() -> None:
    """RQ's own layout is the prefix that RQ_KEY_PREFIX names."""
    assert str(Layout.parse("{rq}")) == "{rq}"
    assert Layout.parse("").job("1") == "rq:job:1"
