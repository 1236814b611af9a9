"""Two reconcilers that Prometheus scrapes, and a guarded worker."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import rq

import jobguard.schema
from tests.acceptance import roads
from tests.acceptance.roads import Child, Site
from tests.support import eventually, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from jobguard.demo.servers import PostgresServer, RedisServer

IDLE = "reports"
"""A queue that no worker takes jobs from."""


class WatchedSite(Site):
    """A site whose servers may be broken; every process is started again as a supervisor does."""

    def __init__(self, folder: Path, postgres: PostgresServer, redis: RedisServer) -> None:
        super().__init__(
            folder, postgres.create_database("ledger"), redis.url, JOBGUARD_CRASH_BACKOFF="0"
        )
        jobguard.schema.migrate(self.postgres)
        self.server, self.redis = postgres, redis
        self.ports = [free_port() for _ in range(3)]
        """Of the two reconcilers, and of that of a copy."""
        self.reconcilers: dict[int, Child] = {}
        self._staff: Child | None = None

    @property
    def targets(self) -> dict[str, list[str]]:
        """The addresses that Prometheus scrapes, by job."""
        first, second, copy = (f"127.0.0.1:{port}" for port in self.ports)
        return {"jobguard": [first, second], "copy": [copy]}

    def begin(self) -> None:
        """Start everything, and return when lost jobs would be restored."""
        for number in (0, 1):
            self.reconcile(number)
        self.led()
        self.staffed()
        self.trusted()

    def reconcile(self, number: int, **more: str) -> Child:
        """Start one of the two reconcilers, or start it again."""
        if number in self.reconcilers:
            self.reconcilers[number].stop()
        options = ("--http", f"127.0.0.1:{self.ports[number]}")
        child = self.reconciler(*options, leads=False, **more)
        child.wait_for_log("reconciler_started")
        self.reconcilers[number] = child
        return child

    def led(self, number: int | None = None) -> None:
        """Wait until a reconciler leads, or this one."""
        query = "select pid from jobguard.leader where expires_at > now()"
        pids = [self.reconcilers[n].process.pid for n in self.reconcilers if number in (None, n)]
        eventually(lambda: set(self.ask(query)) & set(pids), 60, message="a leader")

    def staffed(self) -> Child:
        """Start the worker of the queue QUEUE, unless it runs."""
        if self._staff is None or self._staff.process.poll() is not None:
            self._staff = self.worker()
        return self._staff

    def run(self, *words: str) -> None:
        """Run a command of jobguard, which must succeed."""
        done = self.command(*words)
        assert done.returncode == 0, f"jobguard {' '.join(words)}: {done.stdout}{done.stderr}"

    def send(
        self,
        *job_ids: str,
        queue: str = IDLE,
        task: Callable[..., Any] = roads.say,
        word: str = "",
    ) -> None:
        """Send jobs from the application."""
        with self.producer() as (target, _):
            there = rq.Queue(queue, connection=target.connection)
            for job_id in job_ids:
                there.enqueue(task, word or str(self.ledger), job_id=job_id)

    def worked_off(self, queue: str = IDLE) -> None:
        """Let a worker run everything that waits in a queue."""
        worker = self.worker(queue=queue)
        self.nothing_is_owed(60)
        worker.stop()

    def waiting(self, queue: str = IDLE) -> int:
        """Return the number of jobs in a queue in Redis."""
        with self.client() as client:
            return int(client.llen(f"rq:queue:{queue}"))

    @contextmanager
    def traffic(self) -> Iterator[None]:
        """Send ten jobs a second inside the block; each must have run in the end."""
        stop = threading.Event()
        sent: list[str] = []
        errors: list[Exception] = []

        def send() -> None:
            try:
                with self.producer() as (queue, _):
                    while not stop.wait(0.1):
                        word = f"traffic-{time.monotonic_ns()}"
                        queue.enqueue(roads.say, str(self.ledger), word)
                        sent.append(word)
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=send)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
        assert not errors and sent, errors
        self.staffed()
        eventually(lambda: set(sent) <= set(roads.words(self.ledger)), 60, message="all have run")
