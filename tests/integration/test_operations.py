from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from click.testing import CliRunner, Result

from jobguard.cli import main
from jobguard.errors import ConfigurationError
from jobguard.model import Cause, Outcome, new_token, token_at
from jobguard.operations import read
from jobguard.operations.job import read_job
from jobguard.operations.overview import overview_of
from jobguard.operations.read import JobFilter, ReadModel
from jobguard.settings import Settings
from jobguard.store.leader import PostgresLeaderStore

HERE = "default"
HOSTILE = "\x1b[31m<script>alert(1)</script>[bold]'; drop table jobs --\u202e"


class Rows:
    """Writes the rows that the processes of a job would have written."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.connection = psycopg.connect(url, autocommit=True)
        self.ask(
            "insert into jobguard.sources (id, namespace, library, address)"
            " values (1, 'default', 'rq', 'localhost:6379/0'), (2, 'tenant', 'rq', 'localhost:6379/1')"
        )

    def ask(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Run one statement and return its rows."""
        cursor = self.connection.execute(query.encode(), values or None)
        return cursor.fetchall() if cursor.description else []

    def owed(
        self, job_id: str, *, at: datetime | None = None, source: int = 1, **more: Any
    ) -> UUID:
        """Record a delivery."""
        token = (
            new_token()
            if at is None
            else UUID(int=token_at(at.timestamp()).int + uuid4().int % 9999)
        )
        row: dict[str, Any] = {"queue": "mail", "task": "send", "envelope": b"e"} | more
        row |= {"source": source, "token": token, "job_id": job_id}
        if at is not None:
            row["recorded_at"] = at
        self._insert("jobs", row)
        return token

    def ended(self, job_id: str, outcome: str, **more: Any) -> UUID:
        """Write a tombstone."""
        token = new_token()
        row: dict[str, Any] = {"queue": "mail", "task": "send", "errors": None, "source": 1} | more
        self._insert("history", row | {"token": token, "job_id": job_id, "outcome": outcome})
        return token

    def worker(self, name: str = "w1", **more: Any) -> UUID:
        """Start a worker."""
        worker = uuid4()
        row: dict[str, Any] = {"host": "h1", "source": 1, "queues": ["mail"]} | more
        self._insert("workers", row | {"id": worker, "name": name})
        return worker

    def run(self, token: UUID, worker: UUID) -> None:
        """Make a worker claim a delivery."""
        row = {"source": 1, "token": token, "number": 1, "nonce": uuid4(), "pid": 1}
        self._insert("running", row | {"worker": worker})

    def suspect(self, token: UUID, cause: str = "incident") -> None:
        """Make a delivery a suspect."""
        self._insert("suspects", {"source": 1, "token": token, "cause": cause})

    def _insert(self, table: str, row: dict[str, Any]) -> None:
        names, marks = ", ".join(row), ", ".join("%s" for _ in row)
        self.ask(f"insert into jobguard.{table} ({names}) values ({marks})", *row.values())


@pytest.fixture
def rows(database: str) -> Iterator[Rows]:
    """Give a migrated database with two sources, to write into."""
    made = Rows(database)
    yield made
    made.connection.close()


@pytest.fixture
def model(database: str) -> Iterator[ReadModel]:
    """Give the read model of that database."""
    with closing(ReadModel(lambda: database)) as made:
        yield made


@pytest.fixture
def jobguard_(database: str) -> Callable[..., Result]:
    """Give a function that runs a command on that database."""

    def run(*words: str, **how: Any) -> Result:
        return CliRunner().invoke(main, [*words[:1], "--postgres", database, *words[1:]], **how)

    return run


def ids(model: ReadModel, wanted: JobFilter | None = None, **how: Any) -> list[str]:
    """Return the ids of one page."""
    return [row["job_id"] for row in model.list_jobs(HERE, wanted or JobFilter(), **how).rows]


def test_jobs_are_listed_newest_first_whether_owed_or_ended(rows: Rows, model: ReadModel) -> None:
    """A list has owed and ended jobs of the namespace, but no superseded ones unless asked."""
    rows.ended("done", "completed")
    waiting = rows.owed("waiting")
    rows.ended("retried", "superseded")
    rows.ended("bad", "failed", errors=["first", "Boom: 7"])
    rows.run(rows.owed("runs"), rows.worker())
    rows.owed("later", due_at=datetime.now(UTC) + timedelta(hours=1))
    rows.owed("foreign", source=2)
    rows.suspect(waiting)
    assert ids(model) == ["later", "runs", "bad", "waiting", "done"]
    assert ids(model, JobFilter(("superseded",))) == ["retried"]
    assert ids(model, JobFilter(("stuck",))) == ["waiting"]
    assert ids(model, JobFilter(("processing",))) == ["runs"]
    assert ids(model, JobFilter(("failed", "scheduled"))) == ["later", "bad"]
    (stuck,) = model.list_jobs(HERE, JobFilter(("stuck",))).rows
    assert stuck["state"] == "pending" and stuck["suspected"] == "incident"
    with pytest.raises(ConfigurationError, match="the states are pending"):
        JobFilter(("lost",))


def test_every_filter_of_a_list_selects(rows: Rows, model: ReadModel) -> None:
    """Queue, task, worker, times, error, priority and due time each select what fits."""
    now = datetime.now(UTC)
    rows.owed("old", at=now - timedelta(hours=2))
    rows.owed("sms", queue="sms", task="text", priority=7)
    worker = rows.worker("w7")
    rows.run(rows.owed("runs"), worker)
    rows.ended("bad", "failed", worker=worker, errors=["Boom: 100% of [it]"])
    rows.owed("due", due_at=now + timedelta(minutes=1))
    assert ids(model, JobFilter(queue="sms")) == ids(model, JobFilter(task="text")) == ["sms"]
    assert ids(model, JobFilter(priority=7)) == ["sms"]
    for name in ("w7", "h1", str(worker)):
        assert ids(model, JobFilter(worker=name)) == ["bad", "runs"]
    assert ids(model, JobFilter(until=now - timedelta(hours=1))) == ["old"]
    assert "old" not in ids(model, JobFilter(since=now - timedelta(hours=1)))
    assert ids(model, JobFilter(error="boom: 100%")) == ["bad"]
    assert ids(model, JobFilter(error="boom_ 100")) == []
    assert ids(model, JobFilter(due_before=now + timedelta(hours=1))) == ["due"]
    assert ids(model, JobFilter(queue=HOSTILE)) == []


@pytest.mark.parametrize("budget", [10_000, 5])
def test_pages_follow_each_other_without_gap_or_repetition(
    rows: Rows, model: ReadModel, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few rows a page reads, all pages together have every job once, in the same order."""
    monkeypatch.setattr(read, "_BUDGET", budget)
    names = [f"j{n}" for n in range(40)]
    for n, name in enumerate(names):
        if n % 3:
            rows.owed(name, queue="mail" if n % 2 else "sms")
        else:
            rows.ended(name, "completed", queue="mail" if n % 2 else "sms")
    for wanted, expected in (
        (JobFilter(), names[::-1]),
        (JobFilter(queue="sms"), names[::-1][1::2]),
        (JobFilter(queue="none"), []),
    ):
        found: list[str] = []
        after = None
        for _ in range(100):
            page = model.list_jobs(HERE, wanted, limit=3, after=after)
            assert len(page.rows) <= 3
            found += [row["job_id"] for row in page.rows]
            after = page.after
            if after is None:
                break
        assert found == expected
    assert [row["job_id"] for row in model.each_job(HERE, JobFilter())] == names[::-1]
    with pytest.raises(ConfigurationError, match="end of a page"):
        model.list_jobs(HERE, JobFilter(), after="x")


def test_one_job_is_told_with_its_road(rows: Rows, model: ReadModel, database: str) -> None:
    """A job has its deliveries, its recoveries with their causes, and one sentence on where it stands."""
    first = rows.ended("j", "superseded", errors=["Timeout"], claimed_at=datetime.now(UTC))
    token = rows.owed("j", attempt=2)
    leader = PostgresLeaderStore(lambda: database, HERE, uuid4(), Settings())
    term = leader.elect(lease=60)
    assert term is not None
    leader.restored(term, 1, [token], causes={token: Cause.INCIDENT})
    leader.close()
    rows.run(token, rows.worker("w2", dead_at=datetime.now(UTC) - timedelta(seconds=4)))
    job = read_job(model, HERE, "j", Settings(), None)
    assert [row["token"] for row in job] == [token, first] and len(job) == 2
    assert job.state == "processing"
    assert job.why == "claimed by a worker that died 4 s ago; goes back now"
    assert [event["event"] for event in job.road if event["token"] == token] == [
        *("recorded", "put back", "started")
    ]
    assert [one["cause"] for one in job[0]["recovered"]] == ["incident"]
    assert job[1]["errors"] == ["Timeout"]
    missing = read_job(model, HERE, "none", Settings(), None)
    assert not missing and missing.state == "unknown" and list(missing) == []


def test_the_leader_counts_for_those_who_look(
    rows: Rows, model: ReadModel, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above a bound, numbers come from the leader's count: it agrees with a count of every row."""
    token = rows.owed("p")
    rows.owed("odd", queue=HOSTILE)
    rows.owed("s", due_at=datetime.now(UTC) + timedelta(hours=1))
    rows.run(rows.owed("r"), rows.worker("w", left_at=datetime.now(UTC)))
    for outcome in ("completed", "completed", "failed", "superseded"):
        rows.ended("e", outcome)
    leader = PostgresLeaderStore(lambda: database, HERE, uuid4(), Settings())
    term = leader.elect(lease=60)
    assert term is not None
    exact = model.counts(HERE)
    assert exact.at is None and exact.total.pending == 2 and exact.total.stuck == 1
    leader.count_up(term, seconds=90)
    leader.count_up(term, seconds=90)
    leader.restored(term, 1, [token], causes={token: Cause.EVICTION})
    leader.close()
    monkeypatch.setattr(read, "_SMALL", 0)
    stored = model.counts(HERE)
    assert stored.at is not None
    assert stored.counts == exact.counts
    assert set(stored.oldest) == set(exact.oldest)
    did: dict[str, int] = {}
    for row in model.activity(HERE):
        did[row["what"]] = did.get(row["what"], 0) + row["count"]
    assert did == {"completed": 2, "failed": 1, "superseded": 1, "restored": 1}
    now = overview_of(model, HERE)
    assert any("owed: 2 pending, 1 scheduled, 1 processing" in line for line in now.lines())


def test_a_rate_is_that_of_the_last_minutes(rows: Rows, model: ReadModel) -> None:
    """It counts complete minutes, and nothing of a queue that stands still since."""
    rows.owed("waits", queue="mail")
    done = (
        "insert into jobguard.activity (source, minute, queue, what, count)"
        " values (1, date_trunc('minute', now()) - make_interval(mins => %s), 'mail', %s, %s)"
        " returning true"
    )

    def rates() -> list[tuple[float, float]]:
        return [(q.ended_a_minute, q.restored_a_minute) for q in overview_of(model, HERE).queues]

    rows.ask(done, 0, "completed", 9)
    assert rates() == [(9, 0)]  # There is no complete minute yet.
    rows.ask("delete from jobguard.activity")
    rows.ask(done, 40, "completed", 500)
    assert rates() == [(0, 0)]
    rows.ask(done, 3, "completed", 90)
    rows.ask(done, 4, "failed", 10)
    rows.ask(done, 4, "restored", 5)
    assert rates() == [(20, 1)]


def test_incidents_show_losses_and_what_was_put_back(
    rows: Rows, model: ReadModel, database: str
) -> None:
    """Incidents are listed newest first, each with the jobs that were put back while it was open."""
    token = rows.owed("lost")
    leader = PostgresLeaderStore(lambda: database, HERE, uuid4(), Settings())
    term = leader.elect(lease=60)
    assert term is not None
    first = leader.open_incident(term, 1, Cause.INCIDENT, "flushed", None)
    leader.restored(term, 1, [token], causes={token: Cause.INCIDENT})
    leader.progress(term, first, missing=1, restored=1, close=True)
    second = leader.open_incident(term, 1, Cause.TOPOLOGY, "failover", None)
    leader.close()
    assert [row["id"] for row in model.incidents(HERE)] == [second, first]
    assert [row["id"] for row in model.incidents(HERE, still_open=True)] == [second]
    (back,) = model.recovered(HERE, first)
    assert (back["job_id"], back["cause"], back["state"]) == ("lost", "incident", "owed")
    assert model.recovered("tenant", first) == []


def test_errors_are_grouped_by_their_kind(rows: Rows, model: ReadModel) -> None:
    """Failed and dead jobs whose errors differ in numbers and ids alone are one group."""
    for n in range(3):
        rows.ended(f"a{n}", "failed", errors=[f"Traceback\nKeyError: {n} at 0x7f{n}\n"])
    rows.ended("b", "dead", errors=["3 worker deaths"])
    rows.ended("ok", "completed")
    groups = model.errors(HERE)
    assert [(g["count"], g["state"], g["error"]) for g in groups] == [
        (3, "failed", "KeyError: # at #"),
        (1, "dead", "# worker deaths"),
    ]
    assert groups[0]["job_id"] == "a2"


def test_commands_show_hostile_names_without_obeying_them(
    rows: Rows, jobguard_: Callable[..., Result]
) -> None:
    """Control characters and markup in ids, names and errors are shown escaped, by every command."""
    rows.run(rows.owed(HOSTILE, queue=HOSTILE, task=HOSTILE), rows.worker(HOSTILE, host=HOSTILE))
    rows.ended(HOSTILE, "failed", errors=[HOSTILE + "\nsecond"], queue=HOSTILE)
    rows.ended("d", "dead", errors=[HOSTILE], queue=HOSTILE, envelope=b"e")
    rows.ask(
        "insert into jobguard.incidents (source, cause, detail) values (1, 'incident', %s)", HOSTILE
    )
    for words in (
        ("jobs",), ("jobs", "show", HOSTILE, "--no-redis"), ("incidents",), ("workers",),
        ("top", "--once"), ("stats",), ("dead", "list", "--failed"),
    ):  # fmt: skip
        place = 2 if words[:2] in (("jobs", "show"), ("dead", "list")) else 1
        url = ("--postgres", rows.url)
        result = CliRunner().invoke(main, [*words[:place], *url, *words[place:]])
        assert result.exit_code == 0, result.output
        shown = result.output
        assert "\x1b" not in shown and "\u202e" not in shown, words
        assert "[bold]" in shown and "\\x1b[31m" in shown, words
        as_json = CliRunner().invoke(main, [*words[:place], *url, *words[place:], "--json"])
        if words != ("top", "--once"):
            assert HOSTILE in as_json.output or json.dumps(HOSTILE)[1:6] in as_json.output, words
        assert "\u202e" not in as_json.output
        json.loads(as_json.output)


def test_jobs_are_listed_by_the_command(rows: Rows, jobguard_: Callable[..., Result]) -> None:
    """`jobs` pages by --after and --offset, filters, and tells where the next page begins."""
    for n in range(5):
        rows.owed(f"j{n}")
    rows.ended("bad", "failed", errors=["Boom"])
    result = jobguard_("jobs", "--limit", "2", "--json")
    page = json.loads(result.output)
    assert [row["job_id"] for row in page["jobs"]] == ["bad", "j4"]
    result = jobguard_("jobs", "--limit", "2", "--after", page["after"], "--json")
    assert [row["job_id"] for row in json.loads(result.output)["jobs"]] == ["j3", "j2"]
    result = jobguard_("jobs", "--offset", "5", "--json")
    assert [row["job_id"] for row in json.loads(result.output)["jobs"]] == ["j0"]
    assert "bad" in jobguard_("jobs", "--error", "boo", "--since", "10m").output
    assert jobguard_("jobs", "--until", "1h").output == "none\n"
    assert jobguard_("jobs", "--since", "soon").exit_code == 2
    result = CliRunner().invoke(
        main, ["jobs", "show", "--postgres", rows.url, "--no-redis", "missing"]
    )
    assert result.exit_code == 1 and "no job missing" in result.output


def test_commands_that_change_jobs_count_and_ask_first(rows: Rows) -> None:
    """Bulk commands count by queue and state, ask, and note who did what; --dry-run changes nothing."""

    def run(*words: str, **how: Any) -> Result:
        place = 2 if words[0] == "dead" else 1
        url: tuple[str, ...] = ("--postgres", rows.url, "--redis", "redis://127.0.0.1:1/9")
        url = url[:2] if words[0] in ("dead", "replay", "incidents") else url
        return CliRunner().invoke(main, [*words[:place], *url, *words[place:]], **how)

    def owed() -> set[Any]:
        return {job_id for (job_id,) in rows.ask("select job_id from jobguard.jobs")}

    worker = rows.worker()
    for n in range(3):
        rows.owed(f"m{n}")
    rows.owed("s", queue="sms", due_at=datetime.now(UTC) + timedelta(hours=1))
    rows.run(rows.owed("runs"), worker)
    everything = owed()

    assert run("cancel").exit_code == 2 and run("cancel", "m0", "--all").exit_code == 2
    result = run("cancel", "--queue", "mail", "--dry-run")
    assert result.exit_code == 0 and result.output == "3 of queue mail: pending\n"
    result = run("cancel", "--queue", "mail", input="n\n")
    assert "Cancel 3 jobs?" in result.output and result.exit_code == 1
    assert owed() == everything
    result = run(
        "cancel", "m0"
    )  # one that is named needs no question; its Redis is not the given one
    assert "cancelled: 1" in result.output and "no --redis URL" in result.output
    assert owed() == everything - {"m0"}
    assert "is not owed" in run("cancel", "m0").output
    assert "cancelled: 2" in run("purge", "mail", "--yes").output
    assert owed() == {"s", "runs"}
    run("cancel", "--due-before", "2999-01-01", "--yes")
    assert owed() == {"runs"}
    assert "its worker is alive" not in run("forget", "m1", "--yes").output

    rows.ended("f", "failed", envelope=b"x", errors=["e"])
    rows.ended("d", "dead", envelope=b"x")
    assert run("dead", "show", "d").exit_code == 0
    assert run("dead", "purge", "--all", "--failed", "--dry-run").output.count(": ") == 2
    assert "dropped: 2" in run("dead", "purge", "--all", "--failed", "--yes").output
    assert run("dead", "list", "--failed").output == "none\n"
    assert (
        rows.ask("select outcome::text, envelope from jobguard.history where job_id in ('f', 'd')")
        == [("cancelled", None)] * 2
    )

    rows.ended("c", "completed", envelope=b"x")
    rows.ended("gone", "completed")
    result = run("replay", "--since", "10m", "--dry-run")
    assert "1 of queue mail: completed" in result.output and "1 more jobs ended" in result.output
    assert "sent again: 1" in run("replay", "--since", "10m", "--rate", "100", "--yes").output
    assert "none" in run("replay", "--since", "10m", "--yes").output
    assert rows.ask("select unsent from jobguard.outbox") == [(True,)]

    notes = json.loads(run("incidents", "--json").output)
    assert [(note["cause"], note["restored"]) for note in notes][::-1] == [
        *(
            ("cancel", 1),
            ("cancel", 2),
            ("cancel", 1),
            ("forget", 1),
            ("dead purge", 2),
            ("replay", 1),
        )
    ]
    assert all("@" in note["actor"] for note in notes)


def test_outcomes_are_known_states() -> None:
    """The read model knows every outcome of a delivery."""
    assert set(read.ENDED_STATES) == set(Outcome)


def test_a_request_that_cannot_be_sent_is_found_tried_again_and_cancelled(rows: Rows) -> None:
    """Stats and doctor count it; requeue gives it to the leader again, and cancel ends it."""

    def run(*words: str, code: int = 0) -> str:
        environ = {"JOBGUARD_POSTGRES_URL": rows.url, "JOBGUARD_REDIS_URL": ""}
        result = CliRunner().invoke(main, words, env=environ, catch_exceptions=False)
        assert result.exit_code == code, result.output
        return result.output

    def request(job_id: str, error: str | None) -> None:
        row = {"source": 1, "job_id": job_id, "queue": "mail", "task": "app.send", "error": error}
        rows._insert("requests", row)

    for job_id, error in (("held", "why"), ("gone", "why"), ("waits", None)):
        request(job_id, error)
    assert "NOT SENT: 2 jobs that SQL or a schedule asked for, such as held: why" in run("stats")
    found = [
        one for one in json.loads(run("doctor", "--json", code=1)) if one["about"] == "requests"
    ]
    assert "such as job held: why" in found[0]["detail"]
    assert "jobguard requeue" in run("jobs", "show", "held", "--no-redis")
    assert "requeued held in mail" in run("requeue", "held", "--yes")
    assert "the reconciler that leads sends it" in run("requeue", "waits", "--yes", code=1)
    for job_id in ("gone", "waits"):
        assert "cancelled: 1" in run("cancel", job_id)
        assert (
            run("jobs", "show", job_id, "--no-redis").count("cancelled: it does not run again") == 1
        )
    assert rows.ask("select job_id, error from jobguard.requests") == [("held", None)]
    assert "NOT SENT" not in run("stats")
