"""The ledger of the demo: many processes write it, and a reader reads it while it grows."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from jobguard.demo import tasks
from jobguard.demo.ledger import VARIABLE, Ledger, Reader, note

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path of a ledger that the environment names."""
    path = tmp_path / "ledger"
    monkeypatch.setenv(VARIABLE, str(path))
    return path


def test_a_task_writes_that_it_started_and_ended(path: Path) -> None:
    """The lines have the number of the job, the pid and two times in order."""
    tasks.work(7, 0.01)
    reader = Reader(path)
    assert reader.read()
    (start,), (end,) = reader.ledger.starts[7], reader.ledger.ends[7]
    assert start.pid == end.pid == os.getpid()
    assert end.at - start.at >= 0.01
    reader.close()


def test_a_reader_reads_the_new_lines(path: Path) -> None:
    """It also returns whether there were new lines."""
    reader = Reader(path)
    assert not reader.read()
    note("enqueued", 1, "an-id")
    assert reader.read()
    assert not reader.read()
    assert reader.ledger.owed() == {1}
    assert reader.ledger.number_of == {"an-id": 1}
    note("start", 1)
    assert reader.read()
    assert reader.ledger.running.keys() == {1}
    note("end", 1)
    assert reader.read()
    assert (reader.ledger.owed(), reader.ledger.running) == (set(), {})
    reader.close()


def test_half_a_line_waits_for_its_other_half(path: Path) -> None:
    """A reader may read the file at any moment."""
    reader = Reader(path)
    with path.open("a") as file:
        file.write("start 1 2 1000000000\nend 1 2 20000")
        file.flush()
        assert reader.read()
        assert not reader.ledger.ends
        file.write("00000\n")
    assert reader.read()
    assert reader.ledger.ends[1][0].at == 2.0
    reader.close()


def test_the_lines_of_many_writers_do_not_mix(path: Path) -> None:
    """Each line is one write at the end of the file."""
    program = "from jobguard.demo.ledger import note\nfor n in range(500): note('start', n)"
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    writers = [subprocess.Popen([sys.executable, "-c", program], env=environ) for _ in range(4)]
    assert [writer.wait() for writer in writers] == [0, 0, 0, 0]
    reader = Reader(path)
    reader.read()
    assert {len(marks) for marks in reader.ledger.starts.values()} == {4}
    assert len(reader.ledger.starts) == 500
    reader.close()


def test_a_strange_line_is_an_error() -> None:
    """Only the demo writes into the ledger."""
    with pytest.raises(ValueError, match="no line of a ledger"):
        Ledger().add("restored 1 2 3")
