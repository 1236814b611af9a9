"""One revision of a comparison: measure what stdin asks for, and answer on stdout; see compare.py."""

from __future__ import annotations

import json
import sys

from benchmarks.parts import PARTS
from benchmarks.site import site


def main() -> None:
    """Serve until stdin is closed."""
    with site() as at, PARTS[sys.argv[1]](at) as tables:
        about = [
            {"title": t.title, "unit": t.unit, "cases": [case.name for case in t.cases]}
            for t in tables
        ]
        print(json.dumps({"tables": about}), flush=True)
        for line in sys.stdin:
            table, case = map(int, line.split())
            print(json.dumps({"figure": tables[table].cases[case].run()}), flush=True)


if __name__ == "__main__":
    main()
