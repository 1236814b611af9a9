"""Dramatiq's own tests against guarded brokers: ``python -m tests.host_suites.dramatiq``.

Each runs bare, guarded, and guarded while a leader leads, see `suite.py`; and those that use a
StubBroker, which jobguard leaves alone, once more on Redis, bare and guarded.
What may differ stands in DOCUMENTED and DOCUMENTED_WHILE_LED; anything else ends this with 1.

Dramatiq's source distribution has its tests, but neither their fixtures (``tests/conftest.py``,
``tests/common.py``) nor ``tests/middleware``. These come from its repository, at the tag of the
version: cloned from where its maintainers keep it, or from ``--source``, which is a checkout, or
anything that ``git clone`` takes.
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
    "A worker that does not know an actor declines its message: another may know it (a rolling deploy). "
    "It goes back up to five times, by the leader, and is dead-lettered after that."
)
DOCUMENTED: dict[str, str] = {}
"""Tests (with * for several) that may fail guarded, and why that is right."""
DOCUMENTED_WHILE_LED = {
    "tests/test_redis.py::test_redis_messages_belonging_to_missing_actors_are_rejected": _DECLINED,
}
"""The same while a leader leads."""
_ELEVEN_RUNS = (
    "Eleven runs within 0.2 s is asked of a broker in memory, with which it passes guarded. On Redis each "
    "retry is recorded and claimed as well: 0.21 s were measured."
)
DOCUMENTED_ON_REDIS = {
    "tests/middleware/test_retries.py::test_actor*_zero_m??_backoff": _ELEVEN_RUNS,
}
"""The same for those that are made for a StubBroker, on Redis."""

REPOSITORY = "https://github.com/Bogdanp/dramatiq"
_NEEDS = ("gevent", "pika", "prometheus_client", "pylibmc", "watchdog")
_OPTIONS = (
    "-o",
    "addopts=",  # theirs measure coverage
    "--ignore=tests/benchmarks",
    "--timeout=300",
)
_ON_REDIS = {"HOST_SUITE_STUBS_ON_REDIS": "1"}


def main() -> int:
    """Run, compare, and tell."""
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
    print("\n==== those that use a StubBroker, on Redis")
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
    """Add from the repository what the distribution leaves out of its tests."""
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
    parser.add_argument("--version", default="2.2.1", help="of Dramatiq; default: %(default)s")
    parser.add_argument("--source", default=REPOSITORY, help="of its fixtures; %(default)s")
    parser.add_argument("--keep", type=Path, help="keep what the runs write in this folder")
    parser.add_argument("tests", nargs="*", default=_ALL, help="files or ids, as for pytest")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
