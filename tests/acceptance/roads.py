"""A small installation of real processes, and the jobs that they run.

The jobs write into a file that jobguard never touches: what it says is what happened.
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
from tests.support import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
QUEUE = "mail"

# Everything that waits, waits less: the rules are the same, the machine is shared.
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
    """Leave a line that only a run can leave."""
    with Path(ledger).open("a") as file:
        file.write(f"{word}\n")
    return word


def say_slowly(ledger: str, word: str, seconds: float) -> None:
    """The same, and take some time for it."""
    say(ledger, word)
    time.sleep(seconds)


def say_and_wait(ledger: str, word: str, until: str) -> None:
    """The same, and return once a file is there."""
    say(ledger, word)
    deadline = time.monotonic() + 30
    while not Path(until).exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def fail_at_first(ledger: str, word: str, times: int) -> str:
    """Fail so often, then return."""
    say(ledger, word)
    if words(Path(ledger))[word] <= times:
        raise ValueError("as it must")
    return word


def hand_on(ledger: str, redis_url: str) -> None:
    """Enqueue another job, as jobs do, and look whether it is recorded."""
    say(ledger, "first")
    with redis.Redis.from_url(redis_url) as client:
        job = rq.Queue(QUEUE, connection=client).enqueue(say, ledger, "second")
    with psycopg.connect(os.environ["JOBGUARD_POSTGRES_URL"]) as connection:
        owed = connection.execute("select from jobguard.jobs where job_id = %s", [job.id])
        say(ledger, "recorded" if owed.rowcount else "unrecorded")


def words(ledger: Path) -> Counter[str]:
    """How often each word was said."""
    return Counter(ledger.read_text().split()) if ledger.exists() else Counter()


# -- processes -------------------------------------------------------------------------------------


class Child:
    """A process of the test's, with its log."""

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
        """What it said so far."""
        return self.path.read_text(errors="replace")

    def says(self, words: str, timeout: float = 30.0) -> None:
        """Wait until it has said this."""
        eventually(lambda: words in self.log, timeout, message=f"{words!r} in:\n{self.log}")

    def events(self, name: str) -> list[dict[str, Any]]:
        """What it told of one kind, where its log is made of JSON."""
        lines = [line for line in self.log.splitlines() if line.startswith("{")]
        return [reported for line in lines if (reported := json.loads(line))["event"] == name]

    def tells(self, event: str, timeout: float = 30.0) -> dict[str, Any]:
        """Wait until it has told of an event; the last of its kind."""
        eventually(lambda: self.events(event), timeout, message=f"{event} in:\n{self.log}")
        return self.events(event)[-1]

    def ends(self, timeout: float = 30.0) -> int:
        """Wait for its end; its exit code."""
        return self.process.wait(timeout)

    def stop(self) -> int:
        """Ask it to end, as a deploy does."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.ends()

    def pause(self) -> None:
        """SIGSTOP it."""
        self.process.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        """End it and whatever it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)


class Site:
    """One ledger, one Redis, and whatever processes a test starts on them."""

    def __init__(self, folder: Path, postgres: str, redis_url: str, **settings: str) -> None:
        self.folder = folder
        self.postgres = postgres
        self.redis_url = redis_url
        self.settings = settings
        self.ledger = folder / "ledger"
        self.children: list[Child] = []

    def env(self, **more: str) -> dict[str, str]:
        """The environment of its processes."""
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

    def worker(self, *options: str, kind: str = "SimpleWorker", queue: str = QUEUE) -> Child:
        """Start a guarded worker, and wait until it beats."""
        before = self.ask("select id from jobguard.workers where left_at is null")
        child = self.start(
            "worker",
            *(str(BIN / "rq"), "worker", "--url", self.redis_url),
            *("--worker-class", f"jobguard.adapters.rq.{kind}", *options, queue),
        )
        eventually(
            lambda: self.ask("select id from jobguard.workers where left_at is null") != before,
            30,
            message=f"a worker in:\n{child.log}",
        )
        return child

    def bare_worker(self, *options: str) -> Child:
        """Start a worker without jobguard, and wait until RQ knows it."""
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
            child.tells("leader_elected")
        return child

    def command(self, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a command of jobguard's to its end."""
        return subprocess.run(
            [str(BIN / "jobguard"), *words],
            env=self.env(**more),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )

    # -- the producer, in this process --

    def client(self, timeout: float = 0.5) -> redis.Redis:
        """A client of the host's that does not hang for a minute."""
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
        """A queue in this process, on a Redis whose queues are all guarded."""
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

    # -- what is true --

    def ask(self, query: str, *values: Any) -> list[Any]:
        """Ask the ledger."""
        with psycopg.connect(self.postgres, connect_timeout=5, autocommit=True) as connection:
            rows = connection.execute(query.encode(), values).fetchall()
        return [row[0] if len(row) == 1 else row for row in rows]

    def owed(self) -> list[str]:
        """The ids of the jobs that are owed, in the order of recording."""
        return self.ask("select job_id from jobguard.jobs order by token")

    def outcomes(self, *job_ids: str) -> list[str]:
        """How the deliveries of these jobs ended, in the order of recording."""
        return self.ask(
            "select outcome::text from jobguard.history where job_id = any (%s) order by token",
            list(job_ids),
        )

    def completed(self, *job_ids: str, timeout: float = 30.0) -> None:
        """Wait until the ledger says that each of these completed, and that nothing else is known."""
        eventually(
            lambda: self.outcomes(*job_ids) == ["completed"] * len(job_ids),
            timeout,
            message=f"{len(job_ids)} completed",
        )

    def said(self, count: int, timeout: float = 30.0) -> Counter[str]:
        """Wait until so many lines are in the jobs' own ledger."""
        eventually(lambda: words(self.ledger).total() >= count, timeout, message=f"{count} runs")
        return words(self.ledger)

    def nothing_is_owed(self, timeout: float = 10.0) -> None:
        """Wait until no job is owed, run, suspected or still to be pushed."""
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
        """Wait until the leader has looked at everything owed, and again a grace later.

        A job is taken away and found: whatever else were thought lost would be back by then.
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
