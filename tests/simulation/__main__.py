"""`python -m tests.simulation`: run schedules, and exit with 1 if one of them broke a rule."""

from __future__ import annotations

from tests.simulation import kernel

kernel.install()  # before any other module of the product or of this package

from tests.simulation.explore import main  # noqa: E402

if __name__ == "__main__":
    main()
