"""RQ's own tests against a guarded RQ: ``python -m tests.host_suites.rq [--version 3.0.0]``.

A guest must not be noticed. The tests of RQ's source distribution run three times at once, each on a
Redis of its own: bare; guarded, with every queue of every database recorded in a Postgres and every
worker hooked; and guarded while a leader's lease is live, which fences and accepted jobs go by. Every
test that passes bare and fails guarded is a difference, and so is every error that jobguard logs.
What may differ stands in DOCUMENTED and DOCUMENTED_WHILE_LED; anything else ends this with 1.

Nothing of RQ's is kept here: the distribution is fetched with pip into ``.venv/host-suites``. Its
tests are not changed; `inside/` says how they come to their Redis and their guard. No reconciler
acts: RQ's tests flush Redis between any two, and what is owed then is not for the next one.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

import jobguard.schema
from jobguard.servers import PostgresServer, RedisServer

_CANCELLED = (
    "It calls Queue.empty(), which is a cancel to us, then has RQ put the job back by an inner method "
    "outside of any worker. What was cancelled stays cancelled: the push is refused."
)
_KILLED = (
    "Killed is not failed (recover_killed): a run whose horse was killed, which RQ finds abandoned, or "
    "which is stuck in the intermediate queue goes back by the leader, within its crash budget."
)
DOCUMENTED = {
    "tests/test_retry.py::TestRetry::test_retry_interval": _CANCELLED,
    "tests/test_worker.py::TestWorker::test_handle_retry": _CANCELLED,
    "tests/test_repeat.py::TestRepeatEnqueue::test_repeat_schedule_interval_order": _CANCELLED,
}
"""Tests (with * for several) that may fail guarded, and why that is right."""
DOCUMENTED_WHILE_LED = DOCUMENTED | {
    "tests/test_dependencies.py::*::test_allow_failures_when_work_horse_killed": _KILLED,
    "tests/test_intermediate_queue.py::*::test_cleanup_intermediate_queue": _KILLED,
    "tests/test_intermediate_queue.py::*::test_cleanup_intermediate_queue_in_maintenance": _KILLED,
    "tests/test_registry.py::*::test_cleanup_continues_when_failure_callback_raises": _KILLED,
    "tests/test_registry.py::*::test_cleanup_moves_jobs_to_failed_job_registry": _KILLED,
    "tests/test_retry.py::*::test_cleanup_handles_retries": _KILLED,
    "tests/test_webhooks.py::*::test_abandoned_terminal_failure_fires_failed_webhook": _KILLED,
    "tests/test_worker.py::TestWorker::test_horse_fails": _KILLED,
}
"""The same while a leader leads: only then does anybody recover what RQ would give up."""

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
CACHE = Path(sys.prefix) / "host-suites"
LONGEST = 1800.0
"""Seconds for one run; it takes two minutes on an idle machine."""
LEAST_RECORDED = 0.5
"""Deliveries a test that passed: a run that records less was hardly guarded."""
AGAIN = 2
"""So often is a difference run alone before it is believed: RQ's own tests race now and then."""


@dataclass
class Run:
    """One run of the suite, and what came of it."""

    name: str
    folder: Path
    redis_port: int
    postgres: str | None = None
    documented: Mapping[str, str] = field(default_factory=dict)

    def start(self, suite: Path, tests: list[str]) -> subprocess.Popen[bytes]:
        """Start pytest on these tests."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "results.jsonl").unlink(missing_ok=True)
        with (self.folder / "output.txt").open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "pytest", "-q", *_OPTIONS, *tests],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=suite,
                env=self._environment(suite),
                start_new_session=True,
            )

    def _environment(self, suite: Path) -> dict[str, str]:
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("JOBGUARD_", "RQ_"))}
        ours = {
            # RQ itself comes from the distribution, in every process; the rest from our own place.
            "PYTHONPATH": os.pathsep.join((str(suite), str(HERE / "inside"))),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "HOST_SUITE_OUT": str(self.folder),
            "HOST_SUITE_REDIS_PORT": str(self.redis_port),
            "HOST_SUITE_PLUGIN": "1",
        }
        if self.postgres:
            ours["JOBGUARD_POSTGRES_URL"] = self.postgres
        return plain | ours

    def results(self) -> dict[str, tuple[str, str]]:
        """How each test ended, and why; of a test with parts, its worst."""
        found: dict[str, tuple[str, str]] = {}
        path = self.folder / "results.jsonl"
        for line in path.read_text().splitlines() if path.exists() else []:
            told = json.loads(line)
            if found.get(told["test"], ("",))[0] != "failed":
                found[told["test"]] = (told["outcome"], told["why"])
        return found

    def errors(self) -> Counter[str]:
        """What jobguard itself logged as an error."""
        path = self.folder / "complaints.log"
        lines = path.read_text().splitlines() if path.exists() else []
        return Counter(line for line in lines if line.startswith(("ERROR", "CRITICAL")))

    def recorded(self) -> int:
        """How many deliveries its ledger knows."""
        assert self.postgres is not None
        count = (
            "select (select count(*) from jobguard.jobs) + (select count(*) from jobguard.history)"
        )
        with psycopg.connect(self.postgres) as connection:
            rows = connection.execute(count).fetchall()
        return int(rows[0][0])


_OPTIONS = (
    "-p",
    "host_suite_plugin",
    "-p",
    "no:xdist",
    "-p",
    "no:timeout",
    "-p",
    "no:cacheprovider",
)


def main() -> int:
    """Run, compare, and tell."""
    options = _options()
    suite = _fetch(options.version)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jobguard-host-")))
        servers = [
            stack.enter_context(RedisServer(config={"databases": "17"}))
            for _ in ("bare", "", "led")
        ]
        postgres = stack.enter_context(PostgresServer(fsync=False))
        bare = Run("bare", folder / "bare", servers[0].port)
        alone, led = _ledger(postgres, "alone"), _ledger(postgres, "led", led=True)
        guarded = [
            Run("guarded", folder / "guarded", servers[1].port, alone, DOCUMENTED),
            Run("guarded, led", folder / "led", servers[2].port, led, DOCUMENTED_WHILE_LED),
        ]
        _play([bare, *guarded], suite, options.tests)
        if not bare.results():
            print((bare.folder / "output.txt").read_text())
            return 2
        verdicts = [_compare(bare, run, suite) for run in guarded]
    return 0 if all(verdicts) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.host_suites.rq", description=__doc__)
    parser.add_argument("--version", default="3.0.0", help="of RQ; default: %(default)s")
    parser.add_argument("tests", nargs="*", default=["tests"], help="files or ids, as for pytest")
    return parser.parse_args()


def _fetch(version: str) -> Path:
    """Return the folder of an unpacked source distribution."""
    there = sorted(CACHE.glob(f"rq-{version}/rq-*"))
    if not there:
        home = CACHE / f"rq-{version}"
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet")
        wanted = ("--no-deps", "--no-binary", ":all:", "--dest", str(home), f"rq=={version}")
        subprocess.run([*pip, *wanted], check=True)
        (archive,) = home.glob("*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(home, filter="data")
        there = [path for path in home.glob("rq-*") if path.is_dir()]
    return next(path for path in there if path.is_dir())


_AS_A_LEADER_WOULD = """
create function public.watch() returns trigger language plpgsql as $$
begin new.watched_at := 'infinity'; return new; end $$;
create trigger watch before insert on jobguard.sources for each row execute function public.watch();
create function public.trust() returns trigger language plpgsql as $$
begin
  insert into jobguard.queues (source, queue, trusted_since)
  values (new.source, new.queue, '-infinity') on conflict do nothing;
  return null;
end $$;
create trigger trust after insert on jobguard.jobs for each row execute function public.trust();
"""
"""Watch every Redis, and trust every queue."""


def _ledger(postgres: PostgresServer, name: str, *, led: bool = False) -> str:
    url = postgres.create_database(name)
    jobguard.schema.migrate(url)
    if led:
        with psycopg.connect(url) as connection:
            connection.execute(
                "insert into jobguard.leader (namespace, term, holder, host, pid, expires_at)"
                " values ('default', 1, gen_random_uuid(), 'nowhere', 1, now() + interval '1 day')"
            )
            connection.execute(_AS_A_LEADER_WOULD)
    return url


def _play(runs: list[Run], suite: Path, tests: list[str]) -> None:
    """Run the tests in all of these at once, and wait for their end."""
    children = [run.start(suite, tests) for run in runs]
    try:
        for run, child in zip(runs, children, strict=True):
            try:
                child.wait(LONGEST)
            except subprocess.TimeoutExpired:
                print(f"{run.name}: not done after {LONGEST:g} s; see the last test that ended")
    finally:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _compare(bare: Run, run: Run, suite: Path) -> bool:
    """Tell what differs; whether all of it is documented."""
    without, within = bare.results(), run.results()
    print(f"\n== {run.name}: {_counts(within)}; bare: {_counts(without)}")
    recorded = run.recorded()
    passed = sum(outcome == "passed" for outcome, _ in within.values())
    print(f"   {recorded:,} deliveries recorded")
    differs = [
        test
        for test, (outcome, _) in without.items()
        if outcome != "failed" and within.get(test, ("missing",))[0] not in (outcome, "skipped")
    ]
    confirmed = _confirmed(bare, run, suite, differs)
    fine = recorded >= LEAST_RECORDED * passed
    if not fine:
        print(f"   hardly guarded: {recorded} deliveries for {passed} tests")
    for test in differs:
        reason = next(
            (why for name, why in run.documented.items() if fnmatch.fnmatch(test, name)), None
        )
        if test not in confirmed:
            print(f"-- {test}: failed once, and not again alone")
        elif reason:
            print(f"-- {test}: as documented. {reason}")
        else:
            fine = False
            print(f"-- {test}: DIFFERS\n{within.get(test, ('', 'it never ended'))[1]}")
    for complaint, times in run.errors().items():
        fine = False
        print(f"-- jobguard logged ({times} times) {complaint}")
    return fine


def _confirmed(bare: Run, run: Run, suite: Path, tests: list[str]) -> set[str]:
    """Which of these fail guarded each time, and pass bare, when they run alone."""
    left = set(tests)
    for _ in range(AGAIN):
        for test in sorted(left):
            pair = [
                Run(one.name, one.folder / "again", one.redis_port, one.postgres)
                for one in (bare, run)
            ]
            _play(pair, suite, [test])
            outcomes = [one.results().get(test, ("missing", ""))[0] for one in pair]
            if outcomes[1] == "passed" or outcomes[0] == "failed":
                left.discard(test)
    return left


def _counts(results: dict[str, tuple[str, str]]) -> str:
    counts = Counter(outcome for outcome, _ in results.values())
    return ", ".join(f"{counts[outcome]} {outcome}" for outcome in sorted(counts)) or "nothing ran"


if __name__ == "__main__":
    sys.exit(main())
