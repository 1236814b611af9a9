"""One run of the demo: start all processes, inject the faults, and count.

The producer enqueues, the workers work, and the fault plan kills Redis and a worker. All the time
the producer and the tasks write the ledger, a file that jobguard never sees. Only that file is
counted.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import psycopg
import redis

from jobguard.demo import apps, children, figures, ledger
from jobguard.demo.fault_plan import FaultPlan, forecast
from jobguard.demo.servers import NamedPostgres, PostgresServer, RedisServer
from jobguard.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from jobguard.demo.libraries import Library, WorkerPool

# The command `jobguard` of this Python; a script of that name may belong to another installation.
JOBGUARD = ("-c", "from jobguard.cli import main; main()")
TICK_SECONDS = 0.025
START_SECONDS = 60.0  # for the start of a worker or the reconciler; more for many workers
STALL_SECONDS = max(40.0, 2 * Settings().worker_timeout + 10.0)
UNGUARDED_STALL_SECONDS = 5.0  # no process restores anything: an empty queue stays empty
# The demo waits a little after the last job: a job that was restored although it had ended would
# run now.
QUIET_SECONDS = 3.0

# With more workers than the machine can run, the producer beside them would be too slow.
CROWD_JOBS_A_SECOND_AND_CORE = 100.0
WORK_SECONDS = 0.002


def work_seconds(library: Library, worker_pool: WorkerPool, cores: int) -> float:
    """Return how long a job takes.

    All workers together, however many, must be slower than the one producer. Otherwise the queue is
    empty when Redis is killed, nothing is lost, and the demo shows nothing. A sleeping job uses no
    processor time, so many workers are slowed by longer jobs.
    """
    rate = library.jobs_a_second
    if worker_pool.workers * worker_pool.processes > 2 * cores:
        rate = min(rate, CROWD_JOBS_A_SECOND_AND_CORE * cores)
    return max(WORK_SECONDS, worker_pool.at_once / rate - library.overhead_seconds)


class DemoError(RuntimeError):
    """The demo could not be completed; the message says why."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The parameters of a run."""

    jobs: int
    library: Library
    worker_pool: WorkerPool
    cores: int
    kills: int
    seed: int
    guarded: bool = True
    sabotage: bool = False
    keep: Path | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a run."""

    jobs: int
    enqueued: int
    executed: int
    absent: int
    back: int
    redis_is_up: bool
    redis_kills: int
    worker_kills: int
    workers: int
    restarts: int
    seconds: float


class ProgressDisplay(Protocol):
    """The display of a run."""

    def announce(self, text: str) -> None:
        """Show an event; the text has markup of rich."""

    def show(self, progress: Progress) -> None:
        """Show the progress."""


def run(plan: Plan, display: ProgressDisplay) -> figures.Figures:
    """Run once, and count.

    Raise DemoError or jobguard.demo.servers.ServerError.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_folder(plan))
        server = stack.enter_context(RedisServer(persistence="none"))
        postgres = stack.enter_context(_database()) if plan.guarded else None
        return _Run(plan, display, folder, server, postgres, stack).to_the_end()


@contextlib.contextmanager
def _folder(plan: Plan) -> Iterator[Path]:
    if plan.keep is not None:
        folder = plan.keep / ("guarded" if plan.guarded else "unguarded")
        if folder.exists():  # a ledger is appended to: an old one would be counted with ours
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="jobguard-demo-", ignore_cleanup_errors=True) as name:
        yield Path(name)


@contextlib.contextmanager
def _database() -> Iterator[str]:
    """Yield the URL of a new, migrated database."""
    import jobguard.schema  # imported here, so that the run without jobguard does not need it

    named = os.environ.get("JOBGUARD_TEST_POSTGRES_URL")
    with contextlib.ExitStack() as stack:
        server = NamedPostgres(named) if named else stack.enter_context(PostgresServer())
        name = f"jobguard_demo_{uuid.uuid4().hex}"
        url = server.create_database(name)
        stack.callback(server.drop_database, name)
        jobguard.schema.migrate(url)
        yield url


class _Run:
    """The processes of one run, and the loop that watches them."""

    def __init__(
        self,
        plan: Plan,
        display: ProgressDisplay,
        folder: Path,
        server: RedisServer,
        postgres: str | None,
        stack: contextlib.ExitStack,
    ) -> None:
        self._plan, self._display, self._folder = plan, display, folder
        self._server, self._postgres = server, postgres
        self._reader = ledger.Reader(folder / "ledger")
        stack.callback(self._reader.close)
        self._environ = children.clean_environment() | {apps.REDIS: server.url}
        if postgres is not None:
            self._environ[apps.POSTGRES] = postgres
        # The processes are started in this order, and ended in the reverse order.
        self._reconciler = self._start_reconciler(stack) if postgres is not None else None
        self._workers = self._start_workers(stack)
        self._faults = FaultPlan(
            jobs=plan.jobs,
            library=plan.library,
            server=server,
            reader=self._reader,
            forecast=forecast(plan.kills, plan.seed),
            postgres=postgres,
            recovers=plan.guarded and not plan.sabotage,
            announce=display.announce,
        )
        stack.callback(self._faults.close)
        self._started_at = time.monotonic()
        self._moved_at = self._started_at
        self._done_at: float | None = None
        self._producer = self._start_producer(stack)

    def to_the_end(self) -> figures.Figures:
        """Watch until all jobs are done or nothing changes any more, and count."""
        while not self._is_over():
            if self._reader.read():
                self._moved_at = time.monotonic()
            self._tend()
            self._faults.tick()
            self._display.show(self._progress())
            time.sleep(TICK_SECONDS)
        self._reader.read()
        return figures.count(
            self._reader.ledger,
            library=self._plan.library.name,
            redis_kills=self._faults.redis_kills,
            worker_kills=self._faults.worker_kills,
        )

    def _is_over(self) -> bool:
        now = time.monotonic()
        counted = self._reader.ledger
        all_done = len(counted.enqueued) == self._plan.jobs == counted.executed
        if not all_done:
            return self._is_stalled(now - self._moved_at)
        if not self._faults.is_over:
            if now - self._moved_at < STALL_SECONDS:  # the last kill may still be watched
                return False
            raise DemoError(
                "all jobs were done before the last kill: use more --jobs or fewer --kills"
            )
        if self._done_at is None:
            self._done_at = now
        return now - self._done_at > QUIET_SECONDS

    def _is_stalled(self, seconds: float) -> bool:
        if seconds > STALL_SECONDS:
            return True
        return (
            not self._plan.guarded
            and seconds > UNGUARDED_STALL_SECONDS
            and self._producer.ended
            and self._faults.redis_is_up
            and self._faults.waiting() == 0
        )

    def _tend(self) -> None:
        for worker in self._workers:
            worker.tend()
        if self._reconciler is not None and self._reconciler.tend():
            self._display.announce("[red]the reconciler ended[/] and was started again")
        ended = self._producer.process.poll()
        if ended:
            raise DemoError(f"the producer failed:\n{self._producer.last_words}")

    def _progress(self) -> Progress:
        counted = self._reader.ledger
        return Progress(
            jobs=self._plan.jobs,
            enqueued=len(counted.enqueued),
            executed=counted.executed,
            absent=self._faults.absent,
            back=self._faults.back,
            redis_is_up=self._faults.redis_is_up,
            redis_kills=len(self._faults.redis_kills),
            worker_kills=len(self._faults.worker_kills),
            workers=self._plan.worker_pool.workers,
            restarts=sum(worker.starts - 1 for worker in self._workers),
            seconds=time.monotonic() - self._started_at,
        )

    def _start_reconciler(self, stack: contextlib.ExitStack) -> children.Child:
        more = {"JOBGUARD_MODE": "observe"} if self._plan.sabotage else {}
        child = children.Child(
            [*JOBGUARD, "reconcile", "--redis", self._server.url],
            environ=self._environ | more,  # it does not know where the ledger is
            log=self._folder / "reconciler.log",
        )
        stack.callback(children.end, [child])
        self._await(self._leader_is_there, [child], "the reconciler", START_SECONDS)
        return child

    def _leader_is_there(self) -> bool:
        assert self._postgres is not None
        with psycopg.connect(self._postgres) as connection:
            live = "select 1 from jobguard.leader where expires_at > now()"
            return connection.execute(live).fetchone() is not None

    def _start_workers(self, stack: contextlib.ExitStack) -> list[children.Child]:
        workers: list[children.Child] = []
        stack.callback(children.end, workers)
        for number, command in enumerate(self._plan.library.commands(self._plan.worker_pool)):
            child = self._child(f"worker-{number}", command, self._plan.library.orphan_signal)
            workers.append(child)
        with redis.Redis.from_url(self._server.url) as client:
            self._await(
                lambda: self._plan.library.workers_known(client) >= self._plan.worker_pool.workers,
                workers,
                "a worker",
                START_SECONDS
                + 2 * self._plan.worker_pool.workers * self._plan.worker_pool.processes,
            )
        return workers

    def _start_producer(self, stack: contextlib.ExitStack) -> children.Child:
        takes = work_seconds(self._plan.library, self._plan.worker_pool, self._plan.cores)
        what = (self._plan.library.name, str(self._plan.jobs))
        how = (f"{takes:.4f}", str(self._plan.worker_pool.at_once))
        child = self._child("producer", ("-m", "jobguard.demo.producer", *what, *how))
        stack.callback(children.end, [child])
        return child

    def _child(
        self, name: str, command: Sequence[str], orphan_signal: signal.Signals = signal.SIGKILL
    ) -> children.Child:
        return children.Child(
            command,
            environ=self._environ | {ledger.VARIABLE: str(self._folder / "ledger")},
            log=self._folder / f"{name}.log",
            orphan_signal=orphan_signal,
        )

    def _await(
        self,
        is_ready: Callable[[], bool],
        who: list[children.Child],
        name: str,
        seconds: float,
    ) -> None:
        deadline = time.monotonic() + seconds
        while not is_ready():
            for child in who:
                if child.ended:
                    raise DemoError(f"{name} does not start:\n{child.last_words}")
            if time.monotonic() > deadline:
                raise DemoError(f"{name} is not ready after {seconds:.0f} s")
            time.sleep(0.05)
