"""The simulated protocol keeps its rules, and the simulation finds faults that are planted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PLANTED = (
    "absence_before_the_drain",
    "beats_list_nothing",
    "cancel_without_tombstone",
    "death_in_one_store",
    "deaths_are_not_charged",
    "delayed_message_held_twice",
    "ends_are_forgotten",
    "late_record_is_owed_again",
    "pulse_before_incident",
    "stale_claims_count",
    "superseded_before_its_successor",
    "superseded_without_tombstone",
)


def simulation(*arguments: str) -> dict[str, Any]:
    """Run the simulation in a process of its own: it replaces the clocks and locks of its interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.simulation", "--json", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "0"},
        timeout=600,
    )
    assert done.returncode in (0, 1), done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == bool(found["broken"])
    return found


@pytest.mark.parametrize("seed", range(4))
def test_the_rules_hold(seed: int) -> None:
    """In 250 random schedules of crashes, outages, lost answers and skewed clocks, no rule is broken."""
    found = simulation("--schedules", "250", "--seed", str(seed))
    assert not found["broken"], found
    assert found["schedules"] >= 250


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault: str) -> None:
    """A fault in the product breaks a rule in one of a hundred schedules that bring it to light."""
    found = simulation("--planted", fault, "--schedules", "100", "--no-simplify")
    assert found["broken"]
