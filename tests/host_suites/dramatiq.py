"""Dramatiq's own tests against guarded brokers: ``python -m tests.host_suites.dramatiq``.

Each test runs bare, guarded, and guarded while a leader leads, see `suite.py`. Tests that use a
StubBroker, which jobguard does not guard, run once more on Redis, bare and guarded. Allowed
differences are in DOCUMENTED and DOCUMENTED_WHILE_LED; any other difference makes the exit code 1.

Dramatiq's source distribution has its tests, but neither their fixtures (``tests/conftest.py``,
``tests/common.py``) nor ``tests/middleware``. These come from its repository, at the tag of the
version: from a clone of the maintainers' repository, or from ``--source``, which is a checkout or
any address that ``git clone`` accepts.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tests.host_suites.suite import (
    Run,
    Servers,
    Suite,
    action,
    bare_and_guarded,
    distribution,
    interpreter,
    ledger,
    servers,
)

_DECLINED = (
    "A worker that does not know an actor declines its message: another worker may know the actor (a "
    "rolling deployment). The leader puts the message back up to five times; then it is dead-lettered."
)
DOCUMENTED: dict[str, str] = {}
"""Tests (with * for several) that may fail guarded, with the reason."""
DOCUMENTED_WHILE_LED = {
    "tests/test_redis.py::test_redis_messages_belonging_to_missing_actors_are_rejected": _DECLINED,
}
"""Further tests that may fail while a leader leads."""
_ELEVEN_RUNS = (
    "The test expects eleven runs within 0.2 s of a broker in memory, with which it passes guarded. On "
    "Redis each retry is recorded and claimed as well: 0.21 s were measured."
)
DOCUMENTED_ON_REDIS = {
    "tests/middleware/test_retries.py::test_actor*_zero_m??_backoff": _ELEVEN_RUNS,
}
"""Tests made for a StubBroker that may fail on Redis."""

REPOSITORY = "https://github.com/Bogdanp/dramatiq"
_NEEDS = ("gevent", "pika", "prometheus_client", "pylibmc", "watchdog")
_OPTIONS = (
    "-o",
    "addopts=",  # Dramatiq's own options measure coverage
    "--ignore=tests/benchmarks",
    "--timeout=300",
)
_ON_REDIS = {"HOST_SUITE_STUBS_ON_REDIS": "1"}


def main() -> int:
    """Run the tests, compare the runs, and print the differences."""
    options = _options()
    folder = distribution("dramatiq", options.version)
    if not (folder / "tests" / "conftest.py").exists():
        _complete(folder, options.version, options.source)
    python = interpreter("dramatiq", options.version, _NEEDS)
    suite = Suite(
        "dramatiq",
        folder,
        options.tests,
        _OPTIONS,
        python=python,
        one_at_a_time=("tests/test_pidfile.py", "tests/test_watch.py"),
    )
    with servers(options.keep and options.keep / "as-they-are") as at:
        code = action(suite, bare_and_guarded(at, DOCUMENTED, DOCUMENTED_WHILE_LED))
    if options.tests != _ALL:
        return code
    print("\n==== tests that use a StubBroker, on Redis")
    suite = replace(suite, options=(*_OPTIONS, "--ignore=tests/test_stub_broker.py"))
    with servers(options.keep and options.keep / "on-redis") as at:
        return max(code, action(suite, _on_redis(at)))


def _on_redis(at: Servers) -> list[Run]:
    alone = ledger(at.postgres(), "alone")
    return [
        Run("bare", at.folder / "bare", at.redis(), environment=_ON_REDIS),
        Run("guarded", at.folder / "guarded", at.redis(), alone, DOCUMENTED_ON_REDIS, _ON_REDIS),
    ]


def _complete(folder: Path, version: str, source: str) -> None:
    """Add the missing files of the tests from the repository."""
    with tempfile.TemporaryDirectory(prefix="jobguard-host-") as made:
        checkout = Path(source)
        if not (checkout / "tests" / "conftest.py").exists():
            checkout = Path(made)
            clone = ("git", "clone", "--quiet", "--depth", "1", "--branch", f"v{version}")
            done = subprocess.run([*clone, source, made], check=False)
            if done.returncode:
                sys.exit(
                    f"dramatiq {version} is distributed without the fixtures of its tests, and "
                    f"{source} cannot be cloned: give --source a checkout of the tag v{version}"
                )
        for path in (checkout / "tests").rglob("*.py"):
            there = folder / path.relative_to(checkout)
            if not there.exists():
                there.parent.mkdir(exist_ok=True)
                shutil.copy(path, there)


_ALL: Sequence[str] = ["tests"]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.host_suites.dramatiq", description=__doc__
    )
    parser.add_argument(
        "--version", default="2.2.1", help="version of Dramatiq; default: %(default)s"
    )
    parser.add_argument(
        "--source", default=REPOSITORY, help="source of its fixtures; default: %(default)s"
    )
    parser.add_argument("--keep", type=Path, help="keep the output of the runs in this folder")
    parser.add_argument("tests", nargs="*", default=_ALL, help="files or ids, as for pytest")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
