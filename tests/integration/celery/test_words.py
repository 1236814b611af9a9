"""The log of a worker about the guard."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import chord, group
from kombu.entity import Exchange

from jobguard.demo.servers import RedisServer
from tests.integration.celery.rig import PROGRAM, Rig, a_rig

CELERY = str(Path(sys.executable).parent / "celery")
BEGINS = "a guarded worker starts"


@pytest.fixture
def rig(tmp_path: Path, database: str, redis_url: str) -> Iterator[Rig]:
    """Give real workers, and a guarded application."""
    with a_rig(tmp_path, database, redis_url) as rig:
        yield rig


@pytest.mark.parametrize("pool", ["prefork", "solo"])
def test_a_guarded_worker_logs_it(rig: Rig, pool: str) -> None:
    """A guarded worker logs that once, after Celery has set up its logging."""
    worker = rig.worker(pool, conf={"worker_hijack_root_logger": True})
    assert worker.text.count(BEGINS) == 1
    assert worker.text.index(BEGINS) < worker.text.index(" ready.")


def test_a_worker_that_cannot_be_guarded_logs_the_reason(rig: Rig) -> None:
    """A worker that cannot be guarded logs the reason at every log level."""
    worker = rig.worker("solo", JOBGUARD_POSTGRES_URL="", DATABASE_URL="")
    assert re.search(r"JOBGUARD_POSTGRES_URL", worker.text), worker.text
    assert BEGINS not in worker.text


def test_jobguard_run_guards_an_app_that_calls_no_guard(rig: Rig) -> None:
    """``jobguard run`` guards an app by the environment; its tasks are claimed and ended."""
    worker = rig._start(
        "run",
        *("-c", "from jobguard.cli import main; main()", "run", "--"),
        *(
            CELERY,
            "-A",
            PROGRAM,
            "worker",
            "-P",
            "prefork",
            "-c",
            "1",
            "-l",
            "INFO",
        ),
        UNGUARDED="1",
    )
    rig._until_up(worker, lambda: " ready." in worker.text)
    assert BEGINS in worker.text
    job_id = rig.send("ok")
    rig.until(lambda: rig.ended(job_id))
    assert rig.ask("select outcome::text, number from jobguard.history") == [("completed", 1)]


@pytest.mark.parametrize("signal", ["worker_init", "celeryd_after_setup"])
def test_a_guard_made_while_the_worker_starts_is_in_force(rig: Rig, signal: str) -> None:
    """A receiver of a start signal calls guard(): the worker claims its tasks and reports their ends."""
    worker = rig.worker("solo", GUARD_AT=signal)
    assert BEGINS in worker.text
    job_id = rig.send("ok")
    rig.until(lambda: rig.ended(job_id))
    assert rig.ask("select outcome::text, number from jobguard.history") == [("completed", 1)]


LATE = "runs are not guarded: call guard() before the worker"


def test_a_guard_made_in_a_child_is_too_late(rig: Rig) -> None:
    """A receiver of worker_process_init calls guard(): the worker is unguarded, and an error says so."""
    worker = rig.worker("prefork", concurrency=1, GUARD_AT="worker_process_init")
    rig.until(lambda: LATE in worker.text)


def test_a_guard_made_after_the_start_does_not_make_the_worker_look_guarded(rig: Rig) -> None:
    """A receiver of worker_ready calls guard(): an error, and no new connection is named as guarded."""
    conf = {"worker_enable_remote_control": False}
    worker = rig.worker("solo", conf=conf, GUARD_AT="worker_ready")
    rig.until(lambda: LATE in worker.text)

    def taking() -> dict[str, str]:
        clients = rig.redis.client_list()
        return {one["id"]: one["name"] for one in clients if one["cmd"] == "brpop"}

    rig.until(taking)
    before = taking()
    for client in before:
        rig.redis.client_kill_filter(_id=client)
    rig.until(lambda: taking().keys() - before.keys())
    assert not any("jobguard" in name for name in taking().values())


def test_jobguard_run_logs_why_it_guards_nothing(rig: Rig) -> None:
    """``jobguard run`` logs why it guards nothing, and runs the worker nevertheless."""
    worker = rig._start(
        "run",
        *("-c", "from jobguard.cli import main; main()", "run", "--"),
        *(CELERY, "-A", PROGRAM, "worker", "-P", "solo", "-l", "WARNING"),
        UNGUARDED="1",
        JOBGUARD_POSTGRES_URL="",
        DATABASE_URL="",
    )
    rig._until_up(worker, lambda: "JOBGUARD_POSTGRES_URL" in worker.text)


def test_a_revoked_task_is_no_late_end(rig: Rig) -> None:
    """A revoked task has its tombstone since the revoke; the worker's report is no late end."""
    worker = rig.worker("solo")
    job_id = rig.send("ok", "revoked", countdown=2)
    rig.until(lambda: rig.redis.hlen("unacked"))
    rig.app.control.revoke(job_id)
    rig.until(lambda: "Discarding revoked task" in worker.text)
    assert worker.stop() == 0
    assert rig.ended(job_id) == ["cancelled"]
    assert "came too late" not in worker.text


def test_a_broadcast_queue_has_nothing_to_purge(
    tmp_path: Path, database: str, own_redis: RedisServer
) -> None:
    """The broadcast queue is deleted when its worker ends, with or without a Redis.

    What it brought is in no ledger: if its worker dies, no other could run it.
    """
    with a_rig(tmp_path, database, own_redis.url) as rig:
        worker = rig.worker("solo", BROADCAST="1")
        everyone = Exchange("everyone", type="fanout")
        to_all = {"exchange": "everyone", "exchange_type": "fanout", "routing_key": "celery"}
        rig.send("ok", "all", declare=[everyone], **to_all)
        rig.until(lambda: rig.written()["all"])
        own_redis.kill()
        rig.until(lambda: "Connection to broker lost" in worker.text)
        own_redis.start()
        rig.until(lambda: worker.text.count("Connected to") == 2)
        worker.stop()
        assert "record a purge" not in worker.text
        assert not rig.owed() and not rig.ask("select from jobguard.history")


def test_a_member_that_expired_in_a_loss_fails_its_chord(
    tmp_path: Path, database: str, own_redis: RedisServer
) -> None:
    """The member is REVOKED, and the error callbacks of the body run, as without a loss."""
    with a_rig(tmp_path, database, own_redis.url) as rig:
        rig.reconciler()
        first = rig.worker("solo")
        rig.until(rig.trusted)
        assert first.stop() == 0
        late = rig.signature("ok", "expired").set(expires=3)
        body = rig.signature("collect", "all")
        body.on_error(rig.signature("ok", "an-error").set(immutable=True))
        sent = chord(group([rig.signature("ok"), late], app=rig.app), app=rig.app)(body)
        expired = str(sent.parent.results[1].id)
        del sent  # the object must not connect to its Redis later
        own_redis.restart(keep_data=False)
        rig.until(lambda: rig.redis.llen("celery") == 2)
        rig.until(
            lambda: rig.ask("select now() - interval '4 s' > min(recorded_at) from jobguard.jobs")[
                0
            ][0]
        )
        rig.worker("solo")
        rig.until(lambda: rig.written()["an-error"])
        rig.until(lambda: rig.ended(expired) == ["cancelled"])
        assert rig.written() == {"ok": 1, "an-error": 1}
        assert rig.app.AsyncResult(expired).state == "REVOKED"
        assert "expired" in rig.error(expired)
