from __future__ import annotations

import subprocess
import sys
from typing import Any

import fakeredis
import pytest
import redis
from dramatiq import group
from dramatiq.broker import Broker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import GroupCallbacks, Middleware, default_middleware
from dramatiq.rate_limits.backends import RedisBackend, StubBackend
from redis.sentinel import Sentinel

from jobguard.adapter import Source
from jobguard.adapters.dramatiq import DramatiqAdapter, patches
from jobguard.errors import UnsupportedTarget
from tests.fakes.adapters import FakeTracker

Make: Any = RedisBroker


def a_broker(**options: Any) -> RedisBroker:
    """Return a broker that is never connected."""
    middleware = [each() for each in default_middleware]
    made: RedisBroker = Make(middleware=middleware, **{"port": 6390, **options})
    return made


def guarded(target: object) -> Any:
    """Return how the adapter guards this target."""
    return DramatiqAdapter().sources(target, namespace="n", name=None)


class TestSources:
    """Targets that can be guarded, and others."""

    @pytest.mark.parametrize(
        ("options", "address"),
        [
            ({"host": "LOCALHOST", "port": 6390, "db": 3}, "localhost:6390/3"),
            ({"url": "redis://user:secret@redis.example:6391/2"}, "redis.example:6391/2"),
            ({"client": redis.Redis(port=6392)}, "localhost:6392/0"),
            (
                {"client": Sentinel([("127.0.0.1", 1)]).master_for("main", db=4)},  # type: ignore[no-untyped-call]
                "sentinel:main/4",
            ),
        ],
        ids=["host and port", "url", "client", "sentinel"],
    )
    def test_a_redis_broker_with_all_its_queues(
        self, options: dict[str, Any], address: str
    ) -> None:
        """The source has the address of the Redis, in whichever way it was given, and never a password."""
        found = guarded(a_broker(**options))
        assert found.source.address == address
        assert (found.source.library, found.source.one_body) == ("dramatiq", False)
        assert found.queues is None
        assert found.client is not None

    def test_each_namespace_is_a_source(self) -> None:
        """Each namespace is a source of its own; the default one has no prefix."""
        prefixes = [guarded(a_broker(namespace=n)).source.prefix for n in ("dramatiq", "other", "")]
        assert prefixes == ["", "other", "="]

    def test_rabbitmq_is_refused_with_the_next_step(self) -> None:
        """A broker that is not on Redis is refused with an advice."""

        class RabbitmqBroker(Broker):
            pass

        with pytest.raises(UnsupportedTarget, match=r"RabbitmqBroker .* RedisBroker"):
            guarded(RabbitmqBroker())

    def test_what_dramatiq_could_not_read_itself_is_refused(self) -> None:
        """A Redis client with decode_responses is refused, because Dramatiq cannot read its answers."""
        client: Any = redis.Redis(decode_responses=True)
        with pytest.raises(UnsupportedTarget, match="decode_responses"):
            guarded(a_broker(client=client))

    def test_test_doubles_are_inert(self) -> None:
        """Test doubles are inert, so that users' tests run."""
        fake: Any = fakeredis.FakeRedis()
        assert guarded(StubBroker()).inert
        assert guarded(a_broker(client=fake)).inert

    def test_other_things_are_not_ours(self) -> None:
        """The adapter ignores other objects, which another adapter may know."""
        assert guarded(object()) is None
        assert guarded(redis.Redis()) is None


@pytest.fixture
def tracker(tmp_path: Any) -> FakeTracker:
    """Return a tracker in memory."""
    return FakeTracker(Source("n", "dramatiq", "localhost:6390/0"), tmp_path / "calls")


def hooked(broker: RedisBroker) -> tuple[dict[str, Any], list[Any], Any, list[dict[str, Any]]]:
    """Return all parts of a broker that may be hooked."""
    own = {name: value for name, value in broker.__dict__.items() if name != "middleware"}
    return (
        own,
        list(broker.middleware),
        group.__dict__["run"],
        [dict(each.__dict__) for each in broker.middleware],
    )


class TestHooks:
    """The hooks are installed and removed."""

    def test_installing_and_removing_are_mirror_images(self, tracker: Any) -> None:
        """Removal restores two brokers of one source exactly; a second installation changes nothing."""
        brokers = [a_broker(), a_broker()]
        barriers: Any = RedisBackend
        brokers[0].add_middleware(GroupCallbacks(barriers(client=redis.Redis(port=6390))))
        before = [hooked(broker) for broker in brokers]
        for broker in brokers:
            patches.install(tracker, broker)
        first = hooked(brokers[0])
        patches.install(tracker, brokers[0])
        assert hooked(brokers[0]) == first != before[0]
        guard = patches.guard_of(brokers[0])
        assert guard is not None
        guard.joins.adopt()
        patches.uninstall(tracker)
        assert [hooked(broker) for broker in brokers] == before

    def test_a_class_that_is_hooked_later_is_called_all_the_same(
        self, tracker: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A method that another library patches on the class after us is still called."""
        broker = a_broker()
        patches.install(tracker, broker)
        seen: list[str] = []
        monkeypatch.setattr(RedisBroker, "flush", lambda self, name: seen.append(name))
        broker.flush("mail")
        patches.uninstall(tracker)
        assert seen == ["mail"]

    def test_what_others_put_over_ours_stays(self, tracker: Any) -> None:
        """A hook that another library put over ours stays after the removal."""
        broker: Any = a_broker()
        patches.install(tracker, broker)
        theirs = broker.enqueue = lambda message, *, delay=None: message
        patches.uninstall(tracker)
        assert broker.__dict__["enqueue"] is theirs

    def test_a_dramatiq_that_is_not_known_is_left_alone(self, tracker: Any) -> None:
        """If one method has an unknown signature, no hook is installed."""

        class Strange(RedisBroker):
            def enqueue(self, envelope: Any) -> Any:  # type: ignore[override]
                return None

        strange: Any = Strange
        broker = strange(port=6390)
        before = hooked(broker)
        with pytest.raises(UnsupportedTarget, match=r"enqueue\(message, \.\.\.\)"):
            patches.install(tracker, broker)
        assert hooked(broker) == before

    def test_ours_stands_last_when_a_worker_begins(self, tracker: Any) -> None:
        """Our middleware is the last one when a worker starts, and all others are still called."""
        called: list[str] = []

        class Other(Middleware):
            def before_worker_boot(self, broker: Any, worker: Any) -> None:
                called.append("other")

        broker: Any = a_broker()
        patches.install(tracker, broker)
        broker.add_middleware(Other())
        worker: Any = type("Worker", (), {"consumer_whitelist": {"mail"}, "consumers": {}})()
        broker.emit_before("worker_boot", worker)
        guard = patches.guard_of(broker)
        assert guard is not None
        assert broker.middleware[-1] is guard._middleware
        assert called == ["other"]
        patches.uninstall(tracker)

    def test_a_barrier_elsewhere_is_counted_as_ever(self, tracker: Any) -> None:
        """A barrier that is not in Redis is counted by its own backend."""
        broker = a_broker()
        barriers: Any = StubBackend
        middleware = GroupCallbacks(barriers())
        broker.add_middleware(middleware)
        patches.install(tracker, broker)
        guard = patches.guard_of(broker)
        assert guard is not None
        guard.joins.adopt()
        backend: Any = middleware.rate_limiter_backend
        assert backend.add("g", 2, 1000)
        assert [backend.decr("g", 1, 1, 1000) for _ in range(2)] == [True, False]
        patches.uninstall(tracker)


def test_the_reconcilers_half_imports_no_dramatiq() -> None:
    """The broker module does not import Dramatiq, because a reconciler runs without it."""
    program = (
        "import sys, jobguard.adapters.dramatiq.broker, jobguard.adapters.dramatiq\n"
        "assert 'dramatiq' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
