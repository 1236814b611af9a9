"""The faults of a run: when Redis and a worker are killed, and what is seen afterwards.

Redis is killed with -9 and comes back empty half a second later. One worker is killed with -9 in
the middle of a job. All observations are made from outside: in Redis itself and in the ledger of
the tasks. Only the moment of detection comes from jobguard's own table of incidents.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import psutil
import psycopg
import redis

from jobguard.clients import client_from_url
from jobguard.demo.children import kill_tree
from jobguard.demo.figures import RedisKill, WorkerKill
from jobguard.demo.producer import is_long

if TYPE_CHECKING:
    from collections.abc import Callable

    from jobguard.demo.ledger import Reader
    from jobguard.demo.libraries import Library
    from jobguard.demo.servers import RedisServer

DOWN_SECONDS = 0.5
INSPECT_SECONDS = 0.1
LOST_FOR_GOOD_SECONDS = 30.0  # the next kill waits so long for the last recovery
FRESH_SECONDS = 0.25  # a long job that started so recently still runs while its worker is killed


@dataclass(frozen=True, slots=True)
class Forecast:
    """The times of the kills, as shares of the jobs that are done."""

    redis: tuple[float, ...]
    worker: float


def forecast(kills: int, seed: int) -> Forecast:
    """Spread the kills: two of Redis at about 25 % and 55 %, and one of a worker between them."""
    chance = random.Random(seed)
    apart = 0.6 / kills
    jitter = min(0.03, apart / 8)
    first = 0.25
    return Forecast(
        redis=tuple(
            first + number * apart + chance.uniform(-jitter, jitter) for number in range(kills)
        ),
        worker=first + apart / 2 + chance.uniform(-jitter, jitter),
    )


@dataclass(slots=True)
class Loss:
    """The jobs that one kill of Redis took, and those that are still absent."""

    kill: RedisKill
    absent: set[int]
    taken: int | None = None
    inspect_at: float = 0.0  # earliest time of the next inspection, by the monotonic clock

    @property
    def back(self) -> int:
        """Number of jobs that were absent and are present again."""
        return 0 if self.taken is None else self.taken - len(self.absent)


@dataclass
class FaultPlan:
    """Make the kills at the planned moments, one step at each tick."""

    jobs: int
    library: Library
    server: RedisServer
    reader: Reader
    forecast: Forecast
    postgres: str | None  # the database of the incidents; None without jobguard
    recovers: bool  # True if a reconciler restores lost jobs: then the next kill waits for that
    announce: Callable[[str], None]
    losses: list[Loss] = field(default_factory=list)
    redis_kills: list[RedisKill] = field(default_factory=list)
    worker_kills: list[WorkerKill] = field(default_factory=list)
    worker_was_caught: bool = False

    def __post_init__(self) -> None:
        """Make the clients for the inspections."""
        # The timeout is short, because a client must not hang on the server that was killed.
        self._redis = client_from_url(self.server.url, timeout=2.0)
        self._postgres = Incidents(self.postgres) if self.postgres else None

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()
        if self._postgres:
            self._postgres.close()

    @property
    def is_over(self) -> bool:
        """True if all kills were made and nothing is left to watch."""
        return (
            len(self.redis_kills) == len(self.forecast.redis)
            and self.worker_was_caught
            and self._is_quiet()
        )

    @property
    def redis_is_up(self) -> bool:
        """True if Redis runs at the moment."""
        return not self.redis_kills or self.redis_kills[-1].up_at is not None

    @property
    def absent(self) -> int:
        """Number of owed jobs that the last inspection found nowhere."""
        return len(self.losses[-1].absent) if self.losses else 0

    @property
    def back(self) -> int:
        """Number of jobs that were absent once and came back."""
        return sum(loss.back for loss in self.losses)

    def waiting(self) -> int:
        """Count the jobs in the queue; 0 while Redis is down."""
        try:
            return self.library.waiting(self._redis)
        except redis.RedisError:
            return 0

    def tick(self) -> None:
        """Do the steps that are due."""
        if not self.redis_is_up:
            if time.time() - self.redis_kills[-1].at >= DOWN_SECONDS:
                self._bring_redis_back()
            return
        if self.losses:
            self._inspect(self.losses[-1])
        if self._redis_kill_is_due():
            self._kill_redis()
        elif self._worker_kill_is_due():
            self._kill_worker()

    def _redis_kill_is_due(self) -> bool:
        done = len(self.redis_kills)
        if done == len(self.forecast.redis) or not self._is_quiet():
            return False
        ledger = self.reader.ledger
        # If no reconciler restores lost jobs, the forecast may ask for more done jobs than there
        # can ever be. Then the kill comes while there is still something to lose.
        reachable = 0.9 * (self.jobs - self.absent)
        if ledger.executed >= min(self.forecast.redis[done] * self.jobs, reachable):
            return True
        # The first kill must happen while the producer works, also if workers are few and slow.
        return done == 0 and len(ledger.enqueued) >= 0.8 * self.jobs

    def _is_quiet(self) -> bool:
        if not self.losses:
            return True
        kill = self.losses[-1].kill
        if kill.recovered_at is not None:
            return True
        patience = LOST_FOR_GOOD_SECONDS if self.recovers else 1.0
        return kill.up_at is not None and time.time() - kill.up_at > patience

    def _kill_redis(self) -> None:
        self.redis_kills.append(RedisKill(at=time.time()))
        self.server.kill()
        self.announce(
            f"[bold red]kill -9 redis[/]: {len(self.reader.ledger.enqueued):,} enqueued, "
            f"{self.reader.ledger.executed:,} done"
        )

    def _bring_redis_back(self) -> None:
        self.server.start()  # without persistence it comes back empty
        kill = self.redis_kills[-1]
        kill.up_at = time.time()  # start() has just got an answer from it
        self.reader.read()
        self.losses.append(Loss(kill, self.reader.ledger.owed()))

    def _inspect(self, loss: Loss) -> None:
        kill = loss.kill
        seen = kill.recovered_at is not None and (kill.detected_at or not self._postgres)
        if seen or time.monotonic() < loss.inspect_at:
            return
        began_at = time.monotonic()
        if kill.detected_at is None and self._postgres:
            kill.detected_at = self._postgres.first_since(kill.at)
            if kill.detected_at:
                seconds = kill.detected_at - kill.at
                self.announce(f"the loss was detected {seconds:.2f} s after the kill")
        if kill.recovered_at is None:
            self._count_absent(loss)
        # Reading many long messages takes time from the workers: use a fifth of our time at most.
        took = time.monotonic() - began_at
        loss.inspect_at = began_at + max(INSPECT_SECONDS, 5 * took)

    def _count_absent(self, loss: Loss) -> None:
        """Find where the jobs are that were owed when Redis came back.

        This reads Redis and does not ask jobguard, because jobguard's own report of a recovery
        would prove nothing. A job counts as present if Redis has it in one of the library's lists,
        if a live worker has fetched it, or if it has ended in the meantime. The recorded moment is
        after the inspection, so the figure is too large by one inspection and never too small.
        """
        try:
            present = self.library.present(self._redis)
        except redis.RedisError:
            return
        self.reader.read()  # after Redis, so that a job that moved in between is seen in the ledger
        ledger, kill = self.reader.ledger, loss.kill
        loss.absent -= {ledger.number_of.get(job_id, 0) for job_id in present}
        loss.absent -= ledger.ends.keys()
        # For the jobs of a killed worker another promise holds (worker_timeout), with its own
        # figure.
        killed = {worker_kill.pid for worker_kill in self.worker_kills}
        for number in loss.absent & ledger.running.keys():
            worker = self.library.worker_of(ledger.running[number])
            if worker in killed or psutil.pid_exists(worker):
                loss.absent.remove(number)
        if loss.taken is None:
            loss.taken = len(loss.absent)
            self.announce(f"redis is back and empty: [bold]{loss.taken:,}[/] owed jobs are nowhere")
        if not loss.absent and kill.up_at is not None:
            kill.recovered_at = time.time()
            seconds = kill.recovered_at - kill.up_at
            self.announce(f"[green]all of them are back[/] {seconds:.2f} s after Redis")

    def _worker_kill_is_due(self) -> bool:
        if self.worker_was_caught:
            return False
        reachable = 0.8 * (self.jobs - self.absent)
        return self.reader.ledger.executed >= min(self.forecast.worker * self.jobs, reachable)

    def _kill_worker(self) -> None:
        for number, mark in self.reader.ledger.running.items():
            worker = self.library.worker_of(mark)
            is_fresh = time.time() - mark.at < FRESH_SECONDS
            if is_fresh and is_long(number, self.jobs) and psutil.pid_exists(worker):
                kill_tree(worker)
                self.worker_kills.append(WorkerKill(time.time(), worker, number))
                self.reader.read()
                # If this job ended before the kill after all, the next tick tries another one.
                self.worker_was_caught = number not in self.reader.ledger.ends
                self.announce(
                    f"[bold red]kill -9 worker[/] {worker} in the middle of job {number:,}"
                )
                return


class Incidents:
    """Read when jobguard recorded that it noticed a loss."""

    def __init__(self, url: str) -> None:
        self._connection = psycopg.connect(url, autocommit=True)
        asked_at = time.time()
        row = self._connection.execute("select extract(epoch from clock_timestamp())").fetchone()
        # The difference is tiny on one machine, but the database may be on another one.
        self._ahead = float(row[0]) - (asked_at + time.time()) / 2 if row else 0.0

    def first_since(self, at: float) -> float | None:
        """Return the time of the first incident since then, by our clock."""
        row = self._connection.execute(
            "select extract(epoch from min(opened_at)) from jobguard.incidents"
            " where opened_at >= to_timestamp(%s)",
            (at + self._ahead,),
        ).fetchone()
        return float(row[0]) - self._ahead if row and row[0] is not None else None

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()
