"""Celery's own tests against guarded applications: ``python -m tests.host_suites.celery``.

There are two kinds of them, and each runs by itself; see `suite.py`.

- ``t/integration``, with Redis as broker and result backend and a prefork worker: bare, guarded,
  and guarded while a leader leads.
- ``t/unit``, mostly with a broker in memory and mocks: bare, and with every application hooked as
  if its broker were Redis. A recorder that accepts everything replaces the core
  (`inside/recorder.py`).

``t/smoke`` is not run: each of its tests starts workers and brokers as containers, from images.
Allowed differences are in DOCUMENTED and DOCUMENTED_WHILE_LED; any other difference makes the exit
code 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.host_suites.suite import (
    Run,
    Suite,
    action,
    bare_and_guarded,
    distribution,
    interpreter,
    servers,
)

DOCUMENTED: dict[str, str] = {}
"""Tests (with * for several) that may fail guarded, with the reason."""
DOCUMENTED_WHILE_LED: dict[str, str] = {}
"""Further tests that may fail while a leader leads."""

_NEEDS = (
    "boto3",
    "cryptography",
    "django",
    "ephem",
    "eventlet",
    "fakeredis[lua]",
    "freezegun",
    "gevent",
    "moto",
    "msgpack",
    "pydantic",
    "pymemcache",
    "pymongo",
    "pytest-click",
    "pytest-order",
    "pytest-rerunfailures",
    "pytest-subtests",
    "pyyaml",
    "sqlalchemy",
    "tblib",
)
"""Packages that Celery's tests import, except clients of services that are no queues."""
_OPTIONS = (
    "-p",
    "celery.contrib.pytest",
    "--continue-on-collection-errors",
    "--timeout=300",
)
_WENT_ON = "ERROR jobguard failed, and the host continued without it"
_EXPECTED_ERRORS = (
    "ERROR a target cannot be guarded *jobguard guards Celery on Redis only*",
    "ERROR a target cannot be guarded *No such transport: foo*",
    f"{_WENT_ON} * error=*Mock*",
    # Tests that make a request themselves: one without an id, or with errors for its arguments.
    f"{_WENT_ON} where='start' error=\"'id'\"*",
    f"{_WENT_ON} where='start' error='Object of type * is not JSON serializable'*",
    f"{_WENT_ON} *'Mock' object*",
    # Tests of settings that Celery refuses, with this error, as soon as one of them is read.
    "ERROR jobguard * ImproperlyConfigured(*",
    f"{_WENT_ON} error='*Cannot mix new setting names with old setting names*",
)
_ENVIRONMENT = {
    "C_FORCE_ROOT": "1",  # the user who runs this as root knows it already
    "TEST_BROKER": "redis://localhost:{port}",  # one test puts a proxy before this address
    "TEST_BACKEND": "redis://localhost:{port}",
}
_RECORDER = {
    "HOST_SUITE_GUARDED": "1",
    "HOST_SUITE_RECORDER": "1",
    "JOBGUARD_POSTGRES_URL": "postgresql://nobody@localhost/none",  # never connected to
}


def main() -> int:
    """Run the tests, compare the runs, and print the differences."""
    options = _options()
    folder = distribution("celery", options.version)
    python = interpreter("celery", options.version, _NEEDS)
    codes = []
    for kind, least in (("t/unit", 0.02), ("t/integration", 1.0)):
        suite = Suite(
            "celery",
            folder,
            [test for test in options.tests if test.startswith(kind)],
            _OPTIONS,
            _ENVIRONMENT,
            python,
            least_recorded=least,
            in_turn=kind == "t/integration",
            expected_errors=_EXPECTED_ERRORS,
        )
        if suite.tests:
            print(f"\n==== {kind}")
            codes.append(_run(suite, kind, options.keep))
    print("\nt/smoke: not run, each of its tests needs containers")
    return max(codes, default=2)


def _run(suite: Suite, kind: str, keep: Path | None) -> int:
    with servers(keep and keep / kind.replace("/", "-")) as at:
        if kind == "t/integration":
            return action(suite, bare_and_guarded(at, DOCUMENTED, DOCUMENTED_WHILE_LED))
        bare = Run("bare", at.folder / "bare", at.redis())
        hooked = Run(
            "hooked",
            at.folder / "hooked",
            at.redis(),
            documented=DOCUMENTED,
            environment=_RECORDER,
        )
        return action(suite, [bare, hooked])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.host_suites.celery", description=__doc__)
    parser.add_argument(
        "--version", default="5.7.0", help="version of Celery; default: %(default)s"
    )
    parser.add_argument("--keep", type=Path, help="keep the output of the runs in this folder")
    both: Sequence[str] = ("t/unit", "t/integration")
    parser.add_argument("tests", nargs="*", default=both, help="files or ids, as for pytest")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
