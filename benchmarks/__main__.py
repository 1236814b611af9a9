"""Run the measurements named on the command line, or all of them."""

from __future__ import annotations

import sys

from benchmarks import celery_work, enqueue, recovery, work

ALL = {
    "enqueue": enqueue.main,
    "work": work.main,
    "celery-work": celery_work.main,
    "recovery": recovery.main,
}


def main() -> None:
    """Run the requested measurements."""
    for name in sys.argv[1:] or ALL:
        if name not in ALL:
            raise SystemExit(f"there is no benchmark {name!r}: {', '.join(ALL)}")
        print(f"\n## {name}\n")
        ALL[name]()


if __name__ == "__main__":
    main()
