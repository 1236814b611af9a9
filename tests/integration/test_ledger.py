from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from jobguard.errors import JobguardError, NoRights, NotMigrated, StoreUnavailable
from jobguard.model import Outcome, new_token
from jobguard.store.ledger import PostgresLedger
from jobguard.store.protocols import Counts
from tests.support import eventually

HERE = "default"
MAIL = "localhost:6379/0"


class Rows:
    """Writes the rows that the processes of a job would have written."""

    def __init__(self, url: str) -> None:
        self.connection = psycopg.connect(url, autocommit=True)
        self.source(1, MAIL)

    def ask(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Run one statement and return its rows."""
        cursor = self.connection.execute(query.encode(), values or None)
        return cursor.fetchall() if cursor.description else []

    def source(
        self,
        number: int,
        address: str,
        namespace: str = HERE,
        name: str | None = None,
        *,
        library: str = "rq",
        prefix: str = "",
    ) -> None:
        """Register a source."""
        self.ask(
            "insert into jobguard.sources (id, namespace, library, address, name, prefix)"
            " values (%s, %s, %s, %s, %s, %s)",
            *(number, namespace, library, address, name, prefix),
        )

    def owed(self, job_id: str, queue: str = "mail", *, due: str = "", source: int = 1) -> UUID:
        """Record a delivery; `due` is an interval from now."""
        token = new_token()
        self.ask(
            "insert into jobguard.jobs (source, token, job_id, queue, task, envelope, due_at)"
            " values (%s, %s, %s, %s, 'send', 'e', now() + nullif(%s, '')::interval)",
            *(source, token, job_id, queue, due),
        )
        return token

    def worker(self, state: str = "") -> UUID:
        """Start a worker; `state` is the column of its end."""
        worker = uuid4()
        self.ask("insert into jobguard.workers (id, source, name) values (%s, 1, 'w')", worker)
        if state:
            self.ask(f"update jobguard.workers set {state} = now() where id = %s", worker)
        return worker

    def run(self, token: UUID, worker: UUID) -> None:
        """Make a worker claim a delivery."""
        self.ask(
            "insert into jobguard.running (source, token, number, nonce, worker, pid)"
            " values (1, %s, 1, gen_random_uuid(), %s, 1)",
            *(token, worker),
        )

    def suspect(self, token: UUID, cause: str = "incident") -> None:
        """Make a delivery a suspect."""
        self.ask(
            "insert into jobguard.suspects (source, token, cause) values (1, %s, %s)", token, cause
        )

    def ended(
        self,
        job_id: str,
        outcome: str,
        *,
        queue: str = "mail",
        ago: str = "0",
        envelope: bytes | None = b"e",
        source: int = 1,
        attempt: int = 1,
    ) -> UUID:
        """Write a tombstone."""
        token = new_token()
        self.ask(
            "insert into jobguard.history (source, token, job_id, queue, task, outcome, envelope,"
            " errors, attempt, crashes, recoveries, ended_at)"
            " values (%s, %s, %s, %s, 'send', %s, %s, array['first', 'last'], %s, 3, 2,"
            " now() - %s::interval)",
            *(source, token, job_id, queue, outcome, envelope, attempt, ago),
        )
        return token


@pytest.fixture
def rows(database: str) -> Iterator[Rows]:
    """Give a migrated database with one source, to write into."""
    made = Rows(database)
    yield made
    made.connection.close()


@pytest.fixture
def ledger(database: str) -> Iterator[PostgresLedger]:
    """Give the ledger of that database."""
    with closing(PostgresLedger(lambda: database)) as made:
        yield made


def test_each_state_is_the_table_a_job_stands_in(rows: Rows, ledger: PostgresLedger) -> None:
    """Pending, scheduled, processing and every outcome but superseded are counted by queue."""
    rows.owed("p1")
    rows.owed("p2", due="-1 minute")
    rows.owed("s1", due="1 hour")
    rows.run(rows.owed("r1"), rows.worker())
    rows.run(rows.owed("r2", due="1 hour"), rows.worker())
    rows.owed("p3", "sms")
    for outcome in Outcome:
        rows.ended(f"h-{outcome}", outcome)
    rows.ended("h-again", "completed")
    counts = ledger.stats(HERE)
    assert counts == {
        (MAIL, "mail"): Counts(
            pending=2, scheduled=1, processing=2, completed=2, failed=1, dead=1, cancelled=1
        ),
        (MAIL, "sms"): Counts(pending=1),
    }
    assert counts[MAIL, "mail"].total == 10


def test_a_time_that_python_cannot_have_hides_no_job(rows: Rows, ledger: PostgresLedger) -> None:
    """A job that is due in the year 12000, or never, is listed. No setting of the role prevents that."""
    rows.owed("far", due="10000 years")
    token = rows.owed("never")
    rows.ask("update jobguard.jobs set due_at = 'infinity' where token = %s", token)
    rows.ask("update jobguard.jobs set recorded_at = '-infinity' where token = %s", token)
    assert [ledger.job(HERE, id)[0]["due_at"].year for id in ("far", "never")] == [9999, 9999]
    assert ledger.job(HERE, "never")[0]["recorded_at"].year == 1
    elsewhere = psycopg.conninfo.make_conninfo(
        rows.connection.info.dsn,
        options="-c datestyle=German -c timezone=Asia/Tokyo",
        client_encoding="LATIN1",
    )
    rows.owed("🎉")
    with closing(PostgresLedger(lambda: elsewhere)) as other:
        for id in ("far", "🎉"):
            assert other.job(HERE, id) == ledger.job(HERE, id) != []


def test_a_search_path_of_the_role_changes_no_query(rows: Rows, ledger: PostgresLedger) -> None:
    """Functions of an application that precede those of PostgreSQL decide nothing in the ledger."""
    rows.owed("due")
    rows.owed("later", due="1 hour")
    rows.ask("create schema theirs")
    rows.ask(
        "create function theirs.now() returns timestamptz language sql return timestamptz 'infinity'"
    )
    elsewhere = psycopg.conninfo.make_conninfo(
        rows.connection.info.dsn,
        options="-c search_path=theirs,pg_catalog -c statement_timeout=500",
    )
    with closing(PostgresLedger(lambda: elsewhere)) as other:
        assert other.stats(HERE) == ledger.stats(HERE)
        assert [job["state"] for job in other.job(HERE, "later")] == ["scheduled"]


def test_stuck_jobs_have_no_live_worker_or_were_seen_absent(
    rows: Rows, ledger: PostgresLedger
) -> None:
    """Claims of dead, departed and unknown workers count as stuck, and so do all suspects."""
    rows.run(rows.owed("live"), rows.worker())
    rows.run(rows.owed("of the dead"), rows.worker("dead_at"))
    rows.run(rows.owed("of the departed"), rows.worker("left_at"))
    rows.run(rows.owed("of an unknown worker"), uuid4())
    rows.owed("waiting")
    rows.suspect(rows.owed("absent"))
    rows.suspect(rows.owed("absent and untrusted"), "untrusted")
    both = rows.owed("absent and of the dead")
    rows.run(both, rows.worker("dead_at"))
    rows.suspect(both)
    counts = ledger.stats(HERE)[MAIL, "mail"]
    assert counts == Counts(pending=3, processing=5, stuck=6)
    assert counts.total == 8


def test_stats_keep_namespaces_apart_and_sources_that_share_an_address(
    rows: Rows, ledger: PostgresLedger
) -> None:
    """A source is shown by its name, if it has one; jobs of another namespace are not shown."""
    rows.source(2, MAIL, library="celery")
    rows.source(3, "other:6379/0", name="orders")
    rows.source(4, "other:6379/0", namespace="tenant")
    rows.source(5, MAIL, library="celery", prefix="p:")
    for source in (1, 2, 2, 3, 4, 5, 5, 5):
        rows.owed("j", source=source)
    assert ledger.stats(HERE) == {
        (f"rq at {MAIL}", "mail"): Counts(pending=1),
        (f"celery at {MAIL} ()", "mail"): Counts(pending=2),
        (f"celery at {MAIL} (p:)", "mail"): Counts(pending=3),
        ("orders", "mail"): Counts(pending=1),
    }
    (two,) = ledger.stats(HERE, source=2).values()
    assert two == Counts(pending=2)
    assert ledger.stats("tenant") == {("other:6379/0", "mail"): Counts(pending=1)}
    assert ledger.stats("empty") == {}


def test_deliveries_of_a_job_are_returned_newest_first(rows: Rows, ledger: PostgresLedger) -> None:
    """All deliveries of one job id are returned newest first, without their envelopes."""
    first = rows.ended("j", "superseded", ago="1 hour")
    second = rows.owed("j")
    worker = rows.worker()
    rows.run(second, worker)
    rows.suspect(second, "worker")
    third = rows.owed("j", due="1 hour")
    rows.owed("other")
    reported = ledger.job(HERE, "j")
    assert [(row["token"], row["state"]) for row in reported] == [
        (third, "scheduled"),
        (second, "processing"),
        (first, "superseded"),
    ]
    assert reported[1]["worker"] == worker and reported[1]["worker_name"] == "w"
    assert reported[1]["suspected"] == "worker"
    assert reported[2]["errors"] == ["first", "last"] and reported[2]["ended_at"] is not None
    assert all("envelope" not in row for row in reported)
    assert ledger.job("tenant", "j") == []


def test_dead_jobs_are_returned_newest_first_with_their_errors(
    rows: Rows, ledger: PostgresLedger
) -> None:
    """Dead jobs are returned by namespace, outcome and queue, up to a limit."""
    old = rows.ended("old", "dead", ago="2 hours")
    new = rows.ended("new", "dead", ago="1 hour")
    failed = rows.ended("failed", "failed", queue="sms")
    rows.ended("done", "completed")
    rows.source(2, "x:1/0", namespace="tenant")
    rows.ended("theirs", "dead", source=2)

    def found(*outcomes: Outcome, queue: str | None = None, limit: int = 10) -> list[UUID]:
        found = ledger.dead(HERE, outcomes=outcomes, queue=queue, limit=limit)
        return [row["token"] for row in found]

    assert found(Outcome.DEAD) == [new, old]
    assert found(Outcome.DEAD, limit=1) == [new]
    assert found(Outcome.DEAD, Outcome.FAILED) == [failed, new, old]
    assert found(Outcome.DEAD, Outcome.FAILED, queue="sms") == [failed]
    assert found(Outcome.COMPLETED) == []
    row = ledger.dead(HERE, outcomes=[Outcome.DEAD], queue=None, limit=1)[0]
    assert (row["job_id"], row["errors"], row["crashes"]) == ("new", ["first", "last"], 3)
    assert row["kept"] is True and "envelope" not in row


def test_a_job_that_was_requeued_since_is_not_dead(rows: Rows, ledger: PostgresLedger) -> None:
    """A job with a later delivery, owed or ended, is not in the list of dead jobs."""
    rows.ended("pushed again", "dead")
    rows.owed("pushed again")
    rows.ended("done since", "failed")
    rows.ended("done since", "completed")
    twice = rows.ended("twice", "failed", ago="1 hour")
    newest = rows.ended("twice", "failed")
    listed = ledger.dead(HERE, outcomes=[Outcome.DEAD, Outcome.FAILED], queue=None, limit=10)
    assert [row["token"] for row in listed] == [newest]
    assert twice != newest


def test_requeue_mints_a_new_delivery_and_leaves_its_push_to_the_leader(
    rows: Rows, ledger: PostgresLedger
) -> None:
    """A requeue creates a delivery with the same envelope, the next attempt and no crashes.

    The old delivery points to it.
    """
    old = rows.ended("j", "dead", attempt=4)
    fresh = ledger.requeue(HERE, old)
    assert fresh > old
    assert rows.ask(
        "select token, job_id, queue, task, attempt, crashes, recoveries, claims, envelope, due_at"
        " from jobguard.jobs"
    ) == [(fresh, "j", "mail", "send", 5, 0, 2, 0, b"e", None)]
    assert rows.ask("select source, token from jobguard.outbox") == [(1, fresh)]
    assert rows.ask("select next from jobguard.history where token = %s", old) == [(fresh,)]
    assert ledger.dead(HERE, outcomes=[Outcome.DEAD], queue=None, limit=10) == []
    assert ledger.stats(HERE) == {(MAIL, "mail"): Counts(pending=1)}


def test_a_refused_requeue_names_the_reason(rows: Rows, ledger: PostgresLedger) -> None:
    """A requeue of an unknown, live, requeued or envelope-less job raises an error and writes nothing."""
    again = rows.ended("again", "failed")
    ledger.requeue(HERE, again)
    owed = rows.ended("owed", "dead")
    rows.owed("owed")
    refusals = {
        new_token(): "no delivery .* is known in the namespace 'default'",
        rows.ended("done", "completed"): "job done is completed: only failed and dead",
        rows.ended("gone", "cancelled"): "is cancelled",
        rows.ended("bare", "dead", envelope=None): "its envelope was never recorded",
        again: "requeued already",
        owed: "owed again already",
    }
    before = rows.ask("select * from jobguard.jobs order by token")
    for token, why in refusals.items():
        with pytest.raises(JobguardError, match=why):
            ledger.requeue(HERE, token)
    with pytest.raises(JobguardError, match="'tenant'"):
        ledger.requeue("tenant", owed)
    assert rows.ask("select * from jobguard.jobs order by token") == before


def test_requeue_of_an_owed_delivery_supersedes_it(rows: Rows, ledger: PostgresLedger) -> None:
    """A requeued owed delivery gets a crash budget of its own, and loses its suspicion."""
    old = rows.owed("j")
    for table, more in (
        ("suspects", ", cause) values (1, %s, 'untrusted')"),
        ("outbox", ") values (1, %s)"),
    ):
        rows.ask(f"insert into jobguard.{table} (source, token{more}", old)
    (before,) = rows.ask("select job_id, queue, task, attempt, envelope from jobguard.jobs")
    assert [row["job_id"] for row in ledger.absent(HERE, queue=None)] == ["j"]
    assert ledger.absent(HERE, queue="other") == ledger.absent("tenant", queue=None) == []
    with pytest.raises(JobguardError, match="'tenant'"):
        ledger.requeue("tenant", old)

    fresh = ledger.requeue(HERE, old)

    assert rows.ask("select job_id, queue, task, attempt, envelope from jobguard.jobs") == [before]
    assert rows.ask("select token, crashes from jobguard.jobs") == [(fresh, 0)]
    assert rows.ask("select token, unsent from jobguard.outbox") == [(fresh, True)]
    assert rows.ask("select token from jobguard.suspects") == []
    assert rows.ask("select token, outcome::text, next from jobguard.history") == [
        (old, "superseded", fresh)
    ]
    assert ledger.stats(HERE) == {(MAIL, "mail"): Counts(pending=1)}


def test_two_people_who_requeue_the_same_job_make_one_delivery(
    rows: Rows, database: str, ledger: PostgresLedger
) -> None:
    """Of two people who requeue the same job, one gets an error."""
    token = rows.ended("j", "dead")
    barrier, reported = threading.Barrier(4), list[str]()

    def requeue() -> None:
        with closing(PostgresLedger(lambda: database)) as own:
            own.stats(HERE)  # open the connection
            barrier.wait()
            try:
                own.requeue(HERE, token)
            except JobguardError as error:
                reported.append(str(error))

    threads = [threading.Thread(target=requeue) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reported) == 3 and all("already" in text for text in reported)
    assert rows.ask("select count(*) from jobguard.jobs") == [(1,)]


def test_a_pause_is_kept_where_the_leader_renews_its_lease(
    rows: Rows, ledger: PostgresLedger
) -> None:
    """A pause works before any leader; the next leader finds it, with the time of the first pause."""
    ledger.pause(HERE, queue=None)
    brake = ledger.overview(HERE)["brake"]
    assert brake["paused_at"] is not None and brake["held"] == {}
    assert rows.ask("select term, expires_at < now() from jobguard.leader") == [(0, True)]
    assert ledger.overview(HERE)["leader"] is None
    ledger.pause(HERE, queue=None)
    assert ledger.overview(HERE)["brake"] == brake
    assert ledger.overview("tenant")["brake"]["paused_at"] is None
    ledger.resume(HERE, queue=None, moved=False)
    assert ledger.overview(HERE)["brake"] == {"paused_at": None, "held": {}}


def test_a_pause_leaves_a_leaders_lease_alone(rows: Rows, ledger: PostgresLedger) -> None:
    """A pause is stored in the leader's own row, and does not change its term."""
    lead(rows)
    ledger.pause(HERE, queue=None)
    ledger.pause(HERE, queue="mail")
    leader = ledger.overview(HERE)["leader"]
    assert (leader["term"], leader["live"]) == (7, True)


def lead(rows: Rows) -> None:
    """Make a process lead."""
    rows.ask(
        "insert into jobguard.leader (namespace, term, holder, host, pid, expires_at)"
        " values ('default', 7, gen_random_uuid(), 'here', 42, now() + interval '10 s')"
    )


def test_one_queue_is_held_in_every_source_and_resumed_alone(
    rows: Rows, ledger: PostgresLedger
) -> None:
    """A hold of a queue covers every source, and an earlier hold by jobguard keeps its reason."""
    rows.source(-2, "x:1/0")
    held = json.dumps({"1/mail": {"since": "then", "reason": "too many absences"}})
    lead(rows)
    rows.ask("update jobguard.leader set held = %s", held)
    ledger.pause(HERE, queue="mail")
    ledger.pause(HERE, queue="sms")
    brake = ledger.overview(HERE)["brake"]
    assert set(brake["held"]) == {"1/mail", "-2/mail", "1/sms", "-2/sms"}
    assert brake["held"]["1/mail"]["reason"] == "too many absences"
    assert brake["held"]["-2/mail"]["reason"] == "paused by hand"
    ledger.pause(HERE, queue=None)
    ledger.resume(HERE, queue="mail", moved=False)
    brake = ledger.overview(HERE)["brake"]
    assert set(brake["held"]) == {"1/sms", "-2/sms"}
    assert brake["paused_at"] is not None
    ledger.resume(HERE, queue=None, moved=False)
    assert ledger.overview(HERE)["brake"] == {"paused_at": None, "held": {}}


def test_no_queue_can_be_paused_before_a_source_is_known(ledger: PostgresLedger) -> None:
    """A pause of a queue without any source raises an error."""
    with pytest.raises(JobguardError, match="no source is known"):
        ledger.pause("empty", queue="mail")


def test_a_move_is_seen_and_accepted_by_resume(rows: Rows, ledger: PostgresLedger) -> None:
    """A moved database is reported until a person accepts it."""
    rows.ask("update jobguard.installation set system_identifier = '1', database_oid = 2")
    rows.ask("delete from jobguard.leader")
    lead(rows)
    rows.ask("""update jobguard.leader set held = '{"1/*": {"reason": "moved"}}'""")
    assert ledger.overview(HERE)["installation"]["moved"] is True
    ledger.resume(HERE, queue=None, moved=False)
    assert ledger.overview(HERE)["installation"]["moved"] is True
    ledger.resume(HERE, queue=None, moved=True)
    overview = ledger.overview(HERE)
    assert overview["installation"]["moved"] is False
    assert overview["installation"]["system_identifier"] == overview["installation"]["system_now"]
    assert overview["brake"]["held"] == {}


def test_the_overview_shows_leader_workers_and_incidents(
    rows: Rows, ledger: PostgresLedger
) -> None:
    """The overview has the leader with its remaining lease, sources, workers, incidents and queues."""
    lead(rows)
    rows.worker()
    rows.worker("left_at")
    rows.worker("dead_at")
    rows.ask("update jobguard.workers set beat_at = now() - interval '4 s' where dead_at is null")
    rows.suspect(rows.owed("absent"))
    rows.ask("insert into jobguard.incidents (source, cause, missing) values (1, 'incident', 5)")
    rows.ask("insert into jobguard.incidents (source, cause, closed_at) values (1, 'push', now())")
    rows.ask(
        "insert into jobguard.queues (source, queue, unguarded) values (1, 'mail', array['w9'])"
    )
    overview = ledger.overview(HERE)
    leader, workers = overview["leader"], overview["workers"]
    assert (leader["term"], leader["host"], leader["pid"]) == (7, "here", 42)
    assert 5 < leader["seconds_left"] <= 10
    assert (workers["alive"], workers["gone"], workers["dead"]) == (1, 1, 1)
    assert 4 <= workers["oldest_beat_seconds"] < 10
    (source,) = overview["sources"]
    assert (source["id"], source["address"], source["suspects"]) == (1, MAIL, 1)
    assert [incident["missing"] for incident in overview["incidents"]] == [5]
    assert [(q["queue"], q["trusted_since"], q["unguarded"]) for q in overview["queues"]] == [
        ("mail", None, ["w9"])
    ]
    empty = ledger.overview("empty")
    assert empty["leader"] is None and empty["workers"]["alive"] == 0


def test_a_leader_whose_lease_is_over_is_shown_as_such(rows: Rows, ledger: PostgresLedger) -> None:
    """The overview shows the last leader, and that its lease is over."""
    lead(rows)
    rows.ask("update jobguard.leader set expires_at = now() - interval '1 s'")
    leader = ledger.overview(HERE)["leader"]
    assert leader["live"] is False and leader["seconds_left"] == 0


def test_without_the_right_to_ask_the_cluster_a_move_is_seen_by_the_oid(
    rows: Rows, ledger: PostgresLedger
) -> None:
    """The overview works without the right to call pg_control_system()."""
    database = rows.connection.info.dbname
    role = f"plain_{uuid4().hex[:8]}"
    rows.ask(f"create role {role} login")
    try:
        rows.ask(f"grant usage on schema jobguard to {role}")
        rows.ask(f"grant select on all tables in schema jobguard to {role}")
        rows.ask("revoke execute on function pg_control_system() from public")
        port = rows.connection.info.port
        url = f"postgresql://{role}@{rows.connection.info.host}:{port}/{database}"
        with closing(PostgresLedger(lambda: url)) as plain:
            installation = plain.overview(HERE)["installation"]
            assert installation["system_now"] is None
            with pytest.raises(NoRights):
                plain.pause(HERE, queue=None)
    finally:
        rows.ask(f"drop owned by {role}")
        rows.ask(f"drop role {role}")


def test_an_unmigrated_database_and_an_unreachable_one_differ(empty_database: str) -> None:
    """A database without a schema and a server that does not answer raise different errors."""
    with closing(PostgresLedger(lambda: empty_database)) as ledger, pytest.raises(NotMigrated):
        ledger.stats(HERE)
    nowhere = "postgresql://u:hidden@127.0.0.1:1/d"
    with (
        closing(PostgresLedger(lambda: nowhere)) as ledger,
        pytest.raises(StoreUnavailable, match=r"Postgres at 127\.0\.0\.1:1/d") as refused,
    ):
        ledger.overview(HERE)
    assert "hidden" not in str(refused.value)


def test_no_connection_is_kept_between_calls(rows: Rows, ledger: PostgresLedger) -> None:
    """The ledger keeps no session between calls."""
    ledger.stats(HERE)
    ledger.overview(HERE)
    sessions = "select count(*) from pg_stat_activity where application_name = 'jobguard ledger'"
    mine = sessions + " and datname = current_database()"
    eventually(lambda: rows.ask(mine) == [(0,)])
