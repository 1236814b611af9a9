"""A leader whose term ends during a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from uuid import UUID

import pytest

from jobguard.errors import NotLeading
from jobguard.model import Observation, Owed
from tests.fakes.world import FOR_EVER, World, calm, leader_store


def succeed(world: World) -> None:
    """Let another process take the lease without the knowledge of the old leader."""
    world.store.resign(world.term)
    assert leader_store(world.ledger).elect(lease=FOR_EVER) is not None


def test_a_stale_term_in_the_middle_of_a_step() -> None:
    """A leader whose term ends during its inspection changes no row and pushes nothing."""
    world = calm()
    world.enqueue("job")
    world.run(6)
    world.flushall()
    world.step(0.6)
    presence = world.broker.presence

    def meanwhile(page: Sequence[Owed]) -> Mapping[UUID, Observation]:
        succeed(world)
        return presence(page)

    world.broker.presence = meanwhile  # type: ignore[method-assign]
    world.clock.advance(2)
    held = world.signs
    with pytest.raises(NotLeading):
        world.monitor.step(world.term, held)

    assert world.broker.pushed == []
    assert world.owed()["job"].recoveries == 0


def test_a_leader_that_was_stopped_before_its_push() -> None:
    """A leader that was stopped for more than 5 s after it read the presence pushes nothing."""
    world = calm()
    world.enqueue("job")
    world.run(6)
    world.flushall()
    world.step(0.6)

    def sleep() -> None:
        world.clock.advance(6)
        succeed(world)

    world.broker.before_restore = sleep
    with pytest.raises(NotLeading):
        world.run(5)

    assert world.broker.pushed == []
    assert world.owed()["job"].recoveries == 0
