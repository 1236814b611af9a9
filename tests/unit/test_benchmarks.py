"""The benchmarks count and report what they measure."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import pytest

from benchmarks import compare, enqueue, report
from benchmarks.measure import Case, Row, Table, measure
from benchmarks.site import Site, delayed


def rows() -> list[Row]:
    """Return the rows of a small table."""
    fast, slow = iter([1.0, 2.0, 3.0]), iter([4.0, 4.0, 9.0])
    cases = [Case("bare", lambda: next(fast)), Case("guarded <1>", lambda: next(slow), base="bare")]
    return measure(Table("Enqueue, 1 ms", "us", cases, rounds=3))


def test_the_ratio_is_that_of_the_same_round() -> None:
    """The ratio is the median of the rounds' ratios, not the ratio of the medians."""
    bare, guarded = rows()
    assert (bare.median, bare.ratio) == (2.0, None)
    assert (guarded.median, guarded.ratio) == (4.0, 3.0)


def test_a_run_replaces_the_figures_of_the_manual(tmp_path: Path) -> None:
    """The page keeps its text; the tables and the drawings of the run before are gone."""
    page = tmp_path / "performance.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "old.svg").write_text("")
    report.into_manual(page, json.loads(report.as_json(rows(), "make bench")))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| guarded <1> | 4.00 | 4.00 to 9.00 | 3.00 of bare |" in text
    drawings = list((tmp_path / "figures").iterdir())
    assert [each.name for each in drawings] == ["enqueue--1-ms.svg"]
    assert "guarded &lt;1&gt;" in drawings[0].read_text()


def test_a_run_does_not_name_the_machine() -> None:
    """The report names the kind of the machine, and neither its name nor a path."""
    text = report.as_json(rows(), "make bench")
    assert socket.gethostname() not in text
    assert "/" not in json.dumps(json.loads(text)["machine"])


def test_a_delayed_network_delays_both_directions() -> None:
    """The proxy passes bytes on, and a round trip takes at least its time."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        delayed(f"redis://127.0.0.1:{server.getsockname()[1]}/0", 40) as url,
        socket.create_connection(("127.0.0.1", urlsplit(url).port or 0)) as client,
        server.accept()[0] as there,
    ):
        began = time.monotonic()
        client.sendall(b"ping")
        assert there.recv(10) == b"ping"
        there.sendall(b"pong")
        assert client.recv(10) == b"pong"
        assert time.monotonic() - began >= 0.04


def test_a_revision_is_measured_with_its_own_code(tmp_path: Path) -> None:
    """A side of a comparison imports jobguard from its own tree, and the benchmarks from this one."""
    tree = tmp_path / "tree"
    (tree / "jobguard").mkdir(parents=True)
    (tree / "jobguard" / "__init__.py").write_text("old = True\n")
    program = "import benchmarks, jobguard; print(jobguard.old, len(benchmarks.__path__))"
    folder = tmp_path / "side"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=compare.environment(tree, folder),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "True 1\n"


def test_an_unknown_part_is_a_usage_error(capfd: pytest.CaptureFixture[str]) -> None:
    """A wrong name ends with the list of parts."""
    done = subprocess.run([sys.executable, "-m", "benchmarks", "nonsense"], check=False)
    assert done.returncode == 2
    assert "latency" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "recorded", "fits"),
    [
        ("RQ, guarded", 60, True),
        ("RQ, guarded", 0, False),
        ("RQ, relaxed", 59, False),
        ("RQ, bare", 0, True),
        ("RQ, bare", 60, False),
    ],
)
def test_a_case_that_is_not_what_its_name_says_fails(
    monkeypatch: pytest.MonkeyPatch, name: str, recorded: int, fits: bool
) -> None:
    """A guarded case counts only if the ledger got all of its jobs, a bare one if it got none."""
    counts = iter([7, 7 + recorded])
    monkeypatch.setattr(Site, "_count", lambda _site, _table: next(counts))
    case = enqueue._case(cast(Any, Site)("", "", None), name, lambda: 1.0, 60)
    with nullcontext() if fits else pytest.raises(SystemExit, match="must have"):
        assert case.run() == 1.0
