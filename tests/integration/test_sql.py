"""What SQL may ask for: jobs, schedules, and clear errors at the call."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner

from jobguard.cli import main
from jobguard.errors import ConfigurationError
from jobguard.model import new_token
from jobguard.reconciler.requests import Requests
from jobguard.schema.migrator import migrations
from jobguard.schema.roles import ENQUEUE, roles_sql
from jobguard.settings import Settings
from jobguard.store.leader import PostgresLeaderStore
from jobguard.store.ledger import PostgresLedger
from jobguard.store.protocols import Signs
from tests.fakes.world import Clock, FakeBroker, FakeRedis

CALL = "select jobguard.enqueue('rq', 'mail', 'app.send', '[1]')"


class Session:
    """A SQL session of some application, and its warnings."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.warnings: list[str] = []
        self._connection = psycopg.connect(url, autocommit=True)
        self._connection.add_notice_handler(
            lambda notice: self.warnings.append(f"{notice.message_primary} {notice.message_hint}")
        )

    def ask(self, query: str, *values: Any) -> list[Any]:
        """Run a query; return the first column."""
        cursor = self._connection.execute(query.encode(), values or None)
        return [row[0] for row in cursor.fetchall()] if cursor.description else []

    def error(self, query: str) -> str:
        """Run a query that must fail; return the message and the hint."""
        with pytest.raises(psycopg.Error) as caught:
            self.ask(query)
        return f"{caught.value.diag.message_primary} ({caught.value.diag.message_hint})"

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


@pytest.fixture
def sql(database: str) -> Iterator[Session]:
    """Give a session in a namespace with one RQ, whose queue and task are known."""
    made = Session(database)
    made.ask(
        "insert into jobguard.sources (id, namespace, library, address)"
        " values (1, 'default', 'rq', 'localhost:6379/0'), (2, 'default', 'celery', 'localhost:6379/1'),"
        " (3, 'two', 'rq', 'a:1/0'), (4, 'two', 'rq', 'b:1/0')"
    )
    made.ask(
        "insert into jobguard.queues (source, queue) values (1, 'mail'), (2, 'celery'), (4, 'mail')"
    )
    made.ask("insert into jobguard.tasks (source, task, queue) values (1, 'app.send', 'mail')")
    yield made
    made.close()


@pytest.fixture
def leader(database: str) -> Iterator[PostgresLeaderStore]:
    """Give the store of a leader."""
    store = PostgresLeaderStore(
        lambda: database, "default", new_token(), Settings(call_timeout=20, lease=600)
    )
    yield store
    store.close()


def accept(leader: PostgresLeaderStore, *, until_none_waits: bool = True) -> None:
    """Let a leader record what was requested from the source 1."""
    broker: Any = FakeBroker(FakeRedis(Clock()))
    term = leader.elect(lease=600)
    assert term is not None
    requests = Requests(leader, "default", {1: broker})
    requests.step(term, Signs())
    while until_none_waits and not requests.finished:
        requests.step(term, Signs())


MISTAKES = (
    ("'resque', 'mail', 'app.send'", "no source of resque .*known: celery at .*, rq at"),
    ("'rq', 'mial', 'app.send'", "no queue 'mial' is known.*known: mail"),
    ("'rq', 'mail', 'app.send', '{}'", "args must be a JSON array, not object"),
    ("'rq', 'mail', 'app.send', '[]', '[]'", "kwargs must be a JSON object, not array"),
    ("'rq', 'mail', 'app.send', null", "args must be a JSON array, not null"),
    ("'rq', 'mail', 'app.send', '[1'", "invalid input syntax for type json"),
    ("'rq', 'mail', ''", "the task is ''"),
    ("'rq', 'mail', 'send'", "import path of a function"),
    ("'rq', 'mail', 'app.send', priority => 3", "has no priority"),
    ("'celery', 'celery', 'send', priority => 10", "0 to 9"),
    ("'celery', 'celery', 'send', max_attempts => 2", "set max_retries on the task"),
    ("'rq', 'mail', 'app.send', max_attempts => 0", "1 or more"),
    ("'rq', 'mail', 'app.snd', unknown => 'error'", "completed the task 'app.snd'.*app.send"),
    ("'rq', 'mail', 'app.send', unknown => 'perhaps'", "warn, error, accept"),
    ("'rq', 'mail', 'app.send', namespace => 'two'", "2 sources of rq: name one.*a:1/0.*b:1/0"),
    ("'rq', 'mail', 'app.send', due => 'someday'", "invalid input syntax"),
    ("'rq', 'mail', 'app.send', due => 'infinity'", "due_must_be_in_the_years_1_to_9998"),
    ("'rq', 'mail', 'app.send', due => '12000-01-01'", "due_must_be_in_the_years_1_to_9998"),
    ("'rq', '', 'app.send', unknown => 'accept'", "queue_must_not_be_empty"),
)


def test_a_mistake_is_an_error_at_the_call(sql: Session) -> None:
    """What no worker could run is refused in the caller's transaction, with the next step."""
    for call, says in MISTAKES:
        error = sql.error(f"select jobguard.enqueue({call})")
        assert re.search(says, error), (call, error)
    assert sql.ask("select count(*) from jobguard.requests") == [0]


def test_an_unknown_task_is_a_warning_at_the_call(sql: Session) -> None:
    """A task that no worker has completed is accepted with a warning, or without one if it is new."""
    assert sql.ask("select jobguard.enqueue('rq', 'mail', 'app.snd')") != []
    assert sql.warnings == [
        "no worker has completed the task 'app.snd': is it a typing error? known: app.send"
    ]
    sql.ask("select jobguard.enqueue('rq', 'new', 'app.new', unknown => 'accept')")
    sql.ask(CALL)
    assert len(sql.warnings) == 1


def test_one_of_several_sources_is_named(sql: Session) -> None:
    """With two sources of a library the caller names one by its address."""
    sql.ask(
        "select jobguard.enqueue('rq', 'mail', 'app.send', source => 'b:1/0', namespace => 'two')"
    )
    assert sql.ask("select source from jobguard.requests") == [4]


def test_a_job_is_asked_for_in_the_transaction_of_the_caller(sql: Session) -> None:
    """A rolled back transaction asked for nothing."""
    sql.ask("begin")
    sql.ask(CALL)
    sql.ask("rollback")
    assert sql.ask("select count(*) from jobguard.requests") == [0]


def test_a_key_is_kept_between_sql_callers(sql: Session, leader: PostgresLeaderStore) -> None:
    """A second call gets the id of the job that holds the key, or an error; a race is decided later."""
    call = "select jobguard.enqueue('rq', 'mail', 'app.send', key => 'k'{})"
    other = Session(sql.url)
    other.ask("begin")
    (late,) = other.ask(call.format(""))
    (first,) = sql.ask(call.format(""))
    other.ask("commit")
    other.close()
    assert late != first
    assert sql.ask(call.format("")) in ([first], [late])
    assert "is held by job" in sql.error(call.format(", on_conflict => 'raise'"))
    accept(leader)
    (holder,) = sql.ask("select job_id from jobguard.jobs")
    assert sql.ask(call.format("")) == [holder]
    (loser,) = {first, late} - {holder}
    assert sql.ask("select state from jobguard.job(%s)", loser) == ["cancelled"]
    assert sql.ask("select error from jobguard.job(%s)", loser) == [
        f"its key is held by job {holder}"
    ]
    assert holder in sql.error(call.format(", on_conflict => 'raise'"))
    sql.ask("select jobguard.cancel_job(%s)", holder)
    assert sql.ask(call.format(", on_conflict => 'raise'")) != [holder]
    assert "one of: ignore, raise" in sql.error(call.format(", on_conflict => 'replace'"))


def test_arguments_that_python_cannot_read_stop_no_other_request(
    sql: Session, leader: PostgresLeaderStore
) -> None:
    """A request with a number of 5,000 digits, or 3,000 nested lists, is held; the next one is recorded."""
    unreadable = ["[1e5000]", "[" * 3000 + "]" * 3000]
    call = "select jobguard.enqueue('rq', 'mail', 'app.send', cast(%s as jsonb))"
    held = [sql.ask(call, args)[0] for args in unreadable]
    sql.ask(CALL)
    accept(leader, until_none_waits=False)
    assert sql.ask("select count(*) from jobguard.jobs") == [1]
    for job_id in held:
        assert sql.ask("select state from jobguard.job(%s)", job_id) == ["held"]
        assert "cannot be read" in sql.ask("select error from jobguard.job(%s)", job_id)[0]


def test_a_schedule_that_cannot_be_computed_stops_no_other(
    sql: Session, leader: PostgresLeaderStore
) -> None:
    """It fails with its error, which the list of schedules shows, and requests are recorded."""
    add = "select jobguard.add_schedule({}, 'rq', 'mail', 'app.send', {})"
    wrong = {
        "digits": """rule => '{"minute": 1e5000}'""",
        "number": "rule => '1'",
        "ages": "every => '2562000000 h'",  # the next slot is a time that PostgreSQL cannot store
    }
    for name, timing in wrong.items():
        sql.ask(add.format(f"'{name}'", timing))
    for ends in ("starts_at => 'infinity'", "ends_at => 'infinity'"):
        assert "in_the_years_1_to_9998" in sql.error(add.format("'x'", f"every => '1 min', {ends}"))
    sql.ask(CALL)
    accept(leader, until_none_waits=False)
    assert sql.ask("select count(*) from jobguard.jobs") == [1]
    ledger = PostgresLedger(lambda: sql.url)
    found = {row["name"]: row["error"] for row in ledger.schedules("default")}
    assert found.keys() == wrong.keys()
    assert all(found.values()), found


def test_a_trigger_that_asks_for_many_jobs_gets_each_once(
    sql: Session, leader: PostgresLeaderStore
) -> None:
    """A statement with 2,000 rows becomes 2,000 owed deliveries in their order, each in the outbox."""
    sql.ask("create table public.orders (id int)")
    sql.ask(
        "create function public.order_made() returns trigger language plpgsql as $$ begin"
        " perform jobguard.enqueue('rq', 'mail', 'app.send', jsonb_build_array(new.id));"
        " return null; end $$"
    )
    sql.ask(
        "create trigger order_made after insert on public.orders"
        " for each row execute function public.order_made()"
    )
    sql.ask("insert into public.orders select generate_series(1, 2000)")
    asked = sql.ask("select job_id from jobguard.requests order by id")
    accept(leader)
    assert sql.ask("select job_id from jobguard.jobs order by token") == asked
    assert len(set(asked)) == 2000
    assert sql.ask("select count(*) from jobguard.outbox where unsent") == [2000]
    assert sql.ask("select count(*) from jobguard.requests") == [0]


def test_a_job_is_followed_and_cancelled(sql: Session, leader: PostgresLeaderStore) -> None:
    """The state of a job is known from the request on, and a cancelled one is not sent."""
    first, second = sql.ask(CALL)[0], sql.ask(CALL)[0]
    state = "select state from jobguard.job(%s)"
    assert sql.ask(state, first) == ["requested"]
    assert sql.ask("select jobguard.cancel_job(%s)", first) == [1]
    assert sql.ask(state, first) == ["cancelled"]
    accept(leader)
    assert sql.ask("select job_id from jobguard.jobs") == [second]
    assert sql.ask(state, second) == ["pending"]
    assert sql.ask("select jobguard.cancel_job(%s)", second) == [1]
    assert sql.ask("select jobguard.cancel_job(%s)", second) == [0]
    assert sql.ask("select count(*) from jobguard.jobs") == [0]
    assert sql.ask("select jobguard.cancel_job('unknown')") == [0]


def test_a_new_signature_keeps_the_rights(empty_database: str) -> None:
    """A role that could call enqueue before migration 16 can call it after; others cannot."""
    role = f"caller_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(empty_database) as connection:
        connection.execute("create schema jobguard")
        for migration in migrations()[:15]:
            connection.execute(migration.text.encode())
        connection.execute(f"create role {role}".encode())
        connection.execute(f"grant execute on function jobguard.enqueue to {role}".encode())
        connection.execute(migrations()[15].text.encode())
        rights = connection.execute(
            "select a.grantee::regrole::text from pg_proc p, aclexplode(p.proacl) a"
            " where p.proname = 'enqueue' and a.grantee <> p.proowner"
        ).fetchall()
        assert rights == [(role,)]
        connection.rollback()


def test_the_role_may_ask_for_jobs_and_do_nothing_else(sql: Session) -> None:
    """The role jobguard_enqueue calls three functions; tables and other functions refuse it."""
    role = f"enqueue_{uuid.uuid4().hex[:12]}"
    script = roles_sql([ENQUEUE]).replace(ENQUEUE, role)
    for _ in range(2):
        sql.ask(script)
    try:
        sql.ask(f"set role {role}")
        sql.ask("set search_path = pg_temp")
        (job_id,) = sql.ask(CALL)
        assert sql.ask("select state from jobguard.job(%s)", job_id) == ["requested"]
        assert sql.ask("select jobguard.cancel_job(%s)", job_id) == [1]
        for query in (
            "select * from jobguard.requests",
            "insert into jobguard.jobs default values",
            "select jobguard.rotate(interval '1 hour')",
            "select jobguard.add_schedule('s', 'rq', 'mail', 'app.send', every => '1 min')",
            "select jobguard.cancel(1, '{}', '{}', 'mail', now(), null, '{}')",
        ):
            assert "permission denied" in sql.error(query)
    finally:
        sql.ask("reset role")
        sql.ask(f"drop owned by {role}")
        sql.ask(f"drop role {role}")


def test_a_schedule_from_sql_is_checked_changed_and_run(
    sql: Session, leader: PostgresLeaderStore
) -> None:
    """A schedule is added once, changed by the same call, paused, resumed, run and removed."""
    add = "select jobguard.add_schedule('s', 'rq', 'mail', 'app.send', '[1]', {})"
    assert sql.ask(add.format("every => '1 min'")) == [True]
    assert sql.ask(add.format("every => '1 min'")) == [False]
    accept(leader)
    (planned,) = sql.ask("select next_at from jobguard.schedules")
    assert sql.ask(add.format("every => '1 min'")) == [False]
    assert sql.ask("select next_at from jobguard.schedules") == [planned]
    assert sql.ask(add.format("cron => '0 9 * * MON-FRI', timezone => 'Asia/Tokyo'")) == [True]
    assert sql.ask("select next_at from jobguard.schedules") == [None]
    sql.ask("select jobguard.pause_schedule('s')")
    sql.ask("select jobguard.resume_schedule('s')")
    (job_id,) = sql.ask("select jobguard.run_schedule('s')")
    assert sql.ask("select job_id from jobguard.requests") == [job_id]
    sql.ask("select jobguard.remove_schedule('s')")
    for wrong, says in (
        ("every => '0.5 s'", "1 second or more"),
        ("every => '1 month'", "give a cron expression"),
        ("cron => 'daily'", "five fields"),
        ("cron => '* * * * *', timezone => 'Europe/Berlln'", "Europe/Berlln"),
        ("every => '1 s', cron => '* * * * *'", "one of cron, every and rule"),
        ("every => '1 s', catch_up => 'some'", "catch_up"),
    ):
        assert says in sql.error(add.format(wrong))
    assert "no schedule 's' is known" in sql.error("select jobguard.remove_schedule('s')")


def test_the_ledger_translates_the_errors_of_these_functions(sql: Session) -> None:
    """From Python a refused schedule is a ConfigurationError with the hint."""
    ledger = PostgresLedger(lambda: sql.url)
    with pytest.raises(ConfigurationError, match=r"no schedule 's' is known.*known: none"):
        ledger.change_schedule("default", "s", "run")
    ledger.close()


class TestCommand:
    """``jobguard schedules``."""

    @staticmethod
    def call(sql: Session, *words: str, code: int = 0) -> str:
        """Run the command; return its output."""
        result = CliRunner().invoke(
            main,
            ["schedules", *words],
            env={"JOBGUARD_POSTGRES_URL": sql.url},
            catch_exceptions=False,
        )
        assert result.exit_code == code, result.output
        return result.output

    def test_a_schedule_is_added_listed_paused_run_and_removed(self, sql: Session) -> None:
        """The commands do what the SQL functions do."""
        add = ("add", "daily", "--library", "rq", "--queue", "mail", "--task", "app.send")
        assert self.call(sql, *add, "--cron", "0 9 * * *", "--args", '["x"]') == "set: daily\n"
        assert (
            self.call(sql, *add, "--cron", "0 9 * * *", "--args", '["x"]') == "unchanged: daily\n"
        )
        (row,) = json.loads(self.call(sql, "list", "--json"))
        assert (row["cron"], row["args"], row["state"]) == ("0 9 * * *", ["x"], "active")
        assert self.call(sql, "pause", "daily") == "paused: daily\n"
        assert "paused" in self.call(sql, "list")
        assert self.call(sql, "resume", "daily") == "resumed: daily\n"
        job_id = self.call(sql, "run-now", "daily").split()[-1]
        assert sql.ask("select job_id from jobguard.requests") == [job_id]
        assert self.call(sql, "remove", "daily") == "removed: daily\n"
        assert self.call(sql, "list") == "none\n"

    def test_a_typing_error_is_wrong_usage(self, sql: Session) -> None:
        """A time or JSON that cannot be read is exit 2; an unknown schedule is exit 1."""
        add = ("add", "s", "--library", "rq", "--queue", "mail", "--task", "app.send")
        assert "Bad minute" in self.call(sql, *add, "--cron", "61 * * * *", code=2)
        assert "JSON" in self.call(sql, *add, "--every", "60", "--args", "{}", code=2)
        assert "no schedule" in self.call(sql, "pause", "s", code=1)

    def test_periodic_tasks_of_django_celery_beat_are_imported(self, sql: Session) -> None:
        """Intervals and crontabs become schedules; what has no schedule is named."""
        sql.ask(BEAT_TABLES)
        output = self.call(sql, "import-django-celery-beat", code=1)
        assert "imported: every half hour\n" in output
        assert "imported: nights (paused)\n" in output
        assert "not imported: at dawn: it follows the sun" in output
        assert "not imported: loud: the priority is 200" in output
        assert "not imported: 13th and friday: Celery wants both" in output
        rows = {row["name"]: row for row in json.loads(self.call(sql, "list", "--json"))}
        assert rows["every half hour"]["every"] == timedelta(minutes=30).total_seconds()
        assert rows["every half hour"]["queue"] == "celery"
        nights = rows["nights"]
        assert (nights["cron"], nights["timezone"]) == ("0 2,3 * * *", "Europe/Berlin")
        assert (nights["queue"], nights["kwargs"], nights["state"]) == ("slow", {"a": 1}, "paused")

    def test_a_database_without_these_tables_is_an_error(self, sql: Session) -> None:
        """The error names the option for Django's database."""
        assert "--from" in self.call(sql, "import-django-celery-beat", code=1)


BEAT_TABLES = """
create table public.django_celery_beat_intervalschedule (id int, every int, period text);
create table public.django_celery_beat_crontabschedule (
  id int, minute text, hour text, day_of_month text, month_of_year text, day_of_week text, timezone text);
create table public.django_celery_beat_periodictask (
  name text, task text, args text, kwargs text, queue text, priority int, enabled bool, one_off bool,
  start_time timestamptz, expires timestamptz, exchange text, solar_id int, clocked_id int,
  interval_id int, crontab_id int);
insert into public.django_celery_beat_intervalschedule values (1, 30, 'minutes');
insert into public.django_celery_beat_crontabschedule values
  (1, '0', '2, 3', '*', '*', '*', 'Europe/Berlin'), (2, '0', '0', '13', '*', '5', 'UTC');
insert into public.django_celery_beat_periodictask values
  ('every half hour', 't', '[]', '{}', null, null, true, false, null, null, null, null, null, 1, null),
  ('loud', 't', '[]', '{}', null, 200, true, false, null, null, null, null, null, 1, null),
  ('nights', 't', '[]', '{"a": 1}', 'slow', 3, false, false, null, null, null, null, null, null, 1),
  ('13th and friday', 't', '[]', '{}', null, null, true, false, null, null, null, null, null, null, 2),
  ('at dawn', 't', '[]', '{}', null, null, true, false, null, null, null, 1, null, null, null);
"""
