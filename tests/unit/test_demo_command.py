"""The command `jobguard demo`, without a run, and the plan of its kills."""

from __future__ import annotations

import subprocess
import sys

import pytest
from click.testing import CliRunner

from jobguard.demo import command
from jobguard.demo.children import clean_environment
from jobguard.demo.fault_plan import forecast
from jobguard.demo.libraries import NAMES
from jobguard.demo.producer import LONG_JOBS, QUIET, Pace, is_long

LIBRARIES_OWN = ("RQ_REDIS_URL", "CELERY_BROKER_URL", "dramatiq_restart_delay")


def test_an_unknown_library_is_a_usage_error() -> None:
    """The error names the libraries that exist."""
    result = CliRunner().invoke(command, ["--library", "huey"])
    assert result.exit_code == 2
    assert all(f"'{name}'" in result.output for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_library_that_is_not_installed_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the extra that installs the library."""
    monkeypatch.setattr("importlib.util.find_spec", lambda asked: None)
    result = CliRunner().invoke(command, ["--library", name])
    assert result.exit_code == 1
    assert f"needs the package {name}; do: pip install 'jobguard[{name},embedded]'" in result.output


def test_sabotage_and_unguarded_exclude_each_other() -> None:
    """Without a reconciler, --sabotage has no meaning."""
    result = CliRunner().invoke(command, ["--unguarded", "--sabotage"])
    assert result.exit_code == 2


def test_importing_the_command_is_cheap() -> None:
    """The command line and every worker of the demo import the module of the command."""
    program = (
        "import sys, jobguard.demo; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(path for path in sys.path if path)},
    )
    assert {"rich", "psutil", "sqlalchemy", *NAMES}.isdisjoint(done.stdout.split())


def test_two_kills_come_at_a_quarter_and_at_half() -> None:
    """The kills of Redis come at about 25 % and 55 %, with a kill of a worker between them."""
    for seed in range(20):
        first, second = forecast(2, seed).redis
        assert first == pytest.approx(0.25, abs=0.03)
        assert second == pytest.approx(0.55, abs=0.03)
        assert first < forecast(2, seed).worker < second


@pytest.mark.parametrize("kills", [1, 2, 3, 7, 20])
def test_any_number_of_kills_comes_in_order_and_before_the_end(kills: int) -> None:
    """After the last kill there are still jobs to run."""
    for seed in range(20):
        planned = forecast(kills, seed)
        assert list(planned.redis) == sorted(planned.redis)
        assert len(planned.redis) == kills
        assert planned.redis[0] > 0.2 and planned.redis[-1] < 0.9
        assert 0.2 < planned.worker < 0.9


def test_a_seed_gives_the_same_plan_again() -> None:
    """Another seed gives another plan."""
    assert forecast(2, 5) == forecast(2, 5) != forecast(2, 6)


@pytest.mark.parametrize("jobs", [200, 1_000, 10_000])
def test_some_jobs_are_long_enough_to_be_killed_in(jobs: int) -> None:
    """The long jobs are spread over the whole run and are few, so that the run stays short."""
    long = [number for number in range(1, jobs + 1) if is_long(number, jobs)]
    assert 20 <= len(long) <= LONG_JOBS
    assert long[0] < 0.1 * jobs and long[-1] > 0.9 * jobs


def test_a_slow_producer_has_slower_workers() -> None:
    """Four jobs at once, with 8 ms overhead each, may run four fifths of the jobs enqueued a second."""
    pace = Pace(seconds=0.002, at_once=4, overhead=0.008)
    assert pace.takes(QUIET, 0.001 * QUIET) == 0.002  # quick enough
    takes = pace.takes(QUIET, 0.01 * QUIET)  # 100 enqueued a second
    assert 4 / (takes + pace.overhead) == pytest.approx(80)
    assert pace.takes(QUIET - 1, 60.0) == 0.002  # it had to connect first


def test_children_see_no_setting_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo runs with the default settings."""
    for name in ("JOBGUARD_WORKER_TIMEOUT", "DATABASE_URL", "REDIS_URL", *LIBRARIES_OWN):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("DEMO_OTHER", "kept")
    environ = clean_environment()
    assert "DEMO_OTHER" in environ
    assert not [name for name in environ if name.startswith("JOBGUARD_")]
    assert {"DATABASE_URL", "REDIS_URL", *LIBRARIES_OWN}.isdisjoint(environ)
