"""The demo keeps its promise, and fails if jobguard cannot recover."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from jobguard.demo.libraries import NAMES
from tests.support import eventually

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

# A run waits for jobs that may still come: see STALL_SECONDS in the harness.
pytestmark = pytest.mark.timeout(900)

JOBS = 600
SMALL = ("--jobs", str(JOBS), "--workers", "4", "--kills", "2", "--seed", "7")
FEWER = {
    "celery": ("--workers", "2"),
    "dramatiq": ("--workers", "2"),
}  # each runs several jobs at a time


def environment() -> dict[str, str]:
    """Return an environment in which the child imports this jobguard from every folder."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """Run the demo in a folder outside the repository."""
    return subprocess.Popen(
        [sys.executable, "-m", "jobguard.demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=cwd,
    )


def demo(*arguments: str, cwd: Path) -> tuple[int, dict[str, Any]]:
    """Run the demo to its end, and return its exit code and its one JSON object."""
    process = start("--json", *arguments, cwd=cwd)
    out, err = process.communicate()
    assert out, err
    return process.returncode, json.loads(out)


def of(library: str) -> tuple[str, ...]:
    """Return the options of a small run with this library."""
    return (*SMALL, "--library", library, *FEWER.get(library, ()))


COMPARED = "dramatiq"
"""The library that the comparison runs, with jobguard and without."""
ALONE = [name for name in NAMES if name != COMPARED]


@pytest.mark.parametrize("library", ALONE)
def test_nothing_is_lost_with_jobguard(library: str, tmp_path: Path) -> None:
    """Redis is killed twice and a worker once, and every accepted job runs once."""
    code, figures = demo(*of(library), cwd=tmp_path)
    assert_nothing_is_lost(library, figures)
    assert code == 0
    assert not list(tmp_path.iterdir())  # no ledger, spool or dump is left in the folder


def assert_nothing_is_lost(library: str, figures: Mapping[str, Any]) -> None:
    """Check the figures of a run with jobguard."""
    assert figures["library"] == library
    assert (figures["enqueued"], figures["executed"], figures["lost"]) == (JOBS, JOBS, 0)
    assert figures["duplicated"] == 0
    assert figures["recovered"] > 0
    if library == "rq":  # the other workers have more than one job at a time
        assert figures["restarted"] == 1
    assert figures["restarted"] >= 1
    assert figures["detect_seconds"] is not None
    assert figures["recover_seconds"] is not None


@pytest.mark.parametrize("library", ALONE)
def test_much_is_lost_without(library: str, tmp_path: Path) -> None:
    """The plain library loses many jobs under the same faults."""
    code, figures = demo("--unguarded", *of(library), cwd=tmp_path)
    assert_much_is_lost(figures)
    assert code == 1


def assert_much_is_lost(figures: Mapping[str, Any]) -> None:
    """Check the figures of a run without jobguard."""
    assert figures["enqueued"] == JOBS
    assert figures["lost"] > JOBS / 5
    assert figures["executed"] + figures["lost"] == JOBS
    assert (figures["detect_seconds"], figures["recover_seconds"]) == (None, None)


def test_the_demo_fails_when_recovery_is_sabotaged(tmp_path: Path) -> None:
    """If recovery is disabled, the demo finds the loss, reports it, and exits with 1."""
    code, figures = demo("--sabotage", *of("dramatiq"), cwd=tmp_path)
    assert figures["lost"] > 0
    assert figures["recover_seconds"] is None
    assert code == 1


def test_compare_shows_both(tmp_path: Path) -> None:
    """The comparison makes and shows both runs, and its exit code is that of the guarded run alone."""
    code, figures = demo("--compare", *of(COMPARED), cwd=tmp_path)
    assert_nothing_is_lost(COMPARED, figures)
    assert_much_is_lost(figures["unguarded"])
    assert figures.keys() - {"unguarded"} == figures["unguarded"].keys()
    assert code == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("library", "how"),
    [*((name, signal.SIGINT) for name in NAMES), ("rq", signal.SIGTERM)],
)
def test_an_interrupted_demo_leaves_nothing_running(
    library: str, how: signal.Signals, tmp_path: Path
) -> None:
    """An interrupted demo ends its servers, its workers, and the children of its workers."""
    keep = tmp_path / "kept"
    # Without jobguard all jobs may be lost before one of them ends.
    process = start("--keep", str(keep), *of(library), cwd=tmp_path)
    ledger = keep / "guarded" / "ledger"
    eventually(lambda: ledger.exists() and b"\nend" in ledger.read_bytes())
    demo = psutil.Process(process.pid)
    # Redis and some workers; the demo may be about to start some of them again.
    eventually(lambda: len(demo.children(recursive=True)) >= 4)
    children = demo.children(recursive=True)

    process.send_signal(how)
    process.communicate(timeout=240)
    assert process.returncode != 0
    # Another process reaps grandchildren, after some time.
    eventually(lambda: not [child for child in children if runs(child)])


def runs(process: psutil.Process) -> bool:
    """Return True if a process exists and is not a zombie."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
