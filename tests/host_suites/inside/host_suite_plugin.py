"""Runs inside a host's own tests: notes how each ended, and guards every Redis they use."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import redis

_OUT = Path(os.environ["HOST_SUITE_OUT"])
_DATABASES = range(17)  # RQ's tests look for an empty one from 4 on

os.environ.pop("HOST_SUITE_PLUGIN", None)  # it is for this process, not for what its tests start


def pytest_configure(config: pytest.Config) -> None:
    """Guard before a test module is imported, as an application would."""
    if "JOBGUARD_POSTGRES_URL" not in os.environ:
        return
    import jobguard

    _listen()
    for number in _DATABASES:
        jobguard.guard(redis.Redis(db=number))


def _listen() -> None:
    """Keep what we complain of: RQ's tests switch logging off, and an error of ours would be lost."""
    log: Any = logging.getLogger("jobguard")
    log.isEnabledFor = lambda level: level >= logging.WARNING
    handler = logging.FileHandler(_OUT / "complaints.log", delay=True)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    log.addHandler(handler)
    log.propagate = False


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write a line as soon as it is known, so that a run that hangs has told where."""
    if report.when != "call" and report.outcome == "passed":
        return
    line = {
        "test": report.nodeid,
        "outcome": report.outcome,
        "seconds": round(report.duration, 2),
        "why": str(report.longrepr) if report.failed else "",
    }
    with (_OUT / "results.jsonl").open("a") as results:
        results.write(json.dumps(line) + "\n")


def pytest_unconfigure() -> None:
    """End the workers that a failed test left behind: this process would wait for them for ever."""
    for child in multiprocessing.active_children():
        child.kill()
