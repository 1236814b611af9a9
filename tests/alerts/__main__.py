"""`python -m tests.alerts`: break what each alert is for, under a real Prometheus."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import click

from jobguard.demo.servers import PostgresServer, RedisServer
from tests.alerts.breakages import BREAKAGES, Breakage
from tests.alerts.prometheus import Prometheus, binary, faster, rules, seconds_of
from tests.alerts.site import WatchedSite
from tests.support import eventually

QUIET = 60.0
"""Seconds for which a healthy site is watched."""
SHOWN = 8.0
"""Seconds until Prometheus has seen what just happened: a page shows a reading of the last seconds."""
BOTH = "count(jobguard_postgres_up == 1) == 2"
"""Both reconcilers are scraped."""


class Alerts:
    """One site, its Prometheus, and what was found."""

    def __init__(self, site: WatchedSite, prometheus: Prometheus) -> None:
        self.site, self.prometheus = site, prometheus
        self.wrong: list[str] = []

    def play(self, breakage: Breakage) -> None:
        """Break it, see its alert, put it right, and see that no alert is left."""
        began = time.time()
        play = breakage.play(self.site)
        try:
            next(play)
            broken = time.time()
            self._wait(lambda: breakage.alert in self.prometheus.firing(), "it does not fire")
            fired = time.time()
            next(play, None)
            self._wait(lambda: not self.prometheus.firing(), "it stays")
            fine = time.time()
        finally:
            play.close()
        beside = self.prometheus.fired(began, fine) - {breakage.alert}
        print(
            f"{breakage.alert:24} {breakage.what} Fires after {fired - broken:.0f} s"
            f" ({broken - began:.0f} s to break); {breakage.remedy}; over {fine - fired:.0f} s later"
            + (f"; beside it {', '.join(sorted(beside))}" if beside else ""),
            flush=True,
        )
        if unexplained := beside - set(breakage.beside):
            names = ", ".join(sorted(unexplained))
            self.wrong.append(f"{breakage.name}: beside it fires, and must not: {names}")

    def _wait(self, is_so: Callable[[], bool], what: str) -> None:
        eventually(is_so, 120, message=f"{what}; firing: {self.prometheus.firing()}")

    @contextmanager
    def healthy(self, what: str, *, share: float = 0.5) -> Iterator[None]:
        """Check that no rule holds for more than a share of its time inside the block."""
        began = time.time()
        yield
        ended = time.time()
        held = {}
        for rule in rules():
            found = self.prometheus.series(rule["expr"], began, ended)
            longest = max((_longest(times) for _, times in found), default=0.0)
            if longest:
                held[rule["alert"]] = longest
            if longest > share * seconds_of(rule) or (found and not seconds_of(rule)):
                self.wrong.append(f"{what}: {rule['alert']} holds for {longest:.0f} s")
        print(f"{what}: {ended - began:.0f} s; held: {held or 'nothing'}", flush=True)


def _longest(times: Sequence[float]) -> float:
    """Return the length of the longest stretch without a gap."""
    longest, since = 0.0, times[0]
    for before, at in pairwise(times):
        if at - before > 0.75:
            since = at
        longest = max(longest, at - since)
    return longest + 0.5


def quiet(alerts: Alerts) -> None:
    """Watch a healthy site, with traffic."""
    with alerts.healthy("a healthy site"), alerts.site.traffic():
        time.sleep(QUIET)


def rolling_restart(alerts: Alerts) -> None:
    """Restart both reconcilers and the worker, one after the other, with traffic."""
    site = alerts.site
    with alerts.healthy("a rolling restart"), site.traffic():
        for number in (0, 1):
            site.reconcile(number)
            eventually(lambda: alerts.prometheus.holds(BOTH), 60)
            site.led()
        site.staffed().stop()
        site.staffed()
        time.sleep(SHOWN)


def flushed(alerts: Alerts) -> None:
    """Lose all data of Redis, with traffic; everything comes back by itself."""
    site = alerts.site
    with alerts.healthy("FLUSHALL"), site.traffic():
        site.send(*(f"flushed-{n}" for n in range(200)))
        with site.client() as client:
            client.flushall()
        eventually(lambda: site.waiting() == 200, 60)
        closed = "select count(*) from jobguard.incidents where closed_at is null"
        eventually(lambda: site.ask(closed) == [0], 60)
        time.sleep(SHOWN)
    site.worked_off()


HEALTHY = (quiet, rolling_restart, flushed)


@click.command()
@click.option("--only", "names", multiple=True, help="Only these breakages or alerts.")
@click.option("--prometheus", "program", default=None, help="The binary, if not the one on PATH.")
@click.option(
    "--sabotage",
    metavar="ALERT",
    default=None,
    help="Let this rule read a metric that does not exist, to check that this is found.",
)
def main(names: Sequence[str], program: str | None, sabotage: str | None) -> None:
    """Break what each alert is for, and let a real Prometheus judge."""
    program = program or binary()
    if program is None:
        raise click.UsageError(
            "no prometheus on PATH: install it (Debian's package prometheus), or name it by --prometheus"
        )
    given = faster(rules())
    for rule in given:
        if rule["alert"] == sabotage:
            rule["expr"] = rule["expr"].replace("jobguard_", "jobguard_gone_")
    chosen = [one for one in BREAKAGES if not names or one.alert in names or one.name in names]
    phases = [one for one in HEALTHY if not names or one.__name__.replace("_", "-") in names]
    if not chosen and not phases:
        known = [one.__name__.replace("_", "-") for one in HEALTHY] + [b.name for b in BREAKAGES]
        raise click.UsageError(f"the names are {', '.join(known)}, and those of the alerts")
    wrong: list[str] = []
    with (
        tempfile.TemporaryDirectory(prefix="jobguard-alerts-") as folder,
        PostgresServer() as postgres,
        RedisServer() as redis,
    ):
        site = WatchedSite(Path(folder), postgres, redis)
        try:
            site.begin()
            with Prometheus(program, site.targets, given) as prometheus:
                eventually(lambda: prometheus.holds(BOTH), 60, message="both are scraped")
                eventually(lambda: not prometheus.firing(), 60, message="no alert at first")
                alerts = Alerts(site, prometheus)
                for phase in phases:
                    phase(alerts)
                for breakage in chosen:
                    try:
                        alerts.play(breakage)
                    except AssertionError as error:
                        wrong.append(f"{breakage.name}: {error}")
                        break
                wrong += alerts.wrong
        except BaseException:
            for child in site.reconcilers.values():
                print(child.log[-3000:], file=sys.stderr)
            raise
        finally:
            site.close()
    for one in wrong:
        print(f"WRONG: {one}", file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
