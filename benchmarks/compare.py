"""Measure two revisions in alternation: ``python -m benchmarks.compare REV [PART ...]``.

Each revision runs in a process and on servers of its own, with its own jobguard and with the benchmarks
of this tree. Round by round, both measure the same case. The other revision is checked out into a
temporary worktree of git.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.report import number

HERE = Path(__file__).parent.parent
_ONLY = ("guarded", "relaxed", "record", "import", "first", "back", "seen")
"""Words of the cases in which jobguard takes part; the others are the same in both revisions."""


@contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """Give a folder with this revision."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(HERE), "worktree"]
        subprocess.run([*git, "add", "--detach", str(tree), revision], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=False)


def environment(tree: Path, folder: Path) -> dict[str, str]:
    """Return an environment in which Python finds this jobguard, and the benchmarks of this tree."""
    # A link, because the other revision has benchmarks too.
    (folder / "benchmarks").symlink_to(HERE / "benchmarks")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(tree)])}


class Side:
    """One revision, measured in a process of its own."""

    def __init__(self, tree: Path, part: str, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.side", part],
            cwd=folder,
            env=environment(tree, folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.about: dict[str, Any] = self._answer()

    def measure(self, table: int, case: int) -> float:
        """Return the figure of one round of this case."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{table} {case}\n")
        self._process.stdin.flush()
        return float(self._answer()["figure"])

    def close(self) -> None:
        """End the process and its servers."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise SystemExit("a revision could not be measured: its process ended")


def compare(revision: str, parts: list[str], rounds: int) -> None:
    """Print each case of both revisions, with the median of the ratios of the rounds."""
    with checked_out(revision) as other:
        for part in parts:
            with ExitStack() as stack:
                sides = []
                for tree in (HERE, other):
                    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                    side = Side(tree, part, folder)
                    stack.callback(side.close)
                    sides.append(side)
                _compare_part(*sides, revision=revision, rounds=rounds)


def _compare_part(here: Side, there: Side, *, revision: str, rounds: int) -> None:
    for at, table in enumerate(here.about["tables"]):
        print(f"\n{table['title']} ({table['unit']}), this tree / {revision}")
        for nth, name in enumerate(table["cases"]):
            if not any(word in name for word in _ONLY):
                continue
            pairs = []
            for turn in range(rounds):
                order = (here, there) if turn % 2 else (there, here)
                found = {side: side.measure(at, nth) for side in order}
                pairs.append((found[here], found[there]))
            ratios = [new / old for new, old in pairs]
            new, old = (statistics.median(figures) for figures in zip(*pairs, strict=True))
            low, _, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
            print(
                f"  {name:36} {number(new):>9} / {number(old):>9}"
                f"   x{statistics.median(ratios):.2f}  [{low:.2f} .. {high:.2f}]"
            )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("revision")
    parser.add_argument("parts", nargs="*", default=["enqueue", "work"])
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    compare(given.revision, given.parts or ["enqueue", "work"], given.rounds)


if __name__ == "__main__":
    main()
