"""Real processes for tests of RQ: workers and reconcilers as children, and a ledger that tasks write.

This file is also the module of the tasks, and the program of the workers and of the producer:
``python -m tests.acceptance.rig KIND REDIS_URL QUEUE...``. jobguard does not know the path of the
ledger.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import redis
import rq
from rq.worker_registration import REDIS_WORKER_KEYS

from jobguard.demo.servers.process import die_with_parent
from tests.support import PATIENT, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from jobguard.demo.servers import RedisServer
    from jobguard.guard import JobGuard

ROOT = Path(__file__).parents[2]
LEDGER = "RIG_LEDGER"
JOBGUARD = ("-c", "from jobguard.cli import main; main()")  # of this Python and of this source tree
TASKS = "tests.acceptance.rig"

QUICK = {
    "JOBGUARD_WORKER_TIMEOUT": "4",
    "JOBGUARD_BEAT_INTERVAL": "1",
    "JOBGUARD_PUSH_DEADLINE": "1",
    **PATIENT,
}
"""The rules of the defaults, with shorter times."""
START = 120.0
"""Seconds for the start of a process on a busy machine."""
SOON = 120.0
"""Seconds for an event that takes a few seconds on an idle machine."""


# -- tasks -----------------------------------------------------------------------------------------


class Line(NamedTuple):
    """One line of the ledger."""

    what: str
    label: str
    pid: int
    at: float
    more: str


def note(what: str, label: object, more: object = "") -> None:
    """Append one line to the ledger, in one write."""
    descriptor = os.open(os.environ[LEDGER], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, f"{what} {label} {os.getpid()} {time.time()} {more}\n".encode())
    finally:
        os.close(descriptor)


def read_ledger(path: str | Path) -> list[Line]:
    """Return every complete line that was written so far; an incomplete last line is left for later."""
    lines = Path(path).read_text().rpartition("\n")[0].splitlines() if Path(path).exists() else []
    return [
        Line(what, label, int(pid), float(at), more)
        for what, label, pid, at, more in (line.split(" ", 4) for line in lines)
    ]


def work(label: object, seconds: float = 0.0) -> None:
    """Sleep for this many seconds."""
    note("start", label)
    time.sleep(seconds)
    note("end", label)


def turns(label: str, *acts: str) -> None:
    """Act as the first word says in the first run, as the second word says in the second run, and so on.

    Each run waits for its gate, the file ``<ledger>.<label>.<run>``.
    """
    note("start", label)
    run = sum(line[:2] == ("start", label) for line in read_ledger(os.environ[LEDGER]))
    gate = Path(f"{os.environ[LEDGER]}.{label}.{run}")
    while not gate.exists():
        time.sleep(0.01)
    note("end", label, acts[run - 1])
    if acts[run - 1] == "fail":
        raise ValueError(f"run {run} fails")


def hold_the_gil(label: str, seconds: float) -> None:
    """Stay in one C call that holds the GIL, and note the longest time in which no other thread ran."""
    note("start", label)
    rounds = 10**7
    began = time.monotonic()
    sum(itertools.repeat(0, rounds))
    rounds = int(1.1 * rounds * seconds / (time.monotonic() - began))
    longest = [0.0]
    done = threading.Event()

    def watch() -> None:
        last = time.monotonic()
        while not done.wait(0.01):
            last, before = time.monotonic(), last
            longest[0] = max(longest[0], last - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    while longest[0] < seconds:
        sum(itertools.repeat(0, rounds))
        done.wait(0.1)
        rounds = rounds * 3 // 2  # the first measurement came from a busier machine
    done.set()
    watcher.join()
    note("end", label, longest[0])


def kill_the_worker(label: str) -> None:
    """Kill the worker with the job, as the kernel does with a job that uses all memory."""
    note("start", label)
    if Path(f"{os.environ[LEDGER]}.{label}.cured").exists():
        note("end", label)
        return
    os.kill(os.getpid(), signal.SIGKILL)


# -- processes -------------------------------------------------------------------------------------


class Process:
    """A child that can be killed, paused and resumed together with its own children."""

    def __init__(self, name: str, arguments: Sequence[str], environ: Mapping[str, str], log: Path):
        self.name, self.log = name, log
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=dict(environ),
                cwd=ROOT,
                start_new_session=True,
                preexec_fn=die_with_parent(signal.SIGKILL),
            )
        self.pid = self._process.pid

    @property
    def ended(self) -> bool:
        """Return True if the process has ended."""
        return self._process.poll() is not None

    @property
    def text(self) -> str:
        """Everything that the process has logged so far."""
        return self.log.read_text(errors="replace")

    def events(self, event: str) -> list[dict[str, Any]]:
        """Return the lines of the log with this event."""
        found = []
        for line in self.text.splitlines():
            with contextlib.suppress(ValueError):
                reported = json.loads(line)
                if reported.get("event") == event:
                    found.append(reported)
        return found

    def family(self) -> list[psutil.Process]:
        """Return the process and its children, itself first."""
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.pid)
            return [parent, *parent.children(recursive=True)]
        return []

    def pause(self) -> None:
        """Send SIGSTOP to all of them, and return when they are stopped."""
        for member in self.family():
            member.suspend()
        stopped = (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
        eventually(lambda: all(member.status() in stopped for member in self.family()))

    def resume(self) -> None:
        """Send SIGCONT to all of them."""
        for member in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                member.resume()

    def kill(self) -> None:
        """Kill all of them with SIGKILL. They are stopped first, so that none sees another die."""
        family = self.family()
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.suspend()
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        self._process.wait()

    def kill_alone(self) -> None:
        """Kill the process alone with SIGKILL: its children continue to run."""
        self._process.kill()
        self._process.wait()

    def terminate(self) -> None:
        """Send SIGTERM to the process alone, and do not wait."""
        self._process.terminate()

    def wait(self, timeout: float = SOON) -> int:
        """Wait for the end of the process, and return its exit code."""
        return self._process.wait(timeout)


class Rig:
    """One Redis, one database, and the processes of one test."""

    def __init__(self, folder: Path, database: str, server: RedisServer, **environ: str) -> None:
        import psycopg

        self.folder, self.database, self.server = folder, database, server
        self.ledger = folder / "ledger"
        self._count = itertools.count(1)
        self._processes: list[Process] = []
        self._environ = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("JOBGUARD_", "RQ_", "COV_"))
        } | {"JOBGUARD_POSTGRES_URL": database, "PYTHONPATH": str(ROOT), **QUICK, **environ}
        self.redis = redis.Redis.from_url(server.url)
        self._postgres = psycopg.connect(database, autocommit=True)
        self._guard: JobGuard | None = None

    def close(self) -> None:
        """End every process by its pid."""
        for process in self._processes:
            process.kill()
        for line in self.lines():  # a horse whose parent was killed earlier
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                orphan = psutil.Process(line.pid)
                if orphan.environ().get(LEDGER) == str(self.ledger):
                    orphan.kill()
        if self._guard is not None:
            self._guard.close()
        self._postgres.close()
        self.redis.close()

    # -- starting ----------------------------------------------------------------------------------

    def _start(self, name: str, *arguments: str, **environ: str) -> Process:
        name = f"{name}-{next(self._count)}"
        log = self.folder / f"{name}.log"
        process = Process(name, arguments, {**self._environ, **environ}, log)
        self._processes.append(process)
        return process

    def reconciler(self, *arguments: str, leads: bool = True, **environ: str) -> Process:
        """Start a reconciler. Wait until it leads, or until it logs if ``leads`` is false."""
        process = self._start(
            "reconciler",
            *(*JOBGUARD, "reconcile", "--redis", self.server.url, "--log-json", *arguments),
            **environ,
        )
        self.await_(lambda: self.leader() == process.pid if leads else process.text, process)
        return process

    def worker(self, *queues: str, kind: str = "simple", wait: bool = True) -> Process:
        """Start a guarded worker of these queues and wait until it has registered.

        Kinds: simple, fork, spawn, and pops (it dies after it has popped a job).
        """
        before = set(self.redis.smembers(REDIS_WORKER_KEYS))
        process = self._start(
            f"worker-{kind}",
            *("-m", TASKS, kind, self.server.url, *(queues or ("mail",))),
            **{LEDGER: str(self.ledger)},
        )
        if wait:
            self.await_(
                lambda: (
                    set(self.redis.smembers(REDIS_WORKER_KEYS)) - before
                    and self.ask("select 1 from jobguard.workers where pid = %s", process.pid)
                ),
                process,
            )
        return process

    def producer(self, jobs: int, pause: float, queue: str = "mail") -> Process:
        """Start a producer of this many jobs. It notes which jobs were enqueued and which were refused."""
        return self._start(
            "producer",
            *("-m", TASKS, "produce", self.server.url, queue, str(jobs), str(pause)),
            **{LEDGER: str(self.ledger)},
        )

    def tend(self, workers: list[Process], kind: str = "simple") -> None:
        """Start new workers for those that have ended, as a supervisor does."""
        for place, worker in enumerate(workers):
            if worker.ended:
                workers[place] = self.worker(kind=kind, wait=False)

    def await_(self, is_ready: Callable[[], Any], process: Process) -> None:
        """Wait until a process has started."""

        def ready() -> bool:
            if process.ended:
                raise RuntimeError(f"{process.name} ended:\n{process.text[-3000:]}")
            return bool(is_ready())

        eventually(ready, START, message=f"{process.name} is up")

    @property
    def guard(self) -> JobGuard:
        """The guard of the test process, which is a producer itself."""
        import jobguard

        if self._guard is None:
            self._guard = jobguard.guard(
                self.redis, postgres=self.database, connect="require", when_postgres_down="raise"
            )
        return self._guard

    def queue(self, name: str = "mail") -> rq.Queue:
        """Return a guarded queue. An inert guard would make every test pass without a record."""
        assert not self.guard.inert
        return rq.Queue(name, connection=self.redis)

    def enqueue(self, count: int, name: str = "mail", *, prefix: str = "j") -> list[str]:
        """Enqueue this many jobs that note their label, and return the labels, which are their ids."""
        labels = [f"{prefix}{number}" for number in range(count)]
        queue = self.queue(name)
        queue.enqueue_many(
            [rq.Queue.prepare_data(f"{TASKS}.work", (label,), job_id=label) for label in labels]
        )
        return labels

    def trust(self, *queues: str) -> None:
        """Wait until these queues are trusted: jobs that are recorded after that are recovered."""
        for queue in queues or ("mail",):
            eventually(
                lambda queue=queue: self.ask(  # type: ignore[misc]
                    "select 1 from jobguard.queues where queue = %s and trusted_since is not null",
                    queue,
                ),
                SOON,
                message=f"{queue} is trusted",
            )

    def jobguard(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command to its end."""
        return subprocess.run(
            [sys.executable, *JOBGUARD, *arguments],
            env=self._environ,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=SOON,
        )

    def open(self, label: str, run: int) -> None:
        """Open the gate of this run of a task that takes turns."""
        Path(f"{self.ledger}.{label}.{run}").touch()

    # -- observing ---------------------------------------------------------------------------------

    def ask(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Run a query in PostgreSQL and return its rows."""
        cursor = self._postgres.execute(query.encode(), values or None)
        return cursor.fetchall() if cursor.description else []

    def leader(self) -> int | None:
        """Return the pid of the process that leads now."""
        rows = self.ask("select pid from jobguard.leader where expires_at > now()")
        return int(rows[0][0]) if rows else None

    def lines(self) -> list[Line]:
        """Return the lines of the ledger."""
        return read_ledger(self.ledger)

    def runs(self, what: str = "end") -> Counter[str]:
        """Count by label how often a job started or ended."""
        return Counter(line.label for line in self.lines() if line.what == what)

    def pids(self, label: str) -> list[int]:
        """Return the pids of the processes that ran this job, one for each start."""
        return [line.pid for line in self.lines() if line[:2] == ("start", label)]

    def all_ended(self, labels: Sequence[str], timeout: float = 60.0) -> None:
        """Wait until each of these jobs has ended."""

        def done() -> bool:
            missing = set(labels) - self.runs().keys()
            assert not missing, f"{len(missing)} of {len(labels)} have not ended"
            return True

        eventually(done, timeout)

    def nothing_is_owed(self, timeout: float = SOON) -> None:
        """Wait until every end is in PostgreSQL."""

        def finished() -> bool:
            for table in ("jobs", "running", "outbox"):
                rows = self.ask(f"select count(*) from jobguard.{table}")
                assert rows == [(0,)], f"{rows[0][0]} rows in {table}"
            return True

        eventually(finished, timeout)

    def waiting(self, name: str = "mail") -> list[str]:
        """Return the ids in the list of the queue."""
        return [id.decode() for id in self.redis.lrange(f"rq:queue:{name}", 0, -1)]  # type: ignore[union-attr]

    def history(self, job_id: str) -> list[tuple[Any, ...]]:
        """Return (outcome, claim number, crashes) of each ended delivery of a job."""
        return self.ask(
            "select outcome::text, number, crashes from jobguard.history where job_id = %s"
            " order by ended_at",
            job_id,
        )


def produce(url: str, name: str, jobs: str, pause: str) -> None:
    """Enqueue this many jobs and ignore errors. If a call raises, its job was not accepted."""
    import jobguard

    queue = rq.Queue(name, connection=redis.Redis.from_url(url))
    jobguard.guard(queue)
    for number in range(int(jobs)):
        try:
            queue.enqueue(work, f"p{number}")
        except Exception as error:
            note("refused", f"p{number}", type(error).__name__)
        else:
            note("enqueued", f"p{number}")
        time.sleep(float(pause))


def main(kind: str, url: str, *queues: str) -> None:
    """Run as a guarded worker, or as the producer."""
    if kind == "produce":
        from tests.acceptance import rig  # not __main__, where no worker would find the task

        rig.produce(url, *queues)
        return
    from jobguard.adapters.rq import SimpleWorker, SpawnWorker, Worker

    class Pops(SimpleWorker):
        """Worker that dies when it has popped a job, before it claims the job."""

        def dequeue_job_and_maintain_ttl(self, *args: Any, **kwargs: Any) -> Any:
            """Pop a job, and die."""
            super().dequeue_job_and_maintain_ttl(*args, **kwargs)
            note("popped", "job")
            os.kill(os.getpid(), signal.SIGKILL)

    kinds = {"simple": SimpleWorker, "fork": Worker, "spawn": SpawnWorker, "pops": Pops}
    connection = redis.Redis.from_url(url)
    kinds[kind](queues, connection=connection).work(logging_level="WARNING")


if __name__ == "__main__":
    main(*sys.argv[1:])
