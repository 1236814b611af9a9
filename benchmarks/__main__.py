"""Measure the named parts of the suite, or the usual ones: ``python -m benchmarks [PART ...]``."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from benchmarks import report
from benchmarks.measure import Row, measure
from benchmarks.parts import PARTS, USUAL
from benchmarks.site import site

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"


def main() -> None:
    """Measure, print, and write the figures where the command line says."""
    parser = argparse.ArgumentParser(
        prog="make bench",
        description="Parts: " + ", ".join(PARTS) + ". Without a name: " + ", ".join(USUAL) + ".",
    )
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--rounds", type=int, help="instead of the rounds of each table")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--manual", action="store_true", help="write them into docs/performance.md")
    parser.add_argument("--from", dest="before", type=Path, help="report this file of --json again")
    given = parser.parse_args()
    unknown = set(given.parts) - PARTS.keys()
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}: {', '.join(PARTS)}")
    if given.before is not None:
        text = given.before.read_text()
    else:
        text = report.as_json(
            _measured(given.parts or USUAL, given.rounds),
            shlex.join(["python", "-m", "benchmarks", *(w for w in sys.argv[1:] if w[0] != "/")]),
        )
    run = json.loads(text)
    if given.json is not None:
        given.json.write_text(text + "\n")
    if given.manual:
        report.into_manual(PAGE, run)
    if given.before is not None and not given.manual:
        print(report.markdown(run))


def _measured(parts: list[str], rounds: int | None) -> list[Row]:
    rows: list[Row] = []
    for part in parts:
        with site() as at, PARTS[part](at) as tables:
            for table in tables:
                found = measure(table, rounds=rounds)
                print(f"\n{table.title} ({'more' if table.is_rate else 'less'} is better)")
                print(report.text_of(found), flush=True)
                rows += found
    return rows


if __name__ == "__main__":
    main()
