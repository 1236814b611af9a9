from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import jobguard
from jobguard import cli
from jobguard.cli import run
from jobguard.cli.common import ago, console, print_json, redis_urls_from
from jobguard.cli.doctor import redis_server
from jobguard.cli.doctor import sources as doctor_sources
from jobguard.cli.doctor.finding import CheckResult
from jobguard.cli.doctor.ledger import judge_ledger
from jobguard.errors import ConfigurationError
from jobguard.settings import Settings

ROOT = Path(__file__).parents[2]
HEAVY = ("click", "psycopg", "rich", "sqlalchemy", "structlog")


def python(code: str, *arguments: str) -> str:
    """Run code in a separate Python process, and return its output."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_jobguard_is_light_and_silent() -> None:
    """The import of jobguard loads no other module and prints nothing; its names load no heavy package."""
    alone = python(
        "import importlib, sys, types; before = {*sys.modules}\n"
        "import jobguard; print(sorted({*sys.modules} - before))"
    )
    assert alone == "['jobguard']\n"
    code = f"from jobguard import *\nimport sys; print([m for m in {HEAVY} if m in sys.modules])"
    assert python(code) == "[]\n"
    # A reconciler without --http reads no page of the ledger.
    reconcile = "import jobguard.cli.reconcile, sys; print('sqlalchemy' in sys.modules)"
    assert python(reconcile) == "False\n"


def test_a_module_hides_no_function_of_its_name() -> None:
    """Whichever is used first, jobguard.guard and jobguard.current are the functions."""
    code = "import jobguard.guard, jobguard.current\nfrom jobguard.current import lock\n"
    names = (
        "print(jobguard.guard.__name__, jobguard.current().id, jobguard.errors.KeyHeld.__name__)"
    )
    assert python(code + names) == "guard None KeyHeld\n"
    assert python("import jobguard\n" + names) == "guard None KeyHeld\n"
    assert "once" in python("import jobguard; print(dir(jobguard))")
    wrong = "gard"
    with pytest.raises(AttributeError, match="no attribute 'gard'"):
        getattr(jobguard, wrong)


@pytest.mark.parametrize("word", ["--version", "--help"])
def test_the_version_and_the_list_are_printed_without_loading_any_command(word: str) -> None:
    """They load click and no other heavy package."""
    reported = python(
        "import sys; from jobguard.cli import main\n"
        f"try: main([{word!r}])\n"
        "except SystemExit: pass\n"
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    assert reported.splitlines()[-1] == "['click']"
    assert word == "--help" or reported.startswith(f"jobguard {jobguard.__version__}\n")


def test_every_command_is_listed_and_explains_itself() -> None:
    """--help shows the same first sentence in the list and at the command."""
    runner = CliRunner()
    listed = runner.invoke(cli.main, ["--help"])
    assert listed.exit_code == 0
    for name, (where, line) in cli.COMMANDS.items():
        assert name in listed.output and line in " ".join(listed.output.split())
        if where.startswith("jobguard.cli."):
            assert runner.invoke(cli.main, [name, "--help"]).exit_code == 0


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["stats", "--nonsense"],
        ["migrate", "--sql", "--check"],
        ["dead", "requeue"],
        ["dead", "requeue", "j", "--all"],
        ["dead", "requeue", "j", "--queue", "q"],
        ["dead", "list", "--limit", "0"],
        ["resume", "--queue", "q", "--moved"],
        ["jobs", "--since", "99999999999d"],
        ["run"],
    ],
)
def test_wrong_usage_ends_with_2(words: list[str]) -> None:
    """Scripts can distinguish a usage error from a problem that a command found."""
    assert CliRunner().invoke(cli.main, words).exit_code == 2


@pytest.mark.parametrize(
    ("words", "environ"),
    [
        (["stats"], {}),
        (["stats", "--postgres", "mysql://u:hidden@h/d"], {}),
        (["stats"], {"DATABASE_URL": "sqlite:///hidden.db"}),
        (["stats", "--postgres", "postgresql://h/d"], {"JOBGUARD_LEASE": "soon"}),
        (["doctor"], {}),
        (["run", "no-such-command"], {}),
    ],
)
def test_a_problem_is_one_line_and_ends_with_1(words: list[str], environ: dict[str, str]) -> None:
    """The line contains no traceback and no password."""
    done = CliRunner().invoke(cli.main, words, env=environ)
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "hidden" not in done.stderr


def test_redis_comes_from_the_options_then_the_file_then_our_variable_then_everybodys(
    tmp_path: Path,
) -> None:
    """Several URLs are separated by white space, or given by repeating the option."""
    file = tmp_path / "urls"
    file.write_text("redis://file/0\nredis://file/1\n")
    environ = {
        "JOBGUARD_REDIS_URL_FILE": str(file),
        "JOBGUARD_REDIS_URL": "redis://ours/0  redis://ours/1",
        "REDIS_URL": "redis://theirs",
    }
    assert redis_urls_from(("redis://a redis://b", "redis://c"), environ) == [
        "redis://a",
        "redis://b",
        "redis://c",
    ]
    assert redis_urls_from((), environ) == ["redis://file/0", "redis://file/1"]
    del environ["JOBGUARD_REDIS_URL_FILE"]
    assert redis_urls_from((), environ) == ["redis://ours/0", "redis://ours/1"]
    del environ["JOBGUARD_REDIS_URL"]
    assert redis_urls_from((), environ) == ["redis://theirs"]
    assert redis_urls_from((), {}) == []
    with pytest.raises(ConfigurationError, match="JOBGUARD_REDIS_URL_FILE"):
        redis_urls_from((), {"JOBGUARD_REDIS_URL_FILE": str(tmp_path / "absent")})


@pytest.mark.parametrize(
    ("seconds", "reported"),
    [(None, ""), (-1, "0 s"), (59.6, "60 s"), (300, "5 min"), (7200, "2 h"), (200000, "2 d")],
)
def test_an_age_is_shown_in_one_unit(seconds: float | None, reported: str) -> None:
    """An age is a whole number of the largest unit that fits twice."""
    assert ago(seconds) == reported


@pytest.fixture
def own_argv() -> Iterator[None]:
    """Restore sys.argv and sys.path after the test."""
    argv, path = sys.argv[:], sys.path[:]
    yield
    sys.argv[:], sys.path[:] = argv, path


def script(folder: Path, name: str, first: str) -> Path:
    """Write a program that prints how it was started."""
    path = folder / name
    path.write_text(
        f"{first}\nimport sys, helper\nprint(__name__, sys.argv[1:], helper.where, sys.argv[0])\n"
    )
    path.chmod(0o755)
    (folder / "helper.py").write_text(f"where = {folder.name!r}\n")
    return path


@pytest.mark.parametrize(
    "first",
    [
        f"#!{sys.executable}",
        f"#!{sys.executable} -E",
        f"#!{Path(sys.executable).parent / 'python3'}",
        f"#!/bin/sh\n'''exec' {sys.executable} \"$0\" \"$@\"\n' '''",
    ],
)
def test_a_console_script_runs_in_this_process(
    first: str,
    tmp_path: Path,
    own_argv: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The script has its name, its arguments and its folder as if Python had started it."""
    path = script(tmp_path, "worker", first)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delitem(sys.modules, "helper", raising=False)
    run.resolve(["worker", "--queue", "mail"])()
    assert capsys.readouterr().out == f"__main__ ['--queue', 'mail'] {tmp_path.name} {path}\n"


def test_python_with_a_script_or_a_module_runs_in_this_process(
    tmp_path: Path,
    own_argv: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`python worker.py`, `worker.py` and `python -m worker` work; -u changes nothing."""
    path = script(tmp_path, "worker.py", "")
    monkeypatch.chdir(tmp_path)
    bin_folder = Path(sys.executable).parent
    monkeypatch.setenv("PATH", str(bin_folder))
    for words in (
        ["python", "worker.py", "a"],
        ["python", "-u", str(path), "a"],
        [str(path), "a"],
        [str(bin_folder / "python3"), "-m", "worker", "a"],
    ):
        monkeypatch.delitem(sys.modules, "helper", raising=False)
        run.resolve(words)()
        assert capsys.readouterr().out.startswith(f"__main__ ['a'] {tmp_path.name} ")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["no-such-command"], "no command 'no-such-command'"),
        (["sh", "-c", "rq worker"], "is not a Python program"),
        (["other"], "belongs to the Python in /opt/other"),
        (["python", "-W", "error", "-m", "rq"], "options of Python itself come too late"),
        (["python"], "after python, give -m MODULE"),
        (["python", "absent.py"], "no file 'absent.py'"),
        (["/opt/elsewhere/bin/python3", "-m", "rq"], "not a Python program|belongs to"),
    ],
)
def test_a_program_that_cannot_run_in_this_process_is_refused(
    words: list[str], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell, the Python of another environment, and missing files are refused with a reason."""
    script(tmp_path, "other", "#!/opt/other/bin/python3")
    monkeypatch.setenv("PATH", f"{tmp_path}:{Path(sys.executable).parent}:/usr/bin:/bin")
    with pytest.raises(run.NotPython, match=why):
        run.resolve(words)


class Entry:
    """An entry point that is not installed."""

    def __init__(self, name: str, loaded: Any) -> None:
        self.name, self.loaded = name, loaded

    def load(self) -> Any:
        """Return the object, or raise as an import would."""
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


def test_hooks_of_every_installed_library_are_installed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A library that is not installed is skipped; an adapter that fails does not stop the worker."""
    prepared = []

    class Prepares:
        def prepare_worker(self) -> None:
            prepared.append(self)

    class Fails:
        def prepare_worker(self) -> None:
            raise RuntimeError("this version is too new")

    entries = [
        Entry("absent", ModuleNotFoundError("No module named 'celery'", name="celery")),
        Entry("fails", Fails),
        Entry("plain", type("Plain", (), {})),
        Entry("prepares", Prepares),
    ]
    monkeypatch.setattr(run, "entry_points", lambda group: entries)
    run.install_hooks()
    assert len(prepared) == 1
    reported = [
        (vars(r)["jobguard"]["event"], vars(r)["jobguard"]["library"]) for r in caplog.records
    ]
    assert reported == [("adapter_failed", "fails")]


def overview(**changed: Any) -> dict[str, Any]:
    """Return an overview without problems, with these changes."""
    fine: dict[str, Any] = {
        "installation": {"name": "prod", "moved": False},
        "leader": {"live": True, "host": "h", "pid": 1, "term": 2, "seconds_left": 9.0},
        "brake": {"paused_at": None, "held": {}},
        "sources": [{"id": 1, "address": "a", "settings": Settings().fingerprint()}],
        "workers": {"alive": 1, "oldest_beat_seconds": 1.0},
        "incidents": [],
        "queues": [{"queue": "q", "trusted_since": datetime.now(UTC), "unguarded": []}],
        "held_requests": {"count": 0, "job_id": None, "error": None},
        "failed_schedules": [],
    }
    return fine | changed


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"installation": {"name": "other", "moved": False}}, "'other'"),
        ({"installation": {"name": "prod", "moved": True}}, "jobguard resume --moved"),
        ({"leader": None}, "no reconciler leads"),
        ({"leader": {"live": False}}, "no reconciler leads"),
        ({"brake": {"paused_at": datetime.now(UTC), "held": {}}}, "paused since"),
        (
            {"brake": {"paused_at": None, "held": {"1/q": {"reason": "why"}}}},
            "queue q is held at a: why; `jobguard resume --queue q`",
        ),
        ({"sources": [{"id": 1, "address": "a", "settings": "mode=observe"}]}, "mode=observe"),
        ({"queues": [{"queue": "q", "trusted_since": None, "unguarded": ["w"]}]}, "unguarded.*w"),
        ({"queues": [{"queue": "q", "trusted_since": None, "unguarded": []}]}, "not trusted yet"),
        ({"held_requests": {"count": 2, "job_id": "j", "error": "why"}}, "2 jobs.*job j: why"),
        ({"failed_schedules": [{"name": "s", "error": "why"}]}, "cannot be planned: why"),
    ],
)
def test_the_doctor_finds_each_problem_of_the_ledger(changed: dict[str, Any], word: str) -> None:
    """With one fault in the overview, one problem is shown."""
    settings = Settings(installation="prod")

    def problems(of: dict[str, Any]) -> list[str]:
        found = judge_ledger(settings, of)
        return [finding.detail for finding in found if finding.verdict is CheckResult.PROBLEM]

    assert problems(overview()) == []
    (problem,) = problems(overview(**changed))
    assert re.search(word, problem)


def test_a_replica_and_an_evicting_redis_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eviction is a problem only if Redis has a memory limit."""
    reported: dict[str, Any] = {"role": "master", "maxmemory_policy": "allkeys-lru", "maxmemory": 0}

    class Client:
        def __enter__(self) -> Client:
            return self

        def __exit__(self, *exc_info: object) -> None:
            pass

        def info(self) -> dict[str, Any]:
            return reported

    monkeypatch.setattr("jobguard.clients.client_from_url", lambda url, timeout: Client())
    monkeypatch.setattr("jobguard.clients.address_of", lambda client: "h:1/0")

    def problems() -> list[str]:
        found = redis_server.check_redis("redis://h:1", [])
        return [finding.detail for finding in found if finding.verdict is CheckResult.PROBLEM]

    assert problems() == []
    reported["maxmemory"] = 1 << 30
    assert problems() == ["maxmemory-policy is allkeys-lru: Redis drops jobs; set noeviction"]
    reported |= {"maxmemory": 0, "role": "slave"}
    assert problems() == ["this is a replica: name the primary, or Sentinel"]
    reported |= {"role": "master", "cluster_enabled": 1}
    (problem,) = problems()
    assert "cluster mode is on" in problem
    reported |= {"cluster_enabled": 0, "maxmemory_policy": "noeviction"}
    reported |= {"maxmemory": 100, "used_memory": 97}
    assert ["97 % of maxmemory" in problem for problem in problems()] == [True]
    reported |= {"maxmemory": 0, "maxclients": 20, "connected_clients": 20}
    assert problems() == ["20 of 20 clients are connected"]


def a_source(number: int, address: str, **changed: Any) -> dict[str, Any]:
    """Return a source that is watched and has no owed jobs."""
    fine: dict[str, Any] = {
        "id": number,
        "library": "rq",
        "address": address,
        "prefix": "",
        "name": None,
        "run_id": None,
        "watched_seconds": 1.0,
        "owed": 0,
    }
    return fine | changed


@pytest.mark.parametrize(
    ("sources", "word"),
    [
        ([a_source(1, "a:1/0", watched_seconds=None, owed=5)], "has 5 owed jobs and no reconciler"),
        ([a_source(1, "a:1/0", watched_seconds=90.0, owed=1)], r"since 90 s\).*--redis"),
        ([a_source(1, "h:1/0", watched_seconds=None, owed=1)], "URLs of this command"),
        (
            [a_source(1, "127.1:1/0", watched_seconds=None, owed=5, run_id="r")],
            "h:1/0 and 127.1:1/0 are two addresses of one Redis.*JOBGUARD_SOURCE",
        ),
        (
            [a_source(1, "a:1/0", run_id="x"), a_source(2, "b:1/0", run_id="x")],
            "a:1/0 and b:1/0 are two addresses of one Redis.*JOBGUARD_SOURCE",
        ),
    ],
)
def test_a_source_that_no_reconciler_watches_is_a_problem(
    sources: list[dict[str, Any]], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The problem names the remedy; one Redis by two addresses is found by its run id."""
    monkeypatch.setattr(doctor_sources, "_ask_at", lambda address, like: None)
    reached: Any = [redis_server.Reached("redis h:1/0", None, "h:1/0", "", "r")]  # type: ignore[arg-type]
    found = doctor_sources.judge_sources(Settings(), sources, reached)
    (problem,) = [finding.detail for finding in found if finding.verdict is CheckResult.PROBLEM]
    assert re.search(word, problem), problem


def test_sources_that_are_watched_or_owe_nothing_are_no_problem() -> None:
    """Two databases of one Redis are two sources, and so are two libraries, or two prefixes, in one."""
    sources = [
        a_source(1, "a:1/0", run_id="x", owed=3),
        a_source(2, "a:1/1", run_id="x"),
        a_source(3, "a:1/0", run_id="x", library="celery"),
        a_source(4, "old:1/0", watched_seconds=None),
        a_source(5, "a:1/1", run_id="x", prefix="shop:"),
    ]
    found = list(doctor_sources.judge_sources(Settings(), sources, []))
    ok, note = CheckResult.OK, CheckResult.NOTE
    assert [finding.verdict for finding in found] == [ok, ok, ok, note, ok]
    names = [finding.about for finding in found]
    assert names[0] == "source rq at a:1/0"
    assert names[1::3] == ["source rq at a:1/1 (no prefix)", "source rq at a:1/1 (shop:)"]


def test_a_package_that_a_command_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """`jobguard demo` without its extras names the package to install."""

    def missing(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'psutil'", name="psutil")

    monkeypatch.setattr("jobguard.cli.importlib.import_module", missing)
    done = CliRunner().invoke(cli.main, ["demo"])
    assert done.exit_code == 1
    assert "needs the package psutil: pip install 'jobguard[rq,embedded]'" in done.stderr


def test_every_option_has_a_variable() -> None:
    """Settings are JOBGUARD_<SETTING>; click makes JOBGUARD_<COMMAND>_<OPTION> for other options."""
    settings_read_elsewhere = {"postgres", "namespace", "redis_urls"}

    def check(command: click.Command, path: str) -> None:
        for parameter in command.params:
            if isinstance(parameter, click.Option) and parameter.name not in ("help", "version"):
                by_hand = parameter.name in settings_read_elsewhere
                assert parameter.allow_from_autoenv is not by_hand, path
                assert not by_hand or "[env: JOBGUARD_" in (parameter.help or ""), path
        if isinstance(command, click.Group):
            for name, child in command.commands.items():
                check(child, f"{path} {name}")

    context = click.Context(cli.main)
    for name, (where, _) in cli.COMMANDS.items():
        if where.startswith("jobguard.cli."):
            command = cli.main.get_command(context, name)
            assert command is not None
            check(command, name)


@click.command()
@click.argument("what")
def say(what: str) -> None:
    """Print a text that few encodings have, as a table, as JSON or as an error of the disk."""
    if what == "error":
        raise OSError(errno.ENOSPC, "No space left on device")
    if what == "json":
        print_json(["🎉", {"progress": float("nan")}])
    else:
        console().print("🎉")


@pytest.mark.parametrize(
    ("what", "code", "says"),
    [
        ("text", 0, "\\U0001f389"),
        ("json", 0, '"\\ud83c\\udf89"'),
        ("error", 1, "error: [Errno 28]"),
    ],
)
def test_an_output_that_cannot_be_written_is_no_traceback(
    what: str, code: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal of another encoding shows escapes, JSON stays valid, and a full disk is one line."""
    monkeypatch.setitem(cli.COMMANDS, "say", ("tests.unit.test_cli:say", ""))
    result = CliRunner(charset="latin-1").invoke(cli.main, ["say", what])
    assert result.exit_code == code, result.output
    assert says in result.output
    if what == "json":
        assert json.loads(result.output) == ["🎉", {"progress": None}]
