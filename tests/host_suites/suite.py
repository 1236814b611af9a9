"""What the tests of every host have in common: how they are fetched, run, and compared.

A guest must not be noticed. The tests of a host's source distribution run several times at once, each
on a Redis of its own: bare; guarded, with all that is pushed recorded in a Postgres and every worker
hooked; and guarded while a leader's lease is live, which fences and accepted jobs go by. Every test
that passes bare and fails guarded is a difference, and so is every error that jobguard logs.

Nothing of a host's is kept in the repository: distributions are fetched with pip into
``.venv/host-suites``. Their tests are not changed; `inside/` says how they come to their Redis and
their guard. No reconciler acts: a host's tests flush Redis between any two, and what is owed then is
not for the next one.
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
"""So often is a difference run alone before it is believed: every host's tests race now and then."""
_PIP = ("-m", "pip", "--disable-pip-version-check")


@dataclass(frozen=True)
class Suite:
    """A host's tests, ready to run: the host from its distribution, the rest from ``python``."""

    host: str
    """The library; ``inside/host_<host>.py`` says how it is guarded."""
    folder: Path
    tests: Sequence[str]
    """Files or ids, as for pytest."""
    options: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    """``{port}`` in it is that of the run's Redis."""
    python: Path = Path(sys.executable)
    least_recorded: float = 0.5
    """Deliveries a test that passed: a run that records less was hardly guarded."""
    in_turn: bool = False
    """One run after the other: its tests wait for work to be done, and give up."""
    one_at_a_time: Sequence[str] = ()
    """Files whose tests use paths that all runs share: they run when nothing else does."""
    said: Sequence[str] = ()
    """What jobguard rightly says (with *): of targets that it must not guard, of the tests' mocks."""


@dataclass
class Run:
    """One run of the suite, and what came of it."""

    name: str
    folder: Path
    redis_port: int
    postgres: str | None = None
    """Of its ledger; None: bare, or the ledger is none."""
    documented: Mapping[str, str] = field(default_factory=dict)
    """Tests (with * for several) that may fail in it, and why that is right."""
    environment: Mapping[str, str] = field(default_factory=dict)

    def start(self, suite: Suite, tests: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start pytest on these tests; what is told of them is added to what is there."""
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
        """How each test ended, and why; of a test with parts, its worst."""
        found: dict[str, tuple[str, str]] = {}
        path = self.folder / "results.jsonl"
        for line in path.read_text().splitlines() if path.exists() else []:
            reported = json.loads(line)
            if found.get(reported["test"], ("",))[0] != "failed":
                found[reported["test"]] = (reported["outcome"], reported["why"])
        return found

    def errors(self) -> Counter[str]:
        """What jobguard itself logged as an error."""
        path = self.folder / "complaints.log"
        lines = path.read_text().splitlines() if path.exists() else []
        return Counter(line for line in lines if line.startswith(("ERROR", "CRITICAL")))

    def recorded(self) -> int:
        """How many deliveries its ledger knows, or what stood in for one was told of."""
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
    """Makes what each run needs to itself."""

    stack: contextlib.ExitStack
    folder: Path

    def redis(self) -> int:
        """Start one, and return its port."""
        return self.stack.enter_context(RedisServer(config={"databases": "17"})).port

    def postgres(self) -> PostgresServer:
        """Start one."""
        return self.stack.enter_context(PostgresServer(fsync=False))


@contextlib.contextmanager
def servers(keep: Path | None = None) -> Iterator[Servers]:
    """Give a folder for what is written, and servers; both are gone afterwards, but for ``keep``."""
    with contextlib.ExitStack() as stack:
        if keep is None:
            temporary = tempfile.TemporaryDirectory(prefix="jobguard-host-")
            folder = Path(stack.enter_context(temporary))
        else:
            folder = keep
            folder.mkdir(parents=True)  # a new one: what is there would be taken for ours
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
    """Play these, compare them with the first, tell, and return the exit code."""
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
    _tell_what_did_not_run(bare)
    return 0 if all(fine) else 1


def _are_wanted(name: str, tests: Sequence[str]) -> bool:
    """Whether this file is among these."""
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
    """Return a Python that has jobguard, the host of that version, and what its tests need."""
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
                print(f"{run.name}: not done after {LONGEST:g} s; see the last test that ended")
    finally:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _compare(suite: Suite, bare: Run, run: Run) -> bool:
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
            print(f"-- {test}: DIFFERS\n{within.get(test, ('', 'it never ended'))[1]}")
    for complaint, times in run.errors().items():
        if any(fnmatch.fnmatch(complaint, said) for said in suite.said):
            continue
        fine = False
        print(f"-- jobguard logged ({times} times) {complaint}")
    return fine


def _confirmed(suite: Suite, bare: Run, run: Run, tests: Sequence[str]) -> set[str]:
    """Which of these fail guarded each time, and pass bare, when they run alone."""
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


def _tell_what_did_not_run(bare: Run) -> None:
    """Tell what cannot be compared: what is skipped here, by reason, and what fails without us."""
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
