"""The options of a run, and its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobguard.settings import Settings
from tests.chaos import soak

if TYPE_CHECKING:
    from pathlib import Path

    from tests.chaos.libraries import Library

SETTINGS = {
    # The rules of the defaults, with shorter times: a run shall end in minutes.
    "JOBGUARD_WORKER_TIMEOUT": "6",
    "JOBGUARD_BEAT_INTERVAL": "1",
    "JOBGUARD_SWEEP_INTERVAL": "15",
    "JOBGUARD_GRACE": "3",
    "JOBGUARD_LEASE": "4",
    # Also on a busy machine, an end must be written within the 100 ms that excuse a second
    # completion.
    "JOBGUARD_ENDS_INTERVAL": "0.02",
    # A job that meets four deaths by chance must not be given up, nor wait five minutes.
    "JOBGUARD_CRASH_BUDGET": "20",
    "JOBGUARD_CRASH_BACKOFF": "0,1,2",
    # A deleted list is an absence without a cause; the brake would wait for a person.
    "JOBGUARD_BRAKE_COUNT": "100000",
    "JOBGUARD_BRAKE_SHARE": "1",
}
LOAD_SECONDS = 45.0
"""The jobs of a run are enqueued in this time, unless its faults take longer."""
HITS = 20
"""The required deaths at every failpoint, in all runs together."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One run."""

    library: Library
    jobs: int
    seed: int
    faults: tuple[str, ...]
    hits: dict[str, int]  # failpoint -> how many deaths it shall cause in this run
    sabotage: bool = False
    guarded: bool = True
    hostile: bool = False  # a pooler in front of a database with unusual defaults
    keep: Path | None = None
    soak: float = 0.0  # seconds in which fault follows fault, for as many jobs as come

    @property
    def rate(self) -> float:
        """The number of jobs for each second."""
        if self.soak:
            return soak.RATE
        return max(40.0, self.jobs / LOAD_SECONDS)

    @property
    def patience(self) -> float:
        """The seconds without any progress after which the run is over."""
        if self.sabotage or not self.guarded:
            return 8.0  # nothing is put back
        return max(30.0, 3 * float(SETTINGS["JOBGUARD_WORKER_TIMEOUT"]) + 2 * Settings().grace)
