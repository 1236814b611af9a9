"""The common part of the tests of every host: download, run, and comparison.

A host must not notice jobguard. The tests of a host's source distribution run several times at
once, each time on a Redis of its own: bare; guarded, where each push is recorded in a PostgreSQL
and every worker is hooked; and guarded while the lease of a leader is valid, which affects fences
and accepted jobs. Every test that passes bare and fails guarded is a difference, and so is every
error that jobguard logs.

The repository contains no file of a host: pip downloads the distributions into
``.venv/host-suites``. Their tests are not changed; `inside/` gives them their Redis and their
guard. No reconciler acts: the tests of a host flush Redis between any two tests, and the owed jobs
of one test must not reach the next test.
"""

from __future__ import annotations

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import psycopg

import jobguard.schema
from jobguard.demo.servers import PostgresServer, RedisServer

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
CACHE = Path(sys.prefix) / "host-suites"
LONGEST = 3600.0
"""Seconds for one run; the longest takes a quarter of an hour on an idle machine."""
AGAIN = 2
"""How often a difference is run alone before it counts: the tests of every host have races."""
_PIP = ("-m", "pip", "--disable-pip-version-check")


@dataclass(frozen=True)
class Suite:
    """The tests of a host, ready to run: the host from its distribution, the rest from ``python``."""

    host: str
    """The library; ``inside/host_<host>.py`` guards it."""
    folder: Path
    tests: Sequence[str]
    """Files or ids, as for pytest."""
    options: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    """``{port}`` in a value is the port of the run's Redis."""
    python: Path = Path(sys.executable)
    least_recorded: float = 0.5
    """Deliveries for each passed test: a run that records fewer was hardly guarded."""
    in_turn: bool = False
    """True if the runs come one after the other, because the tests have their own deadlines."""
    one_at_a_time: Sequence[str] = ()
    """Files whose tests use paths that all runs share: they run alone."""
    expected_errors: Sequence[str] = ()
    """Errors that jobguard may log (with *): about targets that it must not guard, about mocks of tests."""


@dataclass
class Run:
    """One run of the suite, and its results."""

    name: str
    folder: Path
    redis_port: int
    postgres: str | None = None
    """The address of its ledger; None: a bare run, or a run with the recorder."""
    documented: Mapping[str, str] = field(default_factory=dict)
    """Tests (with * for several) that may fail in it, with the reason."""
    environment: Mapping[str, str] = field(default_factory=dict)

    def start(self, suite: Suite, tests: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start pytest on these tests; new results are appended to the old results."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "output.txt").open("ab") as output:
            return subprocess.Popen(
                [str(suite.python), "-m", "pytest", "-q", *_OPTIONS, *suite.options, *tests],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=suite.folder,
                env=self._environment(suite),
                start_new_session=True,
            )

    def _environment(self, suite: Suite) -> dict[str, str]:
        theirs = ("JOBGUARD_", f"{suite.host.upper()}_")
        plain = {k: v for k, v in os.environ.items() if not k.startswith(theirs)}
        ours = {
            "PYTHONPATH": os.pathsep.join((str(suite.folder), str(HERE / "inside"))),
            "PATH": f"{suite.python.parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "HOST_SUITE": suite.host,
            "HOST_SUITE_OUT": str(self.folder),
            "HOST_SUITE_REDIS_PORT": str(self.redis_port),
            "HOST_SUITE_PLUGIN": "1",
        }
        if self.postgres:
            ours["HOST_SUITE_GUARDED"] = "1"
            ours["JOBGUARD_POSTGRES_URL"] = self.postgres
        reported = {**suite.environment, **self.environment}
        port = str(self.redis_port)
        return (
            plain | ours | {name: text.replace("{port}", port) for name, text in reported.items()}
        )

    def results(self) -> dict[str, tuple[str, str]]:
        """Return how each test ended, with the reason; for a test with parts, the worst end."""
        found: dict[str, tuple[str, str]] = {}
        path = self.folder / "results.jsonl"
        for line in path.read_text().splitlines() if path.exists() else []:
            reported = json.loads(line)
            if found.get(reported["test"], ("",))[0] != "failed":
                found[reported["test"]] = (reported["outcome"], reported["why"])
        return found

    def errors(self) -> Counter[str]:
        """Return the errors that jobguard itself logged."""
        path = self.folder / "complaints.log"
        lines = path.read_text().splitlines() if path.exists() else []
        return Counter(line for line in lines if line.startswith(("ERROR", "CRITICAL")))

    def recorded(self) -> int:
        """Return how many deliveries the ledger or the recorder has."""
        if self.postgres is None:
            return sum(int(path.read_text()) for path in self.folder.glob("recorded-*"))
        count = (
            "select (select count(*) from jobguard.jobs) + (select count(*) from jobguard.history)"
        )
        with psycopg.connect(self.postgres) as connection:
            rows = connection.execute(count).fetchall()
        return int(rows[0][0])


_OPTIONS = ("-p", "host_suite_plugin", "-p", "no:xdist", "-p", "no:cacheprovider")


@dataclass(frozen=True)
class Servers:
    """Starts the servers that each run has for itself."""

    stack: contextlib.ExitStack
    folder: Path

    def redis(self) -> int:
        """Start a Redis, and return its port."""
        return self.stack.enter_context(RedisServer(config={"databases": "17"})).port

    def postgres(self) -> PostgresServer:
        """Start a PostgreSQL."""
        return self.stack.enter_context(PostgresServer(fsync=False))


@contextlib.contextmanager
def servers(keep: Path | None = None) -> Iterator[Servers]:
    """Give a folder for the output, and servers. Both are removed at the end, except ``keep``."""
    with contextlib.ExitStack() as stack:
        if keep is None:
            temporary = tempfile.TemporaryDirectory(prefix="jobguard-host-")
            folder = Path(stack.enter_context(temporary))
        else:
            folder = keep
            # It must be a new folder: existing files would count as results of this run.
            folder.mkdir(parents=True)
        yield Servers(stack, folder)


def bare_and_guarded(
    at: Servers, documented: Mapping[str, str], while_led: Mapping[str, str]
) -> list[Run]:
    """Return the three runs: bare, guarded, and guarded while a leader leads."""
    postgres = at.postgres()
    alone, led = ledger(postgres, "alone"), ledger(postgres, "led", led=True)
    return [
        Run("bare", at.folder / "bare", at.redis()),
        Run("guarded", at.folder / "guarded", at.redis(), alone, documented),
        Run("guarded, led", at.folder / "led", at.redis(), led, {**documented, **while_led}),
    ]


def action(suite: Suite, runs: Sequence[Run]) -> int:
    """Execute the runs, compare them with the first one, print the result, and return the exit code."""
    bare, *guarded = runs
    aside = [name for name in suite.one_at_a_time if _are_wanted(name, suite.tests)]
    apart = [f"--ignore={name}" for name in aside]
    rest = [test for test in suite.tests if test not in aside]
    for together in [[run] for run in runs] if suite.in_turn else [list(runs)]:
        if rest:
            play(replace(suite, options=(*suite.options, *apart)), together, rest)
    for run in runs if aside else ():
        play(suite, [run], aside)
    if not bare.results():
        print((bare.folder / "output.txt").read_text())
        return 2
    fine = [_compare(suite, bare, run) for run in guarded]
    _print_tests_that_did_not_run(bare)
    return 0 if all(fine) else 1


def _are_wanted(name: str, tests: Sequence[str]) -> bool:
    """Return True if this file is among these tests."""
    return any(f"{name}/".startswith(test.rstrip("/") + "/") for test in tests)


def distribution(host: str, version: str) -> Path:
    """Return the folder of an unpacked source distribution."""
    home = CACHE / f"{host}-{version}"
    there = [path for path in home.glob(f"{host}-*") if path.is_dir()]
    if not there:
        wanted = ("--no-deps", "--no-binary", ":all:", "--dest", str(home), f"{host}=={version}")
        subprocess.run([sys.executable, *_PIP, "download", "--quiet", *wanted], check=True)
        (archive,) = home.glob("*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(home, filter="data")
        there = [path for path in home.glob(f"{host}-*") if path.is_dir()]
    return there[0]


def interpreter(host: str, version: str, needs: Sequence[str]) -> Path:
    """Return a Python that has jobguard, the host of that version, and the packages for its tests."""
    home = CACHE / f"{host}-{version}" / "venv"
    python, stamp = home / "bin" / "python", home / ".ready"
    wanted = "\n".join(needs)
    if not stamp.exists() or stamp.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        jobguard = f"{REPOSITORY}[embedded]"
        reported = [f"{host}[redis]=={version}", "pytest>=8.2", "pytest-timeout>=2.3", *needs]
        subprocess.run(
            [str(python), *_PIP, "install", "--quiet", "--editable", jobguard, *reported],
            check=True,
        )
        stamp.write_text(wanted)
    return python


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


def ledger(postgres: PostgresServer, name: str, *, led: bool = False) -> str:
    """Make a database with the ledger in it; ``led``: as if a leader led, watched and trusted."""
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


def play(suite: Suite, runs: Sequence[Run], tests: Sequence[str]) -> None:
    """Run the tests in all of these at once, and wait for their end."""
    children = [run.start(suite, tests) for run in runs]
    try:
        for run, child in zip(runs, children, strict=True):
            try:
                child.wait(LONGEST)
            except subprocess.TimeoutExpired:
                print(f"{run.name}: not done after {LONGEST:g} s; see the last test in its results")
    finally:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _compare(suite: Suite, bare: Run, run: Run) -> bool:
    """Print the differences, and return True if all of them are documented."""
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
    confirmed = _confirmed(suite, bare, run, differs)
    fine = recorded >= suite.least_recorded * passed
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
            print(f"-- {test}: DIFFERS\n{within.get(test, ('', 'it did not end'))[1]}")
    for complaint, times in run.errors().items():
        if any(fnmatch.fnmatch(complaint, expected) for expected in suite.expected_errors):
            continue
        fine = False
        print(f"-- jobguard logged ({times} times) {complaint}")
    return fine


def _confirmed(suite: Suite, bare: Run, run: Run, tests: Sequence[str]) -> set[str]:
    """Return the tests that fail guarded each time, and pass bare, when they run alone."""
    left = set(tests)
    for attempt in range(AGAIN):
        for test in sorted(left):
            pair = [
                Run(
                    one.name,
                    one.folder / f"again-{attempt}",
                    one.redis_port,
                    one.postgres,
                    environment=one.environment,
                )
                for one in (bare, run)
            ]
            play(suite, pair, [test])
            outcomes = [one.results().get(test, ("missing", ""))[0] for one in pair]
            if outcomes[1] == "passed" or outcomes[0] == "failed":
                left.discard(test)
    return left


def _print_tests_that_did_not_run(bare: Run) -> None:
    """Print the tests that cannot be compared: skipped tests by reason, and tests that fail bare."""
    results = bare.results()
    reasons = Counter(why for outcome, why in results.values() if outcome == "skipped")
    print(f"\n== skipped: {reasons.total()}")
    for reason, times in reasons.most_common():
        print(f"   {times} {reason}")
    failed = [test for test, (outcome, _) in results.items() if outcome == "failed"]
    print(f"== fails bare: {len(failed)}")
    for test in failed:
        print(f"   {test}")


def _counts(results: Mapping[str, tuple[str, str]]) -> str:
    counts = Counter(outcome for outcome, _ in results.values())
    return ", ".join(f"{counts[outcome]} {outcome}" for outcome in sorted(counts)) or "nothing ran"
