"""The position in a walk over several keys of Redis, as a text that the caller keeps between pages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Position:
    """A place in a sorted sequence of places, and the adapter's own cursor inside of that place."""

    place: str
    cursor: int

    def __str__(self) -> str:
        """Return the position as a text; see `position`."""
        return f"{self.cursor} {self.place}"


def position(places: Iterable[str], after: str) -> Position | None:
    """Return where a walk over these places goes on; None: it is over.

    If the place of the text does not exist any more, the walk goes on at the next one.
    """
    cursor, _, at = after.partition(" ")
    for place in sorted(places):
        if place == at:
            return Position(place, int(cursor or 0))  # at the start, if a queue has the name ""
        if place > at:
            return Position(place, 0)
    return None


def following(places: Iterable[str], now: Position, cursor: int | None) -> str | None:
    """Return the text of the next position: in the same place, or with None in the place after it."""
    if cursor is not None:
        return str(Position(now.place, cursor))
    later = [place for place in places if place > now.place]
    return str(Position(min(later), 0)) if later else None
