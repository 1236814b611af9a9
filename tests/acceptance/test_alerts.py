"""A real Prometheus scrapes real reconcilers, and its alerts fire. ``make alerts`` plays every one.

Each of these faults made a test fail: a rule that reads a metric that does not exist; a rule of the absence
of a metric that another process still exports.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.acceptance.roads import Site
from tests.alerts.prometheus import Prometheus, binary, faster, rules
from tests.support import PATIENT, eventually, free_port

if TYPE_CHECKING:
    from pathlib import Path


def test_alerts_fire_in_a_real_prometheus_and_end_when_they_are_put_right(
    tmp_path: Path, database: str, redis_url: str
) -> None:
    """A pause and a killed reconciler fire their alert and no other; a healthy site fires none."""
    program = binary()
    if program is None:
        pytest.skip("no prometheus here: install it, for example Debian's package")
    site = Site(tmp_path, database, redis_url, **PATIENT)
    address = f"127.0.0.1:{free_port()}"
    try:
        site.reconciler("--http", address)
        with Prometheus(program, {"jobguard": [address]}, faster(rules())) as prometheus:
            led = "jobguard_led == 1 and jobguard_live == 1"
            eventually(lambda: prometheus.holds(led), message="the page is scraped")
            eventually(lambda: prometheus.firing() == set())

            assert site.command("pause").returncode == 0
            eventually(lambda: prometheus.firing() == {"JobguardHeld"})
            assert site.command("resume").returncode == 0

            site.children[0].close()
            eventually(lambda: prometheus.firing() == {"JobguardNoReconciler"})
            site.reconciler("--http", address)
            eventually(lambda: prometheus.firing() == set())
    finally:
        site.close()
