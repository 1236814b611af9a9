"""The chaos program runs to its end, and finds the losses that it searches for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.libraries import LIBRARIES

pytestmark = pytest.mark.timeout(900)  # two runs beside three other tests on a small machine

ROOT = Path(__file__).parents[2]


def chaos(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Make one short run, and return its exit code and its report."""
    report = folder / "report.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.chaos", "--runs", "1", "--jobs", "200", "--seed", "7"),
            *("--json", str(report), *arguments),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert report.exists(), done.stdout + done.stderr
    return done.returncode, json.loads(report.read_text())


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_short_run_loses_nothing(tmp_path: Path, library: str) -> None:
    """After one FLUSHALL over a few hundred jobs, all jobs run once, and in the right order."""
    code, report = chaos(tmp_path, "--library", library, "--faults", "flushall")
    (run,) = report["runs"]
    assert [fault["name"] for fault in run["faults"]] == ["flushall"]
    assert run["enqueued"] == run["executed"] >= 200
    assert (run["lost"], run["twice"], run["early"], report["problems"]) == ([], [], [], [])
    assert code == 0


def test_sabotage_is_seen(tmp_path: Path) -> None:
    """If recovery is forbidden, the same run loses jobs, names them, and exits with 1.

    The count works in the same way for every library.
    """
    arguments = ("--library", "celery", "--faults", "redis_kill", "--sabotage")
    code, report = chaos(tmp_path, *arguments)
    (run,) = report["runs"]
    assert len(run["lost"]) == run["enqueued"] - run["executed"] > 0
    assert any(job["jobs"] for job in run["about"])  # PostgreSQL knows that these jobs are owed
    assert not report["passed"]
    assert code == 1
