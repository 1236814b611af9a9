"""Guards RQ in a process of its tests."""

from __future__ import annotations

import os

_DATABASES = range(17)  # RQ's tests search for an empty database from 4 on


def guard_here() -> None:
    """Hook RQ in a fresh interpreter that a test starts: a spawned horse, or the command `rq worker`."""
    if "HOST_SUITE_PLUGIN" not in os.environ:
        import jobguard.adapters.rq.workers  # noqa: F401 (the import is what hooks RQ)


def guard_tests() -> None:
    """Guard every Redis of the tests before a test module is imported, as an application would."""
    import redis

    import jobguard

    for number in _DATABASES:
        jobguard.guard(redis.Redis(db=number))
