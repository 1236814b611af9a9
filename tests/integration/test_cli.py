from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
import redis
from click.testing import CliRunner, Result

from jobguard import schema
from jobguard.cli import main
from jobguard.model import new_token
from jobguard.settings import Settings

ROOT = Path(__file__).parents[2]


def call(*words: str, **environ: str) -> Result:
    """Call the command as a shell would."""
    return CliRunner().invoke(main, list(words), env=environ, catch_exceptions=False)


def ask(url: str, query: str, *values: Any) -> list[tuple[Any, ...]]:
    """Run one statement and return its rows."""
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(query.encode(), values or None)
        return cursor.fetchall() if cursor.description else []


def know_source(url: str, address: str = "localhost:6379/0") -> None:
    """Register a source."""
    ask(
        url,
        "insert into jobguard.sources (id, namespace, library, address, settings)"
        " values (1, 'default', 'rq', %s, %s)",
        *(address, Settings().fingerprint()),
    )


def bury(url: str, *job_ids: str, outcome: str = "dead", envelope: bytes | None = b"e") -> None:
    """Write tombstones of jobs that were given up."""
    for job_id in job_ids:
        ask(
            url,
            "insert into jobguard.history (source, token, job_id, queue, task, outcome, envelope,"
            " errors) values (1, %s, %s, 'mail', 'send', %s, %s, array['Traceback\nOOM [killed]'])",
            *(new_token(), job_id, outcome, envelope),
        )


def lead(url: str) -> None:
    """Make a process lead."""
    ask(
        url,
        "insert into jobguard.leader (namespace, term, holder, host, pid, expires_at)"
        " values ('default', 7, gen_random_uuid(), 'here', 42, now() + interval '1 hour')",
    )


def test_migrate_reports_its_work_and_check_what_is_missing(empty_database: str) -> None:
    """`migrate` works on a fresh database and again, with options and with variables."""
    unmigrated = call("migrate", "--check", "--postgres", empty_database)
    assert unmigrated.exit_code == 1
    assert "run `jobguard migrate`" in unmigrated.stderr
    first = call("migrate", JOBGUARD_POSTGRES_URL=empty_database, JOBGUARD_INSTALLATION="prod")
    assert first.exit_code == 0 and "0001_the_ledger" in first.stdout
    again = call("migrate", "--json", DATABASE_URL=empty_database)
    assert json.loads(again.stdout)["applied"] == []
    assert call("migrate", "--check", "--postgres", empty_database).exit_code == 0
    assert ask(empty_database, "select name from jobguard.installation") == [("prod",)]
    other = call("migrate", "--installation", "staging", "--postgres", empty_database)
    assert other.exit_code == 1 and "'prod', not 'staging'" in other.stderr


def test_migrate_sql_is_a_script_for_a_dba(empty_database: str) -> None:
    """`migrate --sql` needs no database, and after its script there is nothing left to migrate."""
    script = call("migrate", "--sql")
    assert script.exit_code == 0
    ask(empty_database, script.stdout)
    assert schema.migrate(empty_database) == []


def test_the_url_of_a_secrets_file_wins_over_the_variable(database: str, tmp_path: Path) -> None:
    """The command line reads the variables in the same order as hosts do."""
    file = tmp_path / "url"
    file.write_text(database)
    done = call(
        "stats",
        JOBGUARD_POSTGRES_URL_FILE=str(file),
        JOBGUARD_POSTGRES_URL="postgresql://127.0.0.1:1/d",
    )
    assert done.exit_code == 0, done.stderr


def test_stats_are_a_table_for_people_and_an_object_for_programs(database: str) -> None:
    """`stats` shows the queues with their counts and a total, the leader, the holds and the incidents."""
    know_source(database)
    bury(database, "a", "b")
    bury(database, "c", outcome="completed")
    table = call("stats", "--postgres", database)
    assert table.exit_code == 0
    assert "none yet; run `jobguard reconcile`" in table.stdout
    assert table.stdout.splitlines()[1].split() == ["localhost:6379/0", "mail", *"00001020", "3"]
    lead(database)
    call("pause", "--postgres", database)
    call("pause", "--queue", "mail", "--postgres", database)
    ask(database, "insert into jobguard.incidents (source, cause) values (1, 'incident')")
    ask(
        database,
        "insert into jobguard.queues (source, queue, trusted_since, unguarded) values"
        " (1, 'fresh', null, '{}'), (1, 'mail', '2026-01-02 03:04:05', '{}'),"
        " (1, 'mixed', null, '{old-worker}'), (1, 'ever', 'epoch', '{}')",
    )
    reported = call("stats", "--postgres", database).stdout
    for line in (
        "leader: here pid 42, term 7",
        "paused since",
        "held: queue mail of",
        "incident 1",
        "dead: given up because its worker died too often",
        "not trusted yet: queue fresh of localhost:6379/0: no leader could count its consumers",
        "trusted since 2026-01-02 03:04:05: queue mail of",
        "trusted from its first record: queue ever of",
        "start a guarded worker",
        "not trusted: queue mixed of localhost:6379/0 has unguarded workers, so nothing is recovered: old",
    ):
        assert line in reported
    report = json.loads(call("stats", "--json", "--postgres", database).stdout)
    assert report["total"]["dead"] == 2 and report["total"]["total"] == 3
    assert report["counts"][0]["queue"] == "mail"
    assert [queue["queue"] for queue in report["queues"]] == ["ever", "fresh", "mail", "mixed"]
    assert report["leader"]["term"] == 7 and report["brake"]["paused_at"]
    empty = call("stats", "--json", "--namespace", "nobody", "--postgres", database)
    assert json.loads(empty.stdout)["total"]["total"] == 0


def test_an_unreachable_postgres_is_one_line_and_exit_1() -> None:
    """The error names the place, but not the password."""
    url = "postgresql://u:hidden@127.0.0.1:1/d"
    for words in (["stats"], ["dead", "list"], ["pause"], ["migrate"], ["migrate", "--check"]):
        done = call(*words, JOBGUARD_POSTGRES_URL=url)
        assert done.exit_code == 1, words
        assert done.stderr.startswith("error: Postgres at 127.0.0.1:1/d")
        assert done.stderr.count("\n") == 1 and "hidden" not in done.stderr


def test_dead_jobs_are_listed_and_requeued_by_id(database: str) -> None:
    """A requeued job leaves the list; a job that cannot be requeued gives an error."""
    know_source(database)
    assert call("dead", "list", "--postgres", database).stdout == "none\n"
    bury(database, "a", "b")
    bury(database, "bare", envelope=None)
    bury(database, "f", outcome="failed")
    listed = call("dead", "list", "--postgres", database).stdout
    assert "OOM [killed]" in listed and "bare" in listed and " f " not in listed
    assert "failed in their library: 1; list them with --failed" in listed
    rows = json.loads(call("dead", "list", "--failed", "--json", "--postgres", database).stdout)
    assert [row["job_id"] for row in rows] == ["f", "bare", "b", "a"]
    limited = call("dead", "list", "--json", "--postgres", database, JOBGUARD_DEAD_LIST_LIMIT="1")
    assert len(json.loads(limited.stdout)) == 1
    done = call("dead", "requeue", "a", "absent", "bare", "f", "--postgres", database)
    assert done.exit_code == 1
    assert done.stdout == "requeued a in mail\nrequeued f in mail\n"
    assert done.stderr.count("error: ") == 2
    again = call("dead", "requeue", "a", "--postgres", database)
    assert again.exit_code == 1 and "job a is pending: it was not given up" in again.stderr


def test_all_dead_jobs_are_requeued_at_once(database: str) -> None:
    """`--all` requeues every job of `list` once; if one cannot be requeued, the exit code is 1."""
    know_source(database)
    bury(database, "a", "b", "c")
    bury(database, "f", outcome="failed")
    done = call("dead", "requeue", "--all", "--json", "--postgres", database)
    assert done.exit_code == 0
    assert sorted(row["job_id"] for row in json.loads(done.stdout)) == ["a", "b", "c"]
    assert ask(database, "select count(*) from jobguard.outbox") == [(3,)]
    bury(database, "bare", envelope=None)
    done = call("dead", "requeue", "--all", "--failed", "--queue", "mail", "--postgres", database)
    assert done.exit_code == 1
    assert done.stdout == "requeued f in mail\n" and "bare" in done.stderr


def test_the_brake_is_set_and_released(database: str) -> None:
    """`pause` and `resume` work for all queues or one; a queue of a paused namespace gives a note."""
    know_source(database)
    assert call("pause", "--postgres", database).stdout == "paused: the namespace default\n"
    for word in ("pause", "resume"):
        typo = call(word, "--queue", "q", "--postgres", database)
        assert typo.exit_code == 1 and "no queue 'q' is known" in typo.stderr
    forced = ("pause", "--queue", "q", "--force", "--json", "--postgres", database)
    pause = json.loads(call(*forced).stdout)
    assert pause["paused_at"] and set(pause["held"]) == {"1/q"}
    # The queue is known now.
    assert call("pause", "--queue", "q", "--postgres", database).exit_code == 0
    reported = call("resume", "--queue", "q", "--postgres", database).stdout
    assert reported.startswith("resumed: queue q of default\nbut the whole namespace")
    brake = json.loads(call("resume", "--moved", "--json", "--postgres", database).stdout)
    assert brake == {"namespace": "default", "paused_at": None, "held": {}}


@pytest.mark.parametrize(
    "words", [["stats"], ["dead", "list"], ["dead", "requeue", "--all"], ["pause"], ["resume"]]
)
def test_nothing_is_read_or_changed_in_another_installation(
    database: str, words: list[str]
) -> None:
    """With another JOBGUARD_INSTALLATION nothing is read or changed."""
    ask(database, "update jobguard.installation set name = 'prod'")
    know_source(database)
    bury(database, "a")
    done = call(*words, "--postgres", database, JOBGUARD_INSTALLATION="staging")
    assert done.exit_code == 1 and "'prod'" in done.stderr
    assert ask(database, "select count(*) from jobguard.jobs") == [(0,)]
    assert call(*words, "--postgres", database, JOBGUARD_INSTALLATION="prod").exit_code == 0


def test_requeue_of_owed_jobs(database: str) -> None:
    """`requeue` shows counts and asks first; a running, ended or unknown job is refused."""
    know_source(database)
    bury(database, "done", outcome="completed")
    bury(database, "dead")
    for job_id in ("a", "b", "waits"):
        ask(
            database,
            "insert into jobguard.jobs (source, token, job_id, queue, task, envelope)"
            " values (1, %s, %s, 'mail', 'send', 'e')",
            *(new_token(), job_id),
        )
    ask(
        database,
        "insert into jobguard.suspects (source, token, cause)"
        " select source, token, 'untrusted' from jobguard.jobs where job_id in ('a', 'b')",
    )
    where = ("--postgres", database)
    unsaid = call("requeue", "--all", *where)
    assert unsaid.exit_code == 1 and "2 of queue mail: untrusted" in unsaid.stdout
    assert ask(database, "select count(*) from jobguard.outbox") == [(0,)]
    assert "jobguard requeue --all" in " ".join(call("stats", *where).stdout.split())
    assert call("requeue", *where).exit_code == 2
    assert call("requeue", "a", "--queue", "mail", *where).exit_code == 2

    done = call("requeue", "--all", "--yes", *where)

    assert done.exit_code == 0 and "requeued a in mail\nrequeued b in mail\n" in done.stdout
    assert ask(database, "select count(*) from jobguard.outbox where unsent") == [(2,)]
    assert call("requeue", "--all", "--yes", *where).stdout == "none\n"
    named = call("requeue", "--yes", "--json", "waits", "dead", "done", "unknown", *where)
    assert named.exit_code == 1 and named.stderr.count("error: ") == 2
    assert [row["job_id"] for row in json.loads(named.stdout)] == ["waits", "dead"]


def test_the_doctor_finds_no_problem_in_a_healthy_installation(
    database: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a healthy installation the exit code is 0, and every finding is printed."""
    # The servers of the tests run without fsync, for speed.
    judged = "jobguard.cli.doctor.postgres._judge_durability"
    monkeypatch.setattr(judged, lambda connection: iter(()))
    know_source(database)
    lead(database)
    call("resume", "--moved", "--postgres", database)
    done = call("doctor", "--json", "--postgres", database, "--redis", redis_url)
    findings = json.loads(done.stdout)
    assert done.exit_code == 0, findings
    assert {finding["about"].split()[0] for finding in findings} >= {
        *("postgres", "schema", "rights", "redis", "installation", "leader", "workers")
    }
    assert call("doctor", "--postgres", database, JOBGUARD_REDIS_URL=redis_url).exit_code == 0


def test_the_doctor_goes_on_after_each_problem(empty_database: str, redis_url: str) -> None:
    """One report has an unmigrated database, a Redis that does not answer, and one that does."""
    done = call(
        *("doctor", "--json", "--postgres", empty_database),
        JOBGUARD_REDIS_URL=f"redis://127.0.0.1:1/0 {redis_url} nonsense://x",
    )
    found = [(f["about"].split()[0], f["verdict"]) for f in json.loads(done.stdout)]
    assert done.exit_code == 1
    assert ("schema", "problem") in found and ("postgres", "ok") in found
    assert found.count(("redis", "problem")) == 2 and ("redis", "ok") in found
    away = call("doctor", "--postgres", "postgresql://127.0.0.1:1/d", "--redis", redis_url)
    assert away.exit_code == 1 and "problem" in away.stdout


def test_the_doctor_reports_that_consumers_cannot_be_counted(database: str, redis_url: str) -> None:
    """If an ACL refuses CLIENT LIST, the problem names the missing rights."""
    name = "narrow_" + os.urandom(4).hex()
    with redis.Redis.from_url(redis_url) as client:
        acl: Any = client.execute_command
        acl("ACL", "SETUSER", name, "on", ">pw", "~*", "&*", "+@all", "-client")
        try:
            url = redis_url.replace("redis://", f"redis://{name}:pw@")
            done = call("doctor", "--json", "--postgres", database, "--redis", url)
            found = [f["detail"] for f in json.loads(done.stdout) if f["verdict"] == "problem"]
            assert any("+client|list" in detail for detail in found), found
        finally:
            acl("ACL", "DELUSER", name)


def test_the_doctor_names_missing_rights(database: str) -> None:
    """If a role may read but not write, the problem names the table."""
    name = "reader_" + os.urandom(4).hex()
    ask(database, f"create role {name} login")
    try:
        ask(database, f"grant usage on schema jobguard to {name}")
        ask(database, f"grant select on all tables in schema jobguard to {name}")
        url = database.replace("//postgres@", f"//{name}@")
        done = call("doctor", "--json", "--postgres", url)
        (rights,) = [f for f in json.loads(done.stdout) if f["about"] == "rights"]
        assert rights["verdict"] == "problem" and "no insert on effects" in rights["detail"]
        assert "migrations" not in rights["detail"]
    finally:
        ask(database, f"drop owned by {name}")
        ask(database, f"drop role {name}")


def test_reconcile_passes_the_command_line_on(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`reconcile` passes on the settings, PostgreSQL and every Redis; --once prints the result."""
    seen: dict[str, Any] = {}

    counts = {"leads": True, "unfinished": [], "restored": 3}

    def service(settings: Settings, conninfo: Any, clients: Any) -> Any:
        seen.update(settings=settings, conninfo=conninfo(), redis=list(clients))
        return SimpleNamespace(once=lambda: counts)

    from jobguard.cli import reconcile

    monkeypatch.setattr(reconcile, "Service", service)
    monkeypatch.setattr(reconcile, "stop_on_signals", lambda service: None)
    monkeypatch.setattr("jobguard.log.configure", lambda level, json: seen.update(level=level))
    words = ["reconcile", "--once", "--namespace", "n", "--postgres", database]
    environ = {"JOBGUARD_LEASE": "20", "JOBGUARD_LOG_LEVEL": "WARNING"}
    done = call(*words, JOBGUARD_REDIS_URL="redis://a redis://b", **environ)
    assert seen["level"] == "warning"
    assert done.exit_code == 0 and done.stdout.split()[-2:] == ["restored", "3"]
    assert (seen["settings"].namespace, seen["settings"].lease) == ("n", 20.0)
    assert (seen["conninfo"], seen["redis"]) == (database, ["a:6379/0", "b:6379/0"])
    assert json.loads(call(*words, "--json", "--redis", "redis://c").stdout) == counts
    assert seen["redis"] == ["c:6379/0"]
    nowhere = call("reconcile", "--postgres", database)
    assert nowhere.exit_code == 1 and "no Redis URL" in nowhere.stderr


def test_one_pass_that_could_not_be_made_is_a_problem(
    database: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass without PostgreSQL, with a dead Redis, or with a source without a URL exits with 1."""
    monkeypatch.setattr("jobguard.log.configure", lambda level, json: None)
    words = ("reconcile", "--once")
    away = call(*words, "--postgres", "postgresql://127.0.0.1:1/d", "--redis", redis_url)
    assert away.exit_code == 1 and "port 1 failed" in away.stderr, away.output
    quick = {
        "JOBGUARD_WORKER_TIMEOUT": "0.4",
        "JOBGUARD_BEAT_INTERVAL": "0.2",
        "JOBGUARD_GRACE": "0.2",
    }
    here = ("--postgres", database, "--redis", redis_url)
    assert call(*words, *here, **quick).exit_code == 0
    know_source(database, "localhost:1/0")
    unnamed = call(*words, *here, **quick)
    assert unnamed.exit_code == 1 and "localhost:1/0 was not inspected" in unnamed.stderr
    closed = call(*words, *here, "--redis", "redis://localhost:1/0", "--json", **quick)
    assert closed.exit_code == 1 and '"unfinished": [\n    "localhost:1/0"' in closed.stdout


def test_run_keeps_the_commands_output_and_exit_code(tmp_path: Path) -> None:
    """A worker that was started through `jobguard run` has the same output and exit code."""
    worker = tmp_path / "worker.py"
    worker.write_text("import sys\nprint(sys.argv[1:])\nsys.exit(7)\n")
    command = [sys.executable, "-c", "from jobguard.cli import main; main()"]
    command += ["run", "--", "python", str(worker), "--burst", "-v"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environ = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    assert (done.returncode, done.stdout) == (7, "['--burst', '-v']\n"), done.stderr
