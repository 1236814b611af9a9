"""Runs inside a host's own tests: notes how each ended, and has what they use guarded."""

from __future__ import annotations

import importlib
import json
import logging
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

_OUT = Path(os.environ["HOST_SUITE_OUT"])
_GUARDED = "HOST_SUITE_GUARDED" in os.environ
_HOST: Any = importlib.import_module(f"host_{os.environ['HOST_SUITE']}")

os.environ.pop("HOST_SUITE_PLUGIN", None)  # it is for this process, not for what its tests start


if hasattr(_HOST, "prepare_tests"):
    _HOST.prepare_tests()  # now, for what comes next is their conftest.py


def pytest_configure(config: pytest.Config) -> None:
    """Guard before a test module is imported, as an application would."""
    if _GUARDED:
        _listen()
        if hasattr(_HOST, "guard_tests"):
            _HOST.guard_tests()


def pytest_plugin_registered(plugin: object) -> None:
    """Let a host's fixtures be made to fit as soon as they are known."""
    if hasattr(_HOST, "prepare_fixtures") and getattr(plugin, "__name__", "").endswith("conftest"):
        _HOST.prepare_fixtures(plugin)


def _listen() -> None:
    """Keep what we complain of: tests that switch logging off would lose an error of ours."""
    log: Any = logging.getLogger("jobguard")
    log.isEnabledFor = lambda level: level >= logging.WARNING
    handler = logging.FileHandler(_OUT / "complaints.log", delay=True)
    handler.setFormatter(_WithItsError("%(levelname)s %(message)s"))
    log.addHandler(handler)
    log.propagate = False


class _WithItsError(logging.Formatter):
    """Says in the one line by which complaints are known also what the error was."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Add the error, if one is logged."""
        said = super().formatMessage(record)
        error = record.exc_info and record.exc_info[1]
        return f"{said}: {' '.join(repr(error).split())}" if error else said


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what is not asked for, or cannot run here."""
    if hasattr(_HOST, "is_asked_for"):
        items[:] = [item for item in items if _HOST.is_asked_for(item)]
    for item in items:
        reason = _HOST.out_of_reach(item) if hasattr(_HOST, "out_of_reach") else None
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Note also what could not even be collected."""
    if report.outcome != "passed":
        _note(report, 0.0)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write a line as soon as it is known, so that a run that hangs has told where."""
    if report.when == "call" or report.outcome != "passed":
        _note(report, report.duration)


def _note(report: pytest.TestReport | pytest.CollectReport, seconds: float) -> None:
    line = {
        "test": report.nodeid,
        "outcome": report.outcome,
        "seconds": round(seconds, 2),
        "why": _why(report),
    }
    with (_OUT / "results.jsonl").open("a") as results:
        results.write(json.dumps(line) + "\n")


def _why(report: pytest.TestReport | pytest.CollectReport) -> str:
    if report.failed:
        return str(report.longrepr)
    if report.skipped:
        known = getattr(report, "wasxfail", None)
        if known is not None:
            return f"known to fail: {known}"
        return (
            str(report.longrepr[2]).removeprefix("Skipped: ")
            if isinstance(report.longrepr, tuple)
            else ""
        )
    return ""


def pytest_unconfigure() -> None:
    """End the workers that a failed test left behind: this process would wait for them for ever."""
    if _GUARDED and hasattr(_HOST, "finish"):
        _HOST.finish()
    for child in multiprocessing.active_children():
        child.kill()
