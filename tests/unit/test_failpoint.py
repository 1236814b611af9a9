"""A failpoint kills a process only if the environment asks for it twice, and notes the pid."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobguard.failpoint import armed

ROOT = Path(__file__).parents[2]
PASSES = "from jobguard import failpoint; failpoint.hit('here'); failpoint.hit('there', when=False)"


def passes(folder: Path, **environ: str) -> int:
    """Pass two places in a separate process, and return its exit code."""
    return subprocess.run(
        [sys.executable, "-c", PASSES],
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "JOBGUARD_FAILPOINT_LOGS": str(folder)}
        | environ,
        timeout=60,
    ).returncode


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"JOBGUARD_TESTING": "1"},
        {"JOBGUARD_FAILPOINT": "here"},
        {"JOBGUARD_TESTING": "0", "JOBGUARD_FAILPOINT": "here"},
        {"JOBGUARD_TESTING": "1", "JOBGUARD_FAILPOINT": "elsewhere"},
        {"JOBGUARD_TESTING": "1", "JOBGUARD_FAILPOINT": "here:0"},
        {
            "JOBGUARD_TESTING": "1",
            "JOBGUARD_FAILPOINT": "there",
        },  # its condition does not hold
    ],
)
def test_no_process_dies_by_mistake(tmp_path: Path, environ: dict[str, str]) -> None:
    """No process dies without the test setting, at another place, or with a share of 0."""
    for name in ("here", "there"):
        (tmp_path / name).touch()
    assert passes(tmp_path, **environ) == 0
    assert (tmp_path / "here").read_text() == (tmp_path / "there").read_text() == ""


def test_an_armed_place_kills_and_notes_it(tmp_path: Path) -> None:
    """The process writes the place, its pid and the time, and dies by SIGKILL."""
    (tmp_path / "here").touch()
    code = passes(tmp_path, JOBGUARD_TESTING="1", JOBGUARD_FAILPOINT="there,here:1.0")
    assert code == -signal.SIGKILL
    (line,) = (tmp_path / "here").read_text().splitlines()
    name, pid, nanoseconds = line.split()
    assert (name, int(pid) > 0, int(nanoseconds) > 10**18) == ("here", True, True)


def test_no_process_dies_without_a_note(tmp_path: Path) -> None:
    """If the file for the note is missing, the process lives."""
    assert passes(tmp_path, JOBGUARD_TESTING="1", JOBGUARD_FAILPOINT="here") == 0
    assert list(tmp_path.iterdir()) == []


def test_shares_are_read_from_the_environment() -> None:
    """A place without a share kills at every pass."""
    environ = {"JOBGUARD_TESTING": "1", "JOBGUARD_FAILPOINT_LOGS": "/x"}
    assert armed(environ | {"JOBGUARD_FAILPOINT": "a:0.25, b,"}) == {"a": 0.25, "b": 1.0}
    assert armed({"JOBGUARD_FAILPOINT": "a"}) == {}
