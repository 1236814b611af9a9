"""The mode "observe": report everything, restore nothing."""

from __future__ import annotations

import logging

import pytest

from tests.fakes.world import World, calm, events, running


def test_observe_puts_nothing_back(caplog: pytest.LogCaptureFixture) -> None:
    """mode="observe" detects and reports a loss, a death and the outbox, and pushes nothing."""
    caplog.set_level(logging.INFO, "jobguard")
    world = World(mode="observe")
    world.trusted()
    victim = world.worker("w2")
    world.run(4)
    world.enqueue("lost")
    running(world, victim, "running")
    world.record(world.describe("outbox"), outbox=True)
    victim.kill()
    world.run(6)
    world.flushall()

    world.run(60)

    assert world.broker.pushed == []
    assert {"would_restore", "redis_lost_data", "worker_dead"} <= set(events(caplog.records))
    assert set(world.owed()) == {"lost", "running", "outbox"}


def test_observe_reports_a_loss_a_few_times(caplog: pytest.LogCaptureFixture) -> None:
    """An observed loss is logged a few times, and not four times a second."""
    caplog.set_level(logging.INFO, "jobguard")
    world = calm(mode="observe")
    world.enqueue("lost")
    world.run(6)
    world.flushall()

    world.run(60)

    assert events(caplog.records).count("would_restore") < 10
