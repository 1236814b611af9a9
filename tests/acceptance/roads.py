"""A small installation of real processes, and the jobs that they run.

The jobs write into a file that jobguard never touches: the file shows what really happened.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import redis
import rq
from redis.backoff import NoBackoff
from redis.retry import Retry

import jobguard
from jobguard.guard import JobGuard
from tests.databases import Session
from tests.support import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
QUEUE = "mail"

# All intervals are shorter than the defaults. The rules are the same.
BRISK = {
    "JOBGUARD_BEAT_INTERVAL": "0.5",
    "JOBGUARD_WORKER_TIMEOUT": "5",
    "JOBGUARD_RETRY_INTERVAL": "0.2",
    "JOBGUARD_PUSH_DEADLINE": "0.5",
    "JOBGUARD_SWEEP_INTERVAL": "1",
    "JOBGUARD_PULSE_INTERVAL": "0.2",
    "JOBGUARD_GRACE": "0.6",
    "JOBGUARD_LOSS_GRACE": "0.4",
    "JOBGUARD_LEASE": "5",
}

# -- jobs ------------------------------------------------------------------------------------------


def say(ledger: str, word: str = "ran") -> str:
    """Append a line that only a run of this job can write."""
    with Path(ledger).open("a") as file:
        file.write(f"{word}\n")
    return word


def say_slowly(ledger: str, word: str, seconds: float) -> None:
    """Append a line, and sleep for this many seconds."""
    say(ledger, word)
    time.sleep(seconds)


def say_and_wait(ledger: str, word: str, until: str) -> None:
    """Append a line, and return when a file exists."""
    say(ledger, word)
    deadline = time.monotonic() + 120
    while not Path(until).exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def fail_at_first(ledger: str, word: str, times: int) -> str:
    """Fail this many times, then return."""
    say(ledger, word)
    if words(Path(ledger))[word] <= times:
        raise ValueError("as it must")
    return word


def hand_on(ledger: str, redis_url: str) -> None:
    """Enqueue another job from inside a job, and note if it is recorded."""
    say(ledger, "first")
    with redis.Redis.from_url(redis_url) as client:
        job = rq.Queue(QUEUE, connection=client).enqueue(say, ledger, "second")
    with psycopg.connect(os.environ["JOBGUARD_POSTGRES_URL"]) as connection:
        owed = connection.execute("select from jobguard.jobs where job_id = %s", [job.id])
        say(ledger, "recorded" if owed.rowcount else "unrecorded")


def words(ledger: Path) -> Counter[str]:
    """Count how often each word was written."""
    return Counter(ledger.read_text().split()) if ledger.exists() else Counter()


# -- processes -------------------------------------------------------------------------------------


class Child:
    """A process of the test, with its log."""

    def __init__(self, command: list[str], env: dict[str, str], folder: Path, name: str) -> None:
        self.path = folder / f"{name}.log"
        with self.path.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=folder,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        """Everything that the process has logged so far."""
        return self.path.read_text(errors="replace")

    def wait_for_log(self, words: str, timeout: float = 30.0) -> None:
        """Wait until the log contains these words."""
        eventually(lambda: words in self.log, timeout, message=f"{words!r} in:\n{self.log}")

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the log entries of one event, from a log in JSON."""
        lines = [line for line in self.log.splitlines() if line.startswith("{")]
        return [reported for line in lines if (reported := json.loads(line))["event"] == name]

    def wait_for_event(self, event: str, timeout: float = 30.0) -> dict[str, Any]:
        """Wait until the process has logged an event, and return the last entry of this event."""
        eventually(lambda: self.events(event), timeout, message=f"{event} in:\n{self.log}")
        return self.events(event)[-1]

    def ends(self, timeout: float = 120.0) -> int:
        """Wait for the end of the process, and return its exit code."""
        return self.process.wait(timeout)

    def stop(self) -> int:
        """Send SIGTERM, as a deployment does, and wait for the end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.ends()

    def pause(self) -> None:
        """Send SIGSTOP to the process."""
        self.process.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        """End the process and everything that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)


class Site:
    """One ledger, one Redis, and the processes that a test starts with them."""

    def __init__(self, folder: Path, postgres: str, redis_url: str, **settings: str) -> None:
        self.folder = folder
        self.postgres = postgres
        self.redis_url = redis_url
        self.settings = settings
        self.ledger = folder / "ledger"
        self.children: list[Child] = []
        self._session = Session(postgres)

    def env(self, **more: str) -> dict[str, str]:
        """Return the environment of the processes."""
        plain = {k: v for k, v in os.environ.items() if not k.startswith("JOBGUARD_")}
        return (
            plain
            | BRISK
            | {
                "PYTHONPATH": str(REPOSITORY),
                "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
                "JOBGUARD_POSTGRES_URL": self.postgres,
                "JOBGUARD_REDIS_URL": self.redis_url,
                "JOBGUARD_LOG_JSON": "1",
            }
            | self.settings
            | more
        )

    def start(self, name: str, *command: str, **more: str) -> Child:
        """Start a process."""
        unique = f"{name}-{len(self.children)}"
        child = Child(list(command), self.env(**more), self.folder, unique)
        self.children.append(child)
        return child

    def worker(
        self, *options: str, kind: str = "SimpleWorker", queue: str = QUEUE, **more: str
    ) -> Child:
        """Start a guarded worker of RQ, and wait until it beats."""
        return self._worker(
            *(str(BIN / "rq"), "worker", "--url", self.redis_url),
            *("--worker-class", f"jobguard.adapters.rq.{kind}", *options, queue),
            **more,
        )

    def celery_worker(self) -> Child:
        """Start a guarded worker of Celery that runs two tasks at once, and wait until it beats."""
        return self._worker(
            *(str(BIN / "celery"), "-A", "tests.acceptance.roads_celery", "worker"),
            *("--pool", "threads", "--concurrency", "2", "--loglevel", "INFO"),
        )

    def _worker(self, *command: str, **more: str) -> Child:
        before = self.ask("select id from jobguard.workers where left_at is null")
        child = self.start("worker", *command, **more)
        eventually(
            lambda: self.ask("select id from jobguard.workers where left_at is null") != before,
            30,
            message=f"a worker in:\n{child.log}",
        )
        return child

    def bare_worker(self, *options: str) -> Child:
        """Start a worker without jobguard, and wait until RQ has registered it."""
        name = f"bare-{len(self.children)}"
        child = self.start(
            "bare", str(BIN / "rq"), "worker", "--url", self.redis_url, "-n", name, *options, QUEUE
        )
        with self.client() as client:
            eventually(lambda: client.exists(f"rq:worker:{name}"), 30)
        return child

    def reconciler(self, *options: str, leads: bool = True, **more: str) -> Child:
        """Start a reconciler, and wait until it leads."""
        child = self.start("reconciler", str(BIN / "jobguard"), "reconcile", *options, **more)
        if leads:
            child.wait_for_event("leader_elected")
        return child

    def command(self, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a command of jobguard to its end."""
        return subprocess.run(
            [str(BIN / "jobguard"), *words],
            env=self.env(**more),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
        )

    # -- the producer, in this process --

    def client(self, timeout: float = 0.5) -> redis.Redis:
        """Return a client of the host whose timeouts are short."""
        return redis.Redis.from_url(
            self.redis_url,
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            retry=Retry(NoBackoff(), 0),
        )

    @contextmanager
    def producer(
        self, *, client: redis.Redis | None = None, **settings: Any
    ) -> Iterator[tuple[rq.Queue, JobGuard]]:
        """Give a queue in this process, on a Redis whose queues are all guarded."""
        brisk = {key.removeprefix("JOBGUARD_").lower(): value for key, value in BRISK.items()}
        here = {
            key.removeprefix("JOBGUARD_").lower(): value for key, value in self.settings.items()
        }
        with client or self.client() as client:
            queue = rq.Queue(QUEUE, connection=client)
            with jobguard.guard(
                client, postgres=self.postgres, **(brisk | here | settings)
            ) as guard:
                yield queue, guard

    # -- the state --

    def ask(self, query: str, *values: Any) -> list[Any]:
        """Run a query in the PostgreSQL ledger and return its rows."""
        rows = self._session.ask(query, *values)
        return [row[0] if len(row) == 1 else row for row in rows]

    def owed(self) -> list[str]:
        """Return the ids of the owed jobs, in the order of their records."""
        return self.ask("select job_id from jobguard.jobs order by token")

    def outcomes(self, *job_ids: str) -> list[str]:
        """Return the outcomes of the deliveries of these jobs, in the order of their records."""
        return self.ask(
            "select outcome::text from jobguard.history where job_id = any (%s) order by token",
            list(job_ids),
        )

    def completed(self, *job_ids: str, timeout: float = 30.0) -> None:
        """Wait until each of these jobs has one ended delivery, with the outcome completed."""
        eventually(
            lambda: self.outcomes(*job_ids) == ["completed"] * len(job_ids),
            timeout,
            message=f"{len(job_ids)} completed",
        )

    def wait_for_runs(self, count: int, timeout: float = 30.0) -> Counter[str]:
        """Wait until the jobs have written this many lines."""
        eventually(lambda: words(self.ledger).total() >= count, timeout, message=f"{count} runs")
        return words(self.ledger)

    def nothing_is_owed(self, timeout: float = 10.0) -> None:
        """Wait until no job is owed, running, suspected or still to be pushed."""
        tables = ("jobs", "running", "suspects", "outbox")

        def none_is_left() -> bool:
            counts = {t: self.ask(f"select count(*) from jobguard.{t}")[0] for t in tables}
            assert not any(counts.values()), counts
            return True

        eventually(none_is_left, timeout)

    def trusted(self, timeout: float = 30.0) -> None:
        """Wait until the queue is trusted."""
        query = (
            "select count(*) from jobguard.queues where queue = %s and trusted_since is not null"
        )
        eventually(lambda: self.ask(query, QUEUE) == [1], timeout, message="the queue is trusted")

    def swept(self, queue: rq.Queue) -> None:
        """Wait until the leader has inspected everything owed, and again one grace period later.

        A scheduled job is deleted from Redis. When it is back, every other job that the leader
        takes for lost is back too.
        """
        canary = queue.enqueue_in(timedelta(hours=1), say, os.devnull)
        with self.client() as client:
            client.delete(canary.key)
            eventually(lambda: client.exists(canary.key), 30, message="a sweep")
        canary.cancel()

    def close(self) -> None:
        """End every process."""
        for child in self.children:
            child.close()
        self._session.close()
