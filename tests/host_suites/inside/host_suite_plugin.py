"""Runs inside a host's own tests: notes how each test ended, and guards the objects of the tests."""

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

# The variable is for this process, not for processes that its tests start.
os.environ.pop("HOST_SUITE_PLUGIN", None)


if hasattr(_HOST, "prepare_tests"):
    _HOST.prepare_tests()  # now, because pytest loads their conftest.py next


def pytest_configure(config: pytest.Config) -> None:
    """Guard before a test module is imported, as an application would."""
    if _GUARDED:
        _log_to_file()
        if hasattr(_HOST, "guard_tests"):
            _HOST.guard_tests()


def pytest_plugin_registered(plugin: object) -> None:
    """Change a host's fixtures as soon as they are known."""
    if hasattr(_HOST, "prepare_fixtures") and getattr(plugin, "__name__", "").endswith("conftest"):
        _HOST.prepare_fixtures(plugin)


def _log_to_file() -> None:
    """Write our warnings into a file: tests that disable logging would lose an error of ours."""
    log: Any = logging.getLogger("jobguard")
    log.isEnabledFor = lambda level: level >= logging.WARNING
    handler = logging.FileHandler(_OUT / "complaints.log", delay=True)
    handler.setFormatter(_WithItsError("%(levelname)s %(message)s"))
    log.addHandler(handler)
    log.propagate = False


class _WithItsError(logging.Formatter):
    """Adds the error to the one line of a complaint."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Add the error, if one is logged."""
        text = super().formatMessage(record)
        error = record.exc_info and record.exc_info[1]
        return f"{text}: {' '.join(repr(error).split())}" if error else text


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Remove tests that are not requested, and skip tests that cannot run here."""
    if hasattr(_HOST, "is_asked_for"):
        items[:] = [item for item in items if _HOST.is_asked_for(item)]
    for item in items:
        reason = _HOST.out_of_reach(item) if hasattr(_HOST, "out_of_reach") else None
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Note errors of the collection too."""
    if report.outcome != "passed":
        _note(report, 0.0)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write each line at once, so that a run that hangs shows its last test."""
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
    """End the workers that a failed test left: this process would wait for them for ever."""
    if _GUARDED and hasattr(_HOST, "finish"):
        _HOST.finish()
    for child in multiprocessing.active_children():
        child.kill()
