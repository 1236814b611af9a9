"""Hooks: what is put over a library's own functions, and taken off again entry for entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Make = Callable[[Any], Any]
"""Makes a hook of what it is put over."""

_ABSENT = object()


@dataclass(frozen=True, slots=True)
class _Hook:
    owner: Any
    name: str
    before: Any
    """What the owner itself had of this name, if anything: a class may have inherited it."""
    hook: Any


@dataclass(slots=True)
class Hooks:
    """What was put on together, and comes off together."""

    _on: list[_Hook] = field(default_factory=list)

    def put(self, owner: Any, name: str, make: Make) -> None:
        """Put a hook over an attribute of a class or module."""
        before = vars(owner).get(name, _ABSENT)
        hook = make(getattr(owner, name))
        setattr(owner, name, hook)
        self._on.append(_Hook(owner, name, before, hook))

    def take_off(self) -> None:
        """Leave everything as it was; what somebody else put over ours stays, and ours passes through."""
        while self._on:
            one = self._on.pop()
            if vars(one.owner).get(one.name) is not one.hook:
                continue
            if one.before is _ABSENT:
                delattr(one.owner, one.name)
            else:
                setattr(one.owner, one.name, one.before)
