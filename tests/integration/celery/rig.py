"""Real workers, started by the usual command, with a real ledger and a leader in the test's process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import celery
import psycopg

import jobguard
from jobguard.adapters.celery.layout import Layout
from jobguard.clients import client_from_url
from tests.conformance.words import leading
from tests.support import PATIENT, eventually

ROOT = Path(__file__).parents[3]
PROGRAM = "tests.integration.celery.program"
WORKER_TIMEOUT = 3.0
QUICK: dict[str, Any] = {
    "beat_interval": 0.5,
    "worker_timeout": WORKER_TIMEOUT,
    "grace": 0.3,
    "lease": 3.0,
    "crash_backoff": (0.0,),
}
SOON = 120.0
"""Seconds to wait for an event that takes a few on an idle machine."""


class Process:
    """A child, with a log that is shown when a test fails."""

    def __init__(self, arguments: list[str], environ: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("wb") as out:
            self._popen = subprocess.Popen(
                [sys.executable, *arguments],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._popen.pid

    @property
    def text(self) -> str:
        """The output of the process."""
        return self.log.read_text(errors="replace")

    @property
    def ended(self) -> bool:
        """True if the process has ended."""
        return self._popen.poll() is not None

    def signal(self, number: int) -> None:
        """Send a signal to the process, and not to its children."""
        self._popen.send_signal(number)

    def wait(self, timeout: float = SOON) -> int:
        """Wait for the end of the process; return its exit code."""
        return self._popen.wait(timeout)

    def stop(self) -> int:
        """End the process in an orderly way."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """Kill the process and all its children."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait(10)


class Rig:
    """One Redis, one database, an application that sends, and the processes of one test."""

    def __init__(
        self, folder: Path, database: str, redis_url: str, conf: Mapping[str, Any] | None = None
    ) -> None:
        """Take the addresses and settings.

        ``conf``: settings of every application, where jobguard's URL is not one of Celery's.
        """
        self.folder, self.database, self.redis_url = folder, database, redis_url
        self.ledger = folder / "ledger"
        self.ledger.touch()
        self.redis: Any = client_from_url(redis_url, timeout=30.0)
        self._processes: list[Process] = []
        self._postgres = psycopg.connect(database, autocommit=True)
        self.app = celery.Celery("sender", broker=redis_url, set_as_current=False)
        self._conf = dict(conf or {})
        self.app.conf.update({"result_backend": redis_url} | self._conf)

        patient = dict.fromkeys(("connect_timeout", "call_timeout", "record_timeout"), 10.0)
        settings: dict[str, Any] = {**QUICK, **patient}
        self.guard = jobguard.guard(self.app, postgres=self.database, **settings)
        self._leader = ExitStack()

    def close(self) -> None:
        """End the leader, the guard and every process."""
        self._leader.close()
        self.guard.close()
        for process in self._processes:
            process.kill()
        self._postgres.close()
        self.redis.close()

    # -- processes ---------------------------------------------------------------------------------

    def worker(
        self,
        pool: str = "prefork",
        *options: str,
        concurrency: int = 2,
        guarded: bool = True,
        conf: dict[str, Any] | None = None,
        transport: dict[str, Any] | None = None,
        **environ: str,
    ) -> Process:
        """Start a worker, and wait until it is ready."""
        name = f"w{len(self._processes)}"
        process = self._start(
            name,
            *("-m", "celery", "-A", PROGRAM, "worker", "--pool", pool, "--loglevel", "INFO"),
            *("--concurrency", str(concurrency), "--hostname", f"{name}@%h", *options),
            CONF=json.dumps({**self._conf, **(conf or {})}),
            TRANSPORT=json.dumps(transport or {}),
            UNGUARDED="" if guarded else "1",
            **environ,
        )
        self._until_up(process, lambda: " ready." in process.text)
        return process

    def add_consumer(self, worker: Process, queue: str) -> None:
        """Have a worker consume another queue; repeat the command until the worker announces it.

        A connection that waits for a reply takes messages as an unguarded worker does, and the leader
        would distrust every queue for half a minute.
        """
        name = f"{worker.log.name.partition('-')[0]}@{socket.gethostname()}"
        before = sum(queue in queues for queues in self.announced())
        again = 0.0

        def added() -> bool:
            nonlocal again
            if time.monotonic() >= again:
                self.app.control.add_consumer(queue, destination=[name])
                again = time.monotonic() + 2.0
            return sum(queue in queues for queues in self.announced()) > before

        self.until(added)

    def reconciler(self) -> ExitStack:
        """Start a reconciler in this process, wait until it leads, and return what ends it."""
        self._leader.enter_context(leading(self.guard, self.database, self.redis_url))
        self.until(lambda: self.ask("select 1 from jobguard.leader where expires_at > now()"))
        return self._leader

    def trusted(self, queue: str = "celery") -> bool:
        """Return True if lost tasks of the queue are put back."""
        trusted = "select 1 from jobguard.queues where queue = %s and trusted_since is not null"
        return bool(self.ask(trusted, queue))

    def queues_in_beats(self) -> list[set[str]]:
        """Return the queues of each live worker, by its last beat."""
        rows = self.ask("select queues from jobguard.workers where left_at is null order by id")
        return [set(queues) for (queues,) in rows]

    def announced(self) -> list[set[str]]:
        """Return the queues of each worker, as announced in Redis."""
        about = self.redis.hgetall(Layout().about)
        reported = [json.loads(raw) for field, raw in about.items() if b" " not in field]
        return [set(one["queues"]) for one in reported]

    def _start(self, name: str, *arguments: str, **more: str) -> Process:
        settings = {
            f"JOBGUARD_{name.upper()}": ",".join(map(str, value))
            if isinstance(value, tuple)
            else str(value)
            for name, value in QUICK.items()
        }
        environ = {
            **os.environ,
            **settings,
            **PATIENT,
            "JOBGUARD_POSTGRES_URL": self.database,
            "JOBGUARD_REDIS_URL": self.redis_url,
            "LEDGER": str(self.ledger),
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
            **more,
        }
        log = self.folder / f"{name}-{len(self._processes)}.log"
        process = Process([*arguments], environ, log)
        self._processes.append(process)
        return process

    def _until_up(self, process: Process, is_up: Any) -> None:
        def up() -> bool:
            if process.ended:
                raise RuntimeError(f"it ended:\n{process.text[-3000:]}")
            return bool(is_up())

        eventually(up, SOON, message=f"{process.log.name} is up")

    # -- sending and reading -----------------------------------------------------------------------

    def signature(self, task: str, *args: Any, **options: Any) -> Any:
        """Return a call of one of the program's tasks."""
        return self.app.signature(f"{PROGRAM}.{task}", args, **options)

    def send(self, task: str, *args: Any, **options: Any) -> str:
        """Send one of the program's tasks; return its id."""
        return str(self.app.send_task(f"{PROGRAM}.{task}", args, **options).id)

    def hurry(self) -> None:
        """End the slow tasks that run, and those that will begin."""
        self.ledger.with_suffix(".hurry").touch()

    def ask(self, sql: str, *values: Any) -> list[Any]:
        """Query the ledger in Postgres."""
        return self._postgres.execute(sql, values).fetchall()

    def ended(self, job_id: str) -> list[str]:
        """Return how each delivery of a job ended, in the order of recording."""
        rows = self.ask(
            "select outcome::text from jobguard.history where job_id = %s order by token", job_id
        )
        return [outcome for (outcome,) in rows]

    def error(self, job_id: str) -> str:
        """Return the error of a failed job, as the ledger has it."""
        rows = self.ask("select errors::text from jobguard.history where job_id = %s", job_id)
        return "\n".join(str(errors) for (errors,) in rows)

    def owed(self) -> int:
        """Return how many deliveries are owed."""
        ((count,),) = self.ask("select count(*) from jobguard.jobs")
        return int(count)

    def claims(self) -> int:
        """Return how many claims stand."""
        ((count,),) = self.ask("select count(*) from jobguard.running")
        return int(count)

    def written(self) -> Counter[str]:
        """Return the words that the tasks wrote, and how often."""
        lines = (line.split(" ", 2) for line in self.ledger.read_text().splitlines())
        return Counter(word for _, _, word in lines)

    def when(self, word: str) -> list[float]:
        """Return the times at which a task wrote this word."""
        lines = [line.split(" ", 2) for line in self.ledger.read_text().splitlines()]
        return [float(at) for at, _, written in lines if written == word]

    def pid(self, word: str) -> int:
        """Return the process that wrote this word last."""
        lines = [line.split(" ", 2) for line in self.ledger.read_text().splitlines()]
        return [int(pid) for _, pid, written in lines if written == word][-1]

    def until(self, is_so: Any, timeout: float = SOON) -> Any:
        """Wait until this is true."""
        return eventually(is_so, timeout)

    def show(self) -> None:
        """Print the ends of all logs: pytest shows them if the test fails."""
        for process in self._processes:
            print(f"---- {process.log.name}\n{process.text[-4000:]}")


@contextmanager
def a_rig(
    folder: Path, database: str, redis_url: str, conf: Mapping[str, Any] | None = None
) -> Iterator[Rig]:
    """Give a rig whose own tasks are guarded."""
    rig = Rig(folder, database, redis_url, conf)
    try:
        yield rig
    finally:
        rig.show()
        rig.close()


def now() -> float:
    """Return the time by the clock of the tasks."""
    return time.time()
