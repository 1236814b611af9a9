"""One run: producers enqueue all the time, one fault follows another, and then the jobs are counted."""

from __future__ import annotations

import contextlib
import json
import math
import random
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg

from tests.chaos import soak
from tests.chaos.count import Count, count
from tests.chaos.faults import FAULTS
from tests.chaos.site import Site

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.chaos.faults import Steps
    from tests.chaos.plan import Plan

TICK_SECONDS = 0.02
APART = (1.0, 4.0)
"""Seconds between two faults: the next fault often occurs during the recovery from the one before."""
TRIES = 5
"""The tries of a fault that finds no target."""
TOP_UP_SECONDS = 270.0
"""Seconds for further faults, if some failpoints have too few deaths after the planned faults."""
TOP_UP_APART = 12.0
"""Seconds that are enough to elect another leader, which then detects a dead worker."""
LEADS_TO = {
    "after_incident_row": "flushall",
    "after_restore": "flushall",
    "after_void": "worker_kill",
}
"""The faults that make the reconciler reach its failpoints."""
QUIET_SECONDS = 2.0
OWED_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Fell:
    """A fault that happened."""

    name: str
    at: float  # its end, in seconds since the first call of enqueue
    seconds: float
    detail: str


@dataclass(slots=True)
class Result:
    """The report of one run."""

    library: str
    seed: int
    count: Count
    faults: list[Fell]
    missed: list[str]  # faults that found no target in any try
    failpoints: dict[str, int]
    restarts: int
    extra: dict[str, int]  # further faults, which lead to failpoints of the reconciler
    seconds: float
    about: list[dict[str, Any]] = field(default_factory=list)  # the jobs that went wrong
    # Of a soak, by process: MB for each hour, and lines of the log for each minute.
    growth: dict[str, float] = field(default_factory=dict)
    lines: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the whole report as plain values."""
        reported = asdict(self)
        return {**reported.pop("count"), **reported}


def run(plan: Plan, report: Callable[[str], None]) -> Result:
    """Make one run.

    Raises ChaosError and jobguard.demo.servers.ServerError.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_folder(plan))
        site = Site(plan, folder, stack)
        site.start(stack)
        result = _Run(site, report).to_the_end()
        (folder / "result.json").write_text(json.dumps(result.as_json(), indent=1, default=str))
        return result


@contextlib.contextmanager
def _folder(plan: Plan) -> Iterator[Path]:
    if plan.keep is not None:
        folder = plan.keep / f"{plan.library.name}-{plan.seed}"
        shutil.rmtree(folder, ignore_errors=True)  # a ledger is appended to
        folder.mkdir(parents=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="jobguard-chaos-", ignore_cleanup_errors=True) as name:
        yield Path(name)


class _Run:
    """The loop that supervises, causes the faults, and reads the ledger."""

    def __init__(self, site: Site, report: Callable[[str], None]) -> None:
        self._site, self._report, self._plan = site, report, site.plan
        self._chance = random.Random(site.plan.seed)
        order = list(site.plan.faults)
        self._chance.shuffle(order)
        self._waiting = order
        self._tries = dict.fromkeys(order, TRIES)
        self._fell: list[Fell] = []
        self._missed: list[str] = []
        self._extra: Counter[str] = Counter()
        self._began = self._moved_at = time.monotonic()
        self._watch = soak.Watch(site) if site.plan.soak else None
        self._lines: dict[str, float] = {}

    def to_the_end(self) -> Result:
        """Cause all faults, wait until nothing changes any more, and count."""
        site = self._site
        site.produce()
        site.kills.arm()
        self._pass(self._chance.uniform(*APART))
        if self._plan.soak:
            self._soak()
        else:
            self._all_faults(APART)
            self._go_on(lambda: len(site.reader.ledger.enqueued) >= self._plan.jobs)
        self._top_up()
        site.kills.disarm()
        self._lines = self._watch.lines() if self._watch else {}
        site.stop_producing()
        self._drain()
        if self._plan.keep is not None:
            site.dump()
            if self._watch is not None:
                self._watch.dump()
        return self._result()

    # -- the load and the faults -------------------------------------------------------------------

    def _all_faults(self, apart: tuple[float, float], until: float = math.inf) -> None:
        while self._waiting and time.monotonic() < until:
            self._deal(self._waiting.pop(0))
            self._pass(self._chance.uniform(*apart))

    def _soak(self) -> None:
        """Cause all faults again and again, until the time is over."""
        until = self._began + self._plan.soak
        while time.monotonic() < until:
            self._waiting = list(self._plan.faults)
            self._chance.shuffle(self._waiting)
            self._tries = dict.fromkeys(self._waiting, 1)  # Another round comes.
            self._all_faults(soak.APART, until)
        self._missed.clear()

    def _deal(self, name: str) -> None:
        at = time.monotonic()
        detail = self._step_through(FAULTS[name](self._site, self._chance))
        self._site.kills.arm()  # after a fault that must be alone
        if detail is not None:
            now = time.monotonic()
            fell = Fell(name, round(now - self._began, 1), round(now - at, 1), detail)
            self._fell.append(fell)
            self._report(f"{fell.at:6.1f} s  {name}: {detail}")
            return
        self._tries[name] -= 1
        (self._waiting if self._tries[name] else self._missed).append(name)

    def _step_through(self, steps: Steps) -> str | None:
        while True:
            try:
                next(steps)
            except StopIteration as over:
                detail: str | None = over.value
                return detail
            self._tick()

    def _top_up(self) -> None:
        """Continue until every failpoint has its deaths, and cause the faults that lead to failpoints."""
        until = time.monotonic() + TOP_UP_SECONDS
        while (unhit := self._unhit()) and time.monotonic() < until:
            self._tick()
            # One after another: after a loss of Redis, silence until then proves no death.
            place = next((place for place in LEADS_TO if place in unhit), None)
            if place is not None:
                self._lead_to(place)

    def _lead_to(self, place: str) -> None:
        """Make the reconciler reach one of its failpoints."""
        name, hits = LEADS_TO[place], self._site.kills.hits(place)
        self._step_through(FAULTS[name](self._site, self._chance))
        self._extra[name] += 1
        until = time.monotonic() + TOP_UP_APART
        self._go_on(lambda: self._site.kills.hits(place) > hits or time.monotonic() > until)

    def _unhit(self) -> list[str]:
        hits = self._plan.hits
        return [name for name, wanted in hits.items() if self._site.kills.hits(name) < wanted]

    def _tick(self) -> None:
        if self._site.reader.read():
            self._moved_at = time.monotonic()
        self._site.tend()
        self._site.pace()
        if self._watch is not None:
            self._watch.tend()
        for name, wanted in self._plan.hits.items():
            if self._site.kills.hits(name) >= wanted:
                self._site.kills.retire(name)
        time.sleep(TICK_SECONDS)

    def _pass(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        self._go_on(lambda: time.monotonic() >= until)

    def _go_on(self, until: Callable[[], bool]) -> None:
        while not until():
            self._tick()

    # -- the end -----------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Wait until all jobs have ended, or until nothing changes any more."""
        counted, patience = self._site.reader.ledger, self._plan.patience
        self._moved_at = time.monotonic()
        self._go_on(lambda: not counted.owed() or time.monotonic() - self._moved_at > patience)
        # A recorded job of an unanswered call comes too; a job that has ended might also come
        # again.
        comes = self._plan.guarded and not self._plan.sabotage
        until = time.monotonic() + (OWED_SECONDS if comes else 0.0)
        self._go_on(lambda: self._owes_nothing() or time.monotonic() > until)
        self._moved_at = time.monotonic()
        self._go_on(lambda: time.monotonic() - self._moved_at > QUIET_SECONDS)

    def _owes_nothing(self) -> bool:
        try:
            owed = self._site.ask("select job_id from jobguard.jobs")
        except psycopg.Error:
            return False
        known = self._site.reader.ledger.number_of
        return all(known.get(job_id) in self._site.foreign for (job_id,) in owed)

    def _result(self) -> Result:
        site = self._site
        children = site.processes().values()
        counted = count(site.reader.ledger, site.kills.all(), site.outages)
        went_wrong = dict.fromkeys((*counted.lost[:20], *counted.twice[:20], *counted.early[:20]))
        return Result(
            library=self._plan.library.name,
            seed=self._plan.seed,
            count=counted,
            faults=self._fell,
            missed=self._missed,
            failpoints={name: site.kills.hits(name) for name in self._plan.hits},
            restarts=sum(child.starts - 1 for child in children),
            extra=dict(self._extra),
            seconds=round(time.monotonic() - self._began, 1),
            about=site.about(went_wrong),
            growth=self._watch.growth() if self._watch else {},
            lines=self._lines,
        )
