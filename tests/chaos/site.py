"""One installation of real processes: the faults act on it, and the run observes it from outside."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import psycopg

import jobguard.schema
from jobguard.clients import client_from_url
from jobguard.demo import children, ledger
from jobguard.demo.harness import JOBGUARD
from jobguard.demo.servers import PostgresServer, RedisServer
from tests.chaos.kills import KillLog
from tests.chaos.libraries import QUEUES, RECONCILER_FAILPOINTS, REDIS_VARIABLE, failpoints
from tests.chaos.plan import SETTINGS
from tests.pooler import Pooler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from tests.chaos.libraries import Role
    from tests.chaos.plan import Plan

ROOT = Path(__file__).parents[2]
PRODUCERS = 2
RECONCILERS = 2
START_SECONDS = 60.0
BACKLOG = 300
"""Jobs in Redis that are enough for a loss; more would only make the run longer."""

HOSTILE = (
    "default_transaction_isolation = 'serializable'",
    "default_transaction_read_only = on",
    "search_path = nowhere",
    "timezone = 'Asia/Kathmandu'",
)
"""Defaults of the database that a run with ``hostile`` has, behind a pooler."""
POOLED = 20
"""The sessions of the pooler, for some 40 connections of the processes."""

_TABLES = (
    "select relname::text from pg_class where relnamespace = 'jobguard'::regnamespace"
    " and relkind in ('r', 'p') and not relispartition order by 1"
)
_OF_THE_JOB = "token in (select token from jobguard.jobs where job_id = %s)"
_ABOUT = {
    table: f"select to_jsonb(t) - 'envelope' from jobguard.{table} t where {which} order by token"
    for table, which in {
        "jobs": "job_id = %s",
        "history": "job_id = %s",
        "running": _OF_THE_JOB,
        "suspects": _OF_THE_JOB,
    }.items()
}


class ChaosError(RuntimeError):
    """The run cannot be made; the message says why."""


class Site:
    """The servers, the supervised children, the ledger of the tasks and the log of the kills."""

    def __init__(self, plan: Plan, folder: Path, stack: contextlib.ExitStack) -> None:
        self.plan, self.folder, self.library = plan, folder, plan.library
        for name in ("failed", "blocks"):
            (folder / name).mkdir()
        self.ledger_path = folder / "ledger"
        self._enough = folder / "enough"
        self.reader = ledger.Reader(self.ledger_path)
        stack.callback(self.reader.close)
        self.kills = KillLog(folder, failpoints(plan.library))
        self.redis = stack.enter_context(RedisServer(persistence="none"))
        self.postgres = stack.enter_context(PostgresServer())
        self._url = self._url_of_hosts = self.postgres.create_database("chaos")
        jobguard.schema.migrate(self._url)
        if plan.hostile:
            with psycopg.connect(self._url, autocommit=True) as connection:
                for setting in HOSTILE:
                    connection.execute(f"alter database chaos set {setting}".encode())
            pooler = stack.enter_context(Pooler(self._url, size=POOLED))
            self._url_of_hosts = pooler.client_url
        self.client = client_from_url(self.redis.url, timeout=2.0)
        stack.callback(self.client.close)
        self._connection: psycopg.Connection[Any] | None = None
        stack.callback(self._hang_up)
        self._paused: set[int] = set()
        self.outages: list[tuple[float, float]] = []
        """The times in which PostgreSQL was away, by the wall clock."""
        self.lost_at = 0.0
        """The time of the last loss of data in Redis, by the wall clock."""
        stack.callback(self._end_orphans)
        self.foreign: set[int] = set()
        """The jobs that a worker without jobguard has run: PostgreSQL owes them for ever."""
        # They are started in this order, and ended in the reverse order.
        self.reconcilers = self._children(stack)
        self._strangers = self._children(stack)
        self.workers: dict[str, children.Child] = {}
        self.services: list[children.Child] = []
        self.producers: list[children.Child] = self._children(stack)

    def start(self, stack: contextlib.ExitStack) -> None:
        """Start all processes except the producers, and return when recorded jobs are recovered."""
        if self.plan.guarded:
            for number in range(RECONCILERS):
                self.reconcilers.append(self._reconciler(number))
            self.await_(lambda: self.leader() is not None, "a leader")
        stack.callback(lambda: children.end([*self.workers.values(), *self.services]))
        for role in self.library.workers:
            self.workers[role.name] = self._member(role)
        for role in self.library.services:
            self.services.append(self._member(role))
        if self.plan.guarded:
            trusted = "select count(*) from jobguard.queues where trusted_since is not null"
            self.await_(lambda: self.ask(trusted) == [(len(QUEUES),)], "the trust in all queues")

    def produce(self) -> None:
        """Start the producers."""
        rate = f"{self.plan.rate / PRODUCERS:.2f}"
        arguments = ("producer", rate, str(self.plan.seed))
        places = self.library.producer_failpoints
        for number in range(PRODUCERS):
            self.producers.append(self._host(f"producer-{number}", arguments, QUEUES, places))

    def pace(self) -> None:
        """Slow the producers down while the workers cannot follow, or when all jobs are enqueued."""
        enqueued = len(self.reader.ledger.enqueued)
        done = not self.plan.soak and enqueued >= self.plan.jobs
        if done or self.backlog() > BACKLOG:
            self._enough.touch()
        else:
            self._enough.unlink(missing_ok=True)

    def stop_producing(self) -> None:
        """Let the producers finish their last call, and do not start them again."""
        children.end(self.producers)
        self.producers.clear()

    def tend(self) -> None:
        """Start ended processes again, as a supervisor does."""
        for child in self.processes().values():
            child.tend()

    def processes(self) -> dict[str, children.Child]:
        """Return the supervised processes by the name of their log."""
        numbered = {"reconciler": self.reconcilers, "producer": self.producers}
        return {
            **{f"{name}-{n}": one for name, made in numbered.items() for n, one in enumerate(made)},
            **self.workers,
            **dict(zip((role.name for role in self.library.services), self.services, strict=True)),
        }

    # Faults spare one process of each kind in a soak, whose memory is watched.

    def mortal_workers(self) -> list[str]:
        """Return the names of the workers that a fault may end."""
        spared = self.library.spared if self.plan.soak else None
        return sorted(name for name in self.workers if name != spared)

    def mortal_producers(self) -> list[children.Child]:
        """Return the producers that run, and that a fault may end."""
        return [child for child in self.producers[bool(self.plan.soak) :] if not child.ended]

    def is_mortal(self, reconciler: children.Child) -> bool:
        """Return True if a fault may end this reconciler."""
        return not (self.plan.soak and reconciler is self.reconcilers[0])

    # -- actions
    # ------------------------------------------------------------------------------------

    def kill(self, child: children.Child, what: str) -> None:
        """Kill a child and its own children with SIGKILL at once, so that none sees another die."""
        family = self.family(child)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.suspend()
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        child.process.wait()
        for member in family:
            wait_until_gone(member)
            self.kills.note(what, member.pid)

    @contextlib.contextmanager
    def outage(self) -> Iterator[None]:
        """Note that PostgreSQL is away inside the block."""
        began = time.time()
        try:
            yield
        finally:
            self.outages.append((began, time.time()))

    def stranger(self) -> children.Child:
        """Start a worker without jobguard. The supervisor does not restart it."""
        self._strangers.append(self._member(self.library.stranger, JOBGUARD_DISABLED="1"))
        return self._strangers[-1]

    def untrusted(self) -> int:
        """Return the number of queues that are not trusted now."""
        return int(
            self.ask("select count(*) from jobguard.queues where trusted_since is null")[0][0]
        )

    def pause(self, child: children.Child) -> None:
        """Send SIGSTOP to it."""
        self._paused.add(child.pid)
        child.process.send_signal(signal.SIGSTOP)

    def resume(self, child: children.Child) -> None:
        """Send SIGCONT to it."""
        child.process.send_signal(signal.SIGCONT)
        self._paused.discard(child.pid)

    # -- observations
    # -------------------------------------------------------------------------------

    def family(self, child: children.Child) -> list[psutil.Process]:
        """Return a child and its children, itself first; nothing if it has ended."""
        with contextlib.suppress(psutil.NoSuchProcess):
            if not child.ended:
                parent = psutil.Process(child.pid)
                return [parent, *parent.children(recursive=True)]
        return []

    def ask(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Run a query in PostgreSQL; raise psycopg.Error while PostgreSQL is away."""
        try:
            return self._ask(query, values)
        except psycopg.OperationalError:  # PostgreSQL was restarted after we connected
            self._hang_up()
        try:
            return self._ask(query, values)
        except psycopg.Error:
            self._hang_up()
            raise

    def _ask(self, query: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        if self._connection is None:
            self._connection = psycopg.connect(self._url, autocommit=True, connect_timeout=5)
        return self._connection.execute(query.encode(), values or None).fetchall()

    def leader(self) -> int | None:
        """Return the pid of the process that leads now."""
        rows = self.ask("select pid from jobguard.leader where expires_at > now()")
        return int(rows[0][0]) if rows else None

    def leading(self) -> children.Child | None:
        """Return the reconciler that leads now."""
        pid = self.leader()
        return next((child for child in self.reconcilers if child.pid == pid), None)

    def backlog(self) -> int:
        """Count the jobs that are enqueued and have not ended."""
        return len(self.reader.ledger.owed())

    def is_busy(self, worker: children.Child) -> bool:
        """Return True if a worker or its work-horse runs a job."""
        marks = self.reader.ledger.running.values()
        return not worker.ended and any(worker.pid in (mark.pid, mark.parent) for mark in marks)

    def lists(self) -> Mapping[str, Sequence[bytes]]:
        """Return the key of each list of waiting jobs in Redis, with its members."""
        return self.library.layout.lists(self.client, QUEUES)

    def await_(self, is_ready: Callable[[], bool], what: str) -> None:
        """Wait for a condition that must hold before the run can begin."""
        deadline = time.monotonic() + START_SECONDS
        while not is_ready():
            for child in (*self.reconcilers, *self.workers.values(), *self.services):
                if child.ended:
                    raise ChaosError(f"a process does not start:\n{child.last_words}")
            if time.monotonic() > deadline:
                raise ChaosError(f"not there after {START_SECONDS:.0f} s: {what}")
            time.sleep(0.05)

    def about(self, numbers: Iterable[int]) -> list[dict[str, Any]]:
        """Return the data of the stores about these jobs, for the search for a cause."""
        ids = {number: job_id for job_id, number in self.reader.ledger.number_of.items()}
        return [self._about(number, ids.get(number)) for number in numbers]

    def _about(self, number: int, job_id: str | None) -> dict[str, Any]:
        reported: dict[str, Any] = {"number": number, "job_id": job_id}
        if job_id is None:
            return reported
        for table, query in _ABOUT.items():
            reported[table] = [row for (row,) in self.ask(query, job_id)]
        reported["redis"] = self.library.layout.about(self.client, QUEUES, job_id)
        return reported

    def dump(self) -> None:
        """Write the final content of both stores into the folder, for the search for a cause."""
        with (self.folder / "postgres.jsonl").open("w") as file:
            for (table,) in self.ask(_TABLES):
                query = f"select to_jsonb(t) - 'envelope' from jobguard.{table} t"
                file.writelines(json.dumps({table: row}) + "\n" for (row,) in self.ask(query))
        with (self.folder / "redis.jsonl").open("w") as file:
            for key in self.client.scan_iter(count=1000):
                reported = {"key": key.decode(errors="replace"), "value": str(self._value(key))}
                file.write(json.dumps(reported) + "\n")

    def _value(self, key: bytes) -> Any:
        client: Any = self.client
        read = {
            b"string": client.get,
            b"list": lambda key: client.lrange(key, 0, -1),
            b"set": client.smembers,
            b"zset": lambda key: client.zrange(key, 0, -1, withscores=True),
            b"hash": client.hgetall,
        }
        return read.get(client.type(key), client.type)(key)

    # -- processes
    # ----------------------------------------------------------------------------------

    def _reconciler(self, number: int) -> children.Child:
        more = {"JOBGUARD_MODE": "observe"} if self.plan.sabotage else {}
        return children.Child(
            [*JOBGUARD, "reconcile", "--redis", self.redis.url, "--log-json"],
            environ=self._environ(RECONCILER_FAILPOINTS)
            | more,  # it does not get the path of the ledger
            log=self.folder / f"reconciler-{number}.log",
        )

    def _member(self, role: Role, **more: str) -> children.Child:
        return self._host(role.name, role.arguments, role.queues, role.failpoints or {}, **more)

    def _host(
        self,
        name: str,
        arguments: Sequence[str],
        queues: Sequence[str],
        places: Mapping[str, float],
        **more: str,
    ) -> children.Child:
        reported = {ledger.VARIABLE: str(self.ledger_path), REDIS_VARIABLE: self.redis.url}
        return children.Child(
            ["-m", self.library.module, *arguments, *queues],
            environ=self._environ(places) | reported | more,
            log=self.folder / f"{name}.log",
        )

    def _environ(self, places: Mapping[str, float]) -> dict[str, str]:
        wanted = {name: share for name, share in places.items() if self.plan.hits.get(name)}
        environ = children.clean_environment() | SETTINGS
        environ |= {
            "PYTHONPATH": str(ROOT),
            "JOBGUARD_POSTGRES_URL": self._url_of_hosts,
        }
        if not self.plan.guarded:
            environ["JOBGUARD_DISABLED"] = "1"
        if wanted:
            environ |= {
                "JOBGUARD_TESTING": "1",
                "JOBGUARD_FAILPOINT": ",".join(f"{name}:{wanted[name]}" for name in wanted),
                "JOBGUARD_FAILPOINT_LOGS": str(self.kills.armed),
            }
        return environ

    def _children(self, stack: contextlib.ExitStack) -> list[children.Child]:
        made: list[children.Child] = []

        def end() -> None:
            for child in made:
                if child.pid in self._paused:
                    self.resume(child)
            children.end(made)

        stack.callback(end)
        return made

    def _end_orphans(self) -> None:
        """Kill the work-horses whose worker was killed earlier; their environment names our ledger."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get(ledger.VARIABLE) == str(self.ledger_path):
                    process.kill()

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def wait_until_gone(process: psutil.Process) -> None:
    """Return when a killed process has ended, whichever process reaps it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.001)
