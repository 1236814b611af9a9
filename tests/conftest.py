"""Servers and databases for tests.

The servers are started once for a run, or named by JOBGUARD_TEST_POSTGRES_URL and JOBGUARD_TEST_REDIS_URL.
Every test has a database that is as new, cloned from a migrated one.
"""

from __future__ import annotations

import gc
import itertools
import os
import sys
import threading
import time
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import redis
from hypothesis import settings

import jobguard.schema
from jobguard import log, registry
from jobguard.current import CurrentJob, _current
from jobguard.demo.servers import NamedPostgres, NamedRedis, PostgresServer, RedisServer
from jobguard.log_bounds import LINE_BOUNDS
from tests.databases import Databases
from tests.support import SLOWEST

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

# The same examples in every run, and no time limit, which a busy machine would exceed.
settings.register_profile("suite", derandomize=True, deadline=None)
settings.load_profile("suite")

ROOMS = ("integration", "conformance", "acceptance")
LONGEST = 600  # seconds of one test with real servers, on a slow and busy machine
HERE = Path(__file__).parent
SLOW = (
    "acceptance/test_demo.py",
    "test_adapter.py::TestDeath",
    "test_adapter.py::TestInWorkerMemory",
    "celery/test_worker_deaths.py",
    "acceptance/test_chaos.py",
    "acceptance/test_simulation.py::test_the_rules",
    "acceptance/test_recovery.py",
    "acceptance/test_claims.py",
    "celery/test_strangers.py",
    "celery/test_ends.py",
    "acceptance/",
    "test_frozen_redis.py",
    "test_sources_apart.py",
    "integration/celery/",
    "dramatiq/test_processes.py",
)
"""Parts of the ids of the slow tests, the slowest first: what --durations shows."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with its folder, and give each worker of xdist its part of the slow tests first."""
    for item in items:
        room = item.path.relative_to(HERE).parts[0] if item.path.is_relative_to(HERE) else ""
        if room in ROOMS:
            item.add_marker(room)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(LONGEST))
    items[:] = _dealt(items, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def pytest_collection_finish() -> None:
    """Exempt modules and tests from garbage collection: it took a fifth of the unit tests' time."""
    gc.collect()
    gc.freeze()


def _dealt(items: list[pytest.Item], workers: int) -> list[pytest.Item]:
    """Order the tests so that no worker has long tests left when the others are done.

    With ``--dist worksteal`` each worker begins with an equal share of adjacent tests. The slow tests
    are dealt to the shares in turn, but those of the demo stay in the first share: beside another one,
    a demo has no full load. The others stay adjacent, and so share the fixtures of their module.
    """
    slow = sorted((item for item in items if _rank(item) < len(SLOW)), key=_rank)
    quick = [item for item in items if _rank(item) == len(SLOW)]
    if workers == 1:
        return slow + quick
    demos = [item for item in slow if _rank(item) == 0]
    dealt = slow[len(demos) :]
    others = workers - 1
    order: list[pytest.Item] = []
    for number, share in enumerate([demos, *(dealt[at::others] for at in range(others))]):
        left = len(items) - len(order)
        count = max(0, left // (workers - number) - len(share))
        order += share + quick[:count]
        quick = quick[count:]
    return order + quick


def _rank(item: pytest.Item) -> int:
    """Return the place of a test in SLOW, or its length."""
    return next((at for at, name in enumerate(SLOW) if name in item.nodeid), len(SLOW))


_DATABASES = 5_000
"""Logical databases of the Redis of a run: more than tests."""


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Close what a test leaves of jobguard in this process, and fail the test.

    A guard, a tracker or a thread of an earlier test would act in later tests and in children that they
    fork, and a run that did not end would be the current job of later tests.
    """
    before = set(threading.enumerate())
    yield
    left: list[object] = []
    if job := jobguard.current():
        left.append(job)
        _current.set(CurrentJob())
    guards = sys.modules.get("jobguard.guard")  # not loaded by tests that guard nothing
    for guard in guards.known_guards() if guards is not None else ():
        left.append(guard)
        guard.close()
    for tracker in registry.trackers():
        left.append(tracker.source)
        registry.unregister(tracker)
    deadline = time.monotonic() + SLOWEST
    for thread in set(threading.enumerate()) - before:
        if thread.name == "jobguard-drain":
            _end_drain(thread)
        elif thread.name.startswith("jobguard"):
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                left.append(thread)
    assert not left, "close what the test opened"


@pytest.fixture(autouse=True)
def no_late_results() -> Iterator[None]:
    """Keep the results of Celery of this test from connecting when they are garbage-collected.

    The finalizer tries ten seconds long to reach a Redis that is gone, and does so within a later test, or
    in a child that it forks.
    """
    yield
    state = sys.modules.get("celery._state")
    for app in [*state._get_active_apps()] if state is not None else ():
        consumer = getattr(app._backend, "result_consumer", None)
        if consumer is not None:
            consumer.stop()
            consumer.subscribed_to.clear()


@pytest.fixture(autouse=True)
def no_sleeping_subscriptions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a thread that receives messages notice soon that it should stop.

    RQ's worker makes it sleep for a minute, waits a second for it at its own end, and leaves it.
    """
    run = redis.client.PubSub.run_in_thread

    def run_in_thread(self: Any, sleep_time: float = 0.0, **options: Any) -> Any:
        return run(self, sleep_time=min(sleep_time, 0.05), **options)

    monkeypatch.setattr(redis.client.PubSub, "run_in_thread", run_in_thread)


def _end_drain(thread: threading.Thread) -> None:
    """Empty the spool of a thread that outlives its guard, until Postgres takes what was spooled."""
    work = getattr(thread, "_target", None)  # absent when the thread has ended
    if work is not None:
        work.__self__._spool = sys.modules["jobguard.host.spool"].MemorySpool(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Collect no garbage while a failure is shown.

    pytest parses the source then. In Python 3.11 a finalizer that parses another text, as the traceback
    of a log line does, makes that a SystemError, which ends the worker of xdist.
    """
    if call.excinfo is None:
        return (yield)
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the settings of the person who runs the tests from the environment."""
    for name in os.environ:
        ours = name.startswith("JOBGUARD_") and not name.startswith("JOBGUARD_TEST_")
        if ours or name in ("DATABASE_URL", "REDIS_URL", "RQ_REDIS_URL"):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def own_log() -> None:
    """Reset the log, so that events of an earlier test neither suppress nor add lines in this test."""
    log._undelivered.clear()
    LINE_BOUNDS.reset()


@pytest.fixture(autouse=True)
def own_dramatiq_encoder() -> Iterator[None]:
    """Set Dramatiq's own encoder after a test: a source of another encoder renders no message of SQL."""
    yield
    if "dramatiq" in sys.modules:
        dramatiq = sys.modules["dramatiq"]
        dramatiq.set_encoder(dramatiq.JSONEncoder())


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[NamedPostgres]:
    """Start one PostgreSQL for the whole run. A test that kills a server uses own_postgres."""
    named = os.environ.get("JOBGUARD_TEST_POSTGRES_URL")
    if named:
        yield NamedPostgres(named)
        return
    with PostgresServer(fsync=False) as server:
        yield server


@pytest.fixture(scope="session")
def template_database(postgres_server: NamedPostgres) -> Iterator[str]:
    """Migrate one database, from which all others are cloned, and return its name."""
    name = f"jobguard_template_{uuid.uuid4().hex}"
    url = postgres_server.create_database(name)
    try:
        jobguard.schema.migrate(url)
        yield name
    finally:
        postgres_server.drop_database(name)


@pytest.fixture(scope="session")
def databases(postgres_server: NamedPostgres, template_database: str) -> Iterator[Databases]:
    """Return the databases of this run."""
    made = Databases(postgres_server, template_database)
    yield made
    made.close()


@pytest.fixture
def database(databases: Databases) -> Iterator[str]:
    """Return the URL of a migrated database that is as new."""
    url = databases.take()
    yield url
    databases.give_back(url)


@pytest.fixture
def empty_database(postgres_server: NamedPostgres) -> Iterator[str]:
    """Return the URL of a new database that is not migrated."""
    name = f"jobguard_test_{uuid.uuid4().hex}"
    url = postgres_server.create_database(name)
    yield url
    postgres_server.drop_database(name)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[NamedRedis]:
    """Start one Redis for the whole run. A test that kills a server uses own_redis."""
    named = os.environ.get("JOBGUARD_TEST_REDIS_URL")
    if named:
        yield NamedRedis(named)
        return
    with RedisServer(config={"databases": str(_DATABASES)}) as server:
        yield server


@pytest.fixture(scope="session")
def redis_databases(redis_server: NamedRedis) -> Iterator[int]:
    """Return the numbers of the logical databases that this run may flush.

    On a server of our own no number comes twice: a consumer that an earlier test left behind would take
    the jobs of a later one.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if not isinstance(redis_server, RedisServer):
        mine = [1 + int(worker.removeprefix("gw")) % 15] if worker else range(1, 16)
        for number in mine:
            with redis.Redis.from_url(redis_server.database_url(number)) as client:
                if client.dbsize():
                    pytest.fail(
                        f"database {number} of JOBGUARD_TEST_REDIS_URL is not empty, and tests "
                        "flush it: empty it, or name another server"
                    )
        return itertools.cycle(mine)
    return itertools.cycle(range(1, _DATABASES))


@pytest.fixture
def redis_url(redis_server: NamedRedis, redis_databases: Iterator[int]) -> Iterator[str]:
    """Return the URL of an empty logical database, not the one of the test before."""
    url = redis_server.database_url(next(redis_databases))
    with redis.Redis.from_url(url) as client:
        client.flushdb()
        yield url
        client.flushdb()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Return a stack that closes everything that was opened, in the reverse order."""
    with ExitStack() as made:
        yield made


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    """Start a PostgreSQL that the test may kill, pause and restart; its databases are not migrated."""
    with PostgresServer() as server:
        yield server


@pytest.fixture
def own_database(own_postgres: PostgresServer) -> str:
    """Return the URL of a migrated database in own_postgres."""
    url = own_postgres.create_database("jobguard")
    jobguard.schema.migrate(url)
    return url


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """Start a Redis without persistence that the test may kill, pause and restart."""
    with RedisServer() as server:
        yield server
