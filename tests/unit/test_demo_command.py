"""The command `jobguard demo`, without running it, and the forecast of its kills."""

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


def test_another_library_is_refused_with_what_there_is() -> None:
    """A usage error names those that exist."""
    result = CliRunner().invoke(command, ["--library", "huey"])
    assert result.exit_code == 2
    assert all(f"'{name}'" in result.output for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_library_that_is_not_installed_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the extra that brings it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda asked: None)
    result = CliRunner().invoke(command, ["--library", name])
    assert result.exit_code == 1
    assert f"needs the package {name}; do: pip install 'jobguard[{name},embedded]'" in result.output


def test_sabotage_and_unguarded_exclude_each_other() -> None:
    """Without a reconciler there is nothing to sabotage."""
    result = CliRunner().invoke(command, ["--unguarded", "--sabotage"])
    assert result.exit_code == 2


def test_importing_the_command_is_cheap() -> None:
    """The whole command line imports it, and so does every worker of the demo."""
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
    """About 25 % and 55 %, and a worker is killed between them."""
    for seed in range(20):
        first, second = forecast(2, seed).redis
        assert first == pytest.approx(0.25, abs=0.03)
        assert second == pytest.approx(0.55, abs=0.03)
        assert first < forecast(2, seed).worker < second


@pytest.mark.parametrize("kills", [1, 2, 3, 7, 20])
def test_any_number_of_kills_comes_in_order_and_before_the_end(kills: int) -> None:
    """The last one leaves work to be done."""
    for seed in range(20):
        planned = forecast(kills, seed)
        assert list(planned.redis) == sorted(planned.redis)
        assert len(planned.redis) == kills
        assert planned.redis[0] > 0.2 and planned.redis[-1] < 0.9
        assert 0.2 < planned.worker < 0.9


def test_a_seed_gives_the_same_forecast_again() -> None:
    """And another one another."""
    assert forecast(2, 5) == forecast(2, 5) != forecast(2, 6)


@pytest.mark.parametrize("jobs", [200, 1_000, 10_000])
def test_some_jobs_are_long_enough_to_be_killed_in(jobs: int) -> None:
    """Spread over the whole run, and few enough not to make it long."""
    long = [number for number in range(1, jobs + 1) if is_long(number, jobs)]
    assert 20 <= len(long) <= LONG_JOBS
    assert long[0] < 0.1 * jobs and long[-1] > 0.9 * jobs


def test_a_slow_producer_has_slower_workers() -> None:
    """Four at once, of 8 ms each besides, may do four fifths of what is enqueued in a second."""
    pace = Pace(seconds=0.002, at_once=4, overhead=0.008)
    assert pace.takes(QUIET, 0.001 * QUIET) == 0.002  # quick enough
    takes = pace.takes(QUIET, 0.01 * QUIET)  # 100 enqueued a second
    assert 4 / (takes + pace.overhead) == pytest.approx(80)
    assert pace.takes(QUIET - 1, 60.0) == 0.002  # it had to connect first


def test_children_see_no_setting_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the demo shows are the defaults."""
    for name in ("JOBGUARD_WORKER_TIMEOUT", "DATABASE_URL", "REDIS_URL", *LIBRARIES_OWN):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("DEMO_OTHER", "kept")
    environ = clean_environment()
    assert "DEMO_OTHER" in environ
    assert not [name for name in environ if name.startswith("JOBGUARD_")]
    assert {"DATABASE_URL", "REDIS_URL", *LIBRARIES_OWN}.isdisjoint(environ)
