"""What the leader does when much is owed: all lost and restored, then one lap, then a quiet minute.

One delivery of the library is recorded, and copied as often as LAP_JOBS says, in LAP_QUEUES queues.
Redis has none of them, which is the loss. The leader is a monitor of this process, so that its time and
memory can be measured. Prints Markdown, and one line of JSON for each size.
"""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import entry_points
from typing import Any
from uuid import UUID, uuid4

import psycopg
import redis

import jobguard
from jobguard.adapter import Source
from jobguard.demo.servers import PostgresServer, RedisServer
from jobguard.reconciler.source_monitor import SourceMonitor
from jobguard.schema import migrate
from jobguard.settings import Settings
from jobguard.store.leader import PostgresLeaderStore

JOBS = [int(n) for n in os.environ.get("LAP_JOBS", "10000,100000").split(",")]
QUEUES = int(os.environ.get("LAP_QUEUES", "1"))
LIBRARIES = os.environ.get("LAP_LIBRARIES", "rq,celery,dramatiq").split(",")
QUIET = float(os.environ.get("LAP_QUIET", "20"))
_COPY = """
insert into jobguard.jobs (source, token, job_id, queue, task, envelope, recorded_at)
select j.source,
       (lpad(to_hex((extract(epoch from now() - interval '1 hour') * 1000)::bigint + n / 10), 12, '0')
        || '7' || lpad(to_hex(n %% 4096), 3, '0') || '8' || substr(md5(n::text), 1, 15))::uuid,
       gen_random_uuid()::text, case when %(queues)s = 1 then j.queue else j.queue || (n %% %(queues)s) end,
       j.task, j.envelope, now() - interval '1 hour' + n * interval '1 us'
from (select * from jobguard.jobs limit 1) j, generate_series(1, %(jobs)s) n
"""


@dataclass
class Result:
    """The figures of one size. Seconds, unless the name says more."""

    library: str
    jobs: int
    queues: int
    restored: float = 0.0
    restored_cpu: float = 0.0
    lap: float = 0.0
    lap_cpu: float = 0.0
    longest_without_pulse: float = 0.0
    slowest_redis_command_ms: float = 0.0
    quiet_cpu_share: float = 0.0
    rss_mb: float = 0.0


def main() -> None:
    """Measure each size with each library."""
    columns = [
        "library", "jobs", "queues", "all restored", "leader CPU", "one lap", "leader CPU",
        "longest without a pulse", "slowest Redis command", "quiet CPU", "peak RSS",
    ]  # fmt: skip
    print("|", " | ".join(columns), "|")
    print("|---" * len(columns) + "|")
    lines = []
    for library in LIBRARIES:
        for jobs in JOBS:
            it = _measure(library, jobs)
            cells = [
                it.library, f"{it.jobs:,}", f"{it.queues:,}",
                f"{it.restored:.1f} s", f"{it.restored_cpu:.1f} s",
                f"{it.lap:.1f} s", f"{it.lap_cpu:.1f} s",
                f"{it.longest_without_pulse:.2f} s", f"{it.slowest_redis_command_ms:.1f} ms",
                f"{it.quiet_cpu_share:.1%}", f"{it.rss_mb:.0f} MB",
            ]  # fmt: skip
            print("|", " | ".join(cells), "|", flush=True)
            lines.append(json.dumps(asdict(it)))
    print("", *lines, sep="\n")


def _enqueue(library: str, url: str, postgres: str) -> None:
    """Record one delivery with this library."""
    if library == "rq":
        import rq

        queue = rq.Queue("lap", connection=redis.Redis.from_url(url))
        with jobguard.guard(queue, postgres=postgres):
            queue.enqueue("benchmarks.jobs.nothing", 1, "x" * 400)
    elif library == "celery":
        import celery

        app = celery.Celery("lap", broker=url)
        app.conf.task_default_queue = "lap"
        with jobguard.guard(app, postgres=postgres):
            app.send_task("nothing", (1, "x" * 400))
    else:
        import dramatiq
        from dramatiq.brokers.redis import RedisBroker

        broker = RedisBroker(url=url)
        with jobguard.guard(broker, postgres=postgres):
            broker.declare_queue("lap")
            broker.enqueue(
                dramatiq.Message("lap", "nothing", (1, "x" * 400), kwargs={}, options={})
            )


def _measure(library: str, jobs: int) -> Result:
    it = Result(library, jobs, QUEUES)
    with PostgresServer() as server, RedisServer() as broker:
        postgres, url = server.create_database("lap"), broker.url
        migrate(postgres)
        _enqueue(library, url, postgres)
        client = redis.Redis.from_url(url)
        client.flushall()
        with psycopg.connect(postgres, autocommit=True) as connection:
            connection.execute(_COPY, {"jobs": jobs, "queues": QUEUES})
            connection.execute("vacuum analyze jobguard.jobs")
            # Trusted from the first record, and known to be this Redis: a loss, and no first start.
            connection.execute(
                "insert into jobguard.queues (source, queue, trusted_since, clean_since)"
                " select distinct source, queue, to_timestamp(0), to_timestamp(0) from jobguard.jobs"
            )
            connection.execute("update jobguard.sources set pulse_epoch = gen_random_uuid(), pulse_n = 9,"
                               " run_id = %s", (client.info("server")["run_id"],))  # fmt: skip
        leader = _Leader(postgres, url)
        client.config_set("slowlog-log-slower-than", 2_000)
        client.config_resetstat()
        it.restored, it.restored_cpu = leader.until(lambda: _is_restored(leader), 3_600)
        it.lap, it.lap_cpu = leader.lap()
        it.longest_without_pulse = leader.longest
        slow: list[dict[str, Any]] = client.slowlog_get(128)  # type: ignore[assignment]
        it.slowest_redis_command_ms = max((one["duration"] for one in slow), default=0) / 1000
        began, cpu = time.monotonic(), time.process_time()
        leader.until(lambda: time.monotonic() - began > QUIET, 2 * QUIET)
        it.quiet_cpu_share = (time.process_time() - cpu) / (time.monotonic() - began)
        it.rss_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        leader.store.close()
    return it


class _Leader:
    """A leader in this process: the steps that its thread would do."""

    def __init__(self, postgres: str, url: str) -> None:
        settings = Settings(recovery_rate=1e9, lease=3_600)
        self.store = PostgresLeaderStore(lambda: postgres, "default", uuid4(), settings)
        self.term = self.store.elect(lease=3_600) or 0
        (row,) = self.store.sources()
        (found,) = (e for e in entry_points(group="jobguard.adapters") if e.name == row.library)
        client = redis.Redis.from_url(url, socket_timeout=10)
        source = Source(row.namespace, row.library, row.address, row.prefix, row.name)
        broker = found.load()().broker(source, client)
        installation = UUID(str(self.store.identity()["id"]))
        self.monitor = SourceMonitor(
            client, broker, self.store, row, installation, settings, named=False
        )
        self.longest = 0.0
        self._pulse: tuple[object, float] = (None, time.monotonic())
        watch = self.monitor._keep_watch
        self.monitor._keep_watch = lambda: self._note(watch())  # type: ignore[method-assign]

    def _note(self, health: Any) -> Any:
        pulse = self.monitor._pulse
        seen, now = (pulse._epoch, pulse._n), time.monotonic()
        if seen != self._pulse[0]:
            if self._pulse[0] is not None:
                self.longest = max(self.longest, now - self._pulse[1])
            self._pulse = (seen, now)
        return health

    def until(self, over: Callable[[], bool], within: float) -> tuple[float, float]:
        """Make steps until something holds; return the seconds, and those of the processor."""
        began, cpu = time.monotonic(), time.process_time()
        while not over():
            self.monitor.step(self.term, self.store.signs(self.term))
            if time.monotonic() - began > within:
                raise SystemExit(f"not within {within} s: {self.monitor.result.counts()}")
            if self.monitor.rest:
                time.sleep(0.05)
        return time.monotonic() - began, time.process_time() - cpu

    def lap(self) -> tuple[float, float]:
        """Make one lap with a cause."""
        self.monitor._walk_at_once = True
        laps = self.monitor._laps_done
        return self.until(lambda: self.monitor._laps_done > laps, 3_600)


def _is_restored(leader: _Leader) -> bool:
    return leader.monitor._incident_at is None and leader.monitor._laps_done > 0


if __name__ == "__main__":
    main()
