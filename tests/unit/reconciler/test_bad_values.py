"""An unreadable value in Redis affects nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

import pytest

from jobguard.model import Observation, Owed
from jobguard.pulse import beat_key, parse_pulse, pulse_key
from jobguard.redis_values import json_in, name_in, number_in
from tests.fakes.world import SOURCE, World, events

BAD = [b"oops", b"\xff\xfe", b"", b"9" * 6000, b"[" * 100_000, b"99999999999999999999999", b"1e3"]


@pytest.mark.parametrize("value", BAD, ids=range(len(BAD)))
def test_a_beat_that_is_no_number(value: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """An unreadable beat is skipped and logged once; the worker is alive, and lost jobs are restored."""
    world = World()
    worker = world.trusted()
    worker.sees_redis = False
    world.redis.strings[beat_key(worker.id)] = value
    world.enqueue("a", "b")
    world.run(6)
    world.flushall()
    world.redis.strings[beat_key(worker.id)] = value

    world.run_until(lambda: world.broker.pushed == ["a", "b"], within=10)
    assert events(caplog.records).count("value_unreadable") == 1
    assert "step_failed" not in events(caplog.records)


@pytest.mark.parametrize("value", BAD, ids=range(len(BAD)))
@pytest.mark.parametrize("name", ["epoch", "n", "source", "installation"])
def test_a_pulse_that_cannot_be_read_is_a_loss(name: str, value: bytes) -> None:
    """An unreadable pulse counts as a loss: all deliveries are verified, and a new pulse replaces it."""
    world = World()
    world.trusted()
    world.enqueue("a")
    world.run(6)
    world.redis.hashes[pulse_key(SOURCE)][name] = value

    world.run(3)
    assert world.redis.pulse() is not None
    assert world.redis.hashes[pulse_key(SOURCE)][name] != value
    world.run_until(lambda: world.store.incidents(SOURCE.id) == [], within=30)


@pytest.mark.parametrize("value", BAD, ids=range(len(BAD)))
def test_no_answer_breaks_the_parser(value: bytes) -> None:
    """The parser returns None for every unreadable answer, because workers read the pulse as well."""
    assert parse_pulse([value] * 4) is None
    assert parse_pulse(ValueError("WRONGTYPE")) is None


def test_a_job_that_cannot_be_read_does_not_stop_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of 50 lost jobs beside one whose hash is broken, all 50 are restored."""
    world = World()
    world.trusted()
    names = [f"job-{n:02}" for n in range(50)]
    world.enqueue(*names, "broken")
    world.run(6)
    presence = world.broker.presence

    def breaking(page: Sequence[Owed]) -> Mapping[UUID, Observation]:
        if any(owed.job_id == "broken" for owed in page):
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
        return presence(page)

    world.broker.presence = breaking  # type: ignore[method-assign]
    world.flushall()
    world.run_until(lambda: world.broker.pushed == names, within=10)
    assert events(caplog.records).count("value_unreadable") == 1


def test_consumers_that_cannot_be_read_do_not_stop_the_jobs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A broken registry of workers is logged once, and jobs lost before are restored."""
    world = World()
    world.trusted()
    world.enqueue("a", "b")
    world.run(6)

    def breaking() -> Any:
        raise KeyError("name")

    world.broker.consumers = breaking  # type: ignore[method-assign]
    world.flushall()
    world.run_until(lambda: world.broker.pushed == ["a", "b"], within=10)
    world.run(20)
    assert events(caplog.records).count("step_failed") == 1


def test_names_reach_postgres_as_it_can_take_them() -> None:
    """A worker name may be anything; it is made storable in Postgres."""
    assert name_in(b"\xff\x00a" + b"x" * 10_000).startswith("\ufffd\ufffda")
    assert len(name_in("x" * 10_000)) == 200
    assert name_in("\ud800") == "?"


def test_deep_json_is_no_json() -> None:
    """JSON that is nested too deeply raises ValueError, as other invalid JSON does."""
    with pytest.raises(ValueError, match="deep"):
        json_in("[" * 100_000)
    assert number_in(b"12") == 12
