"""Put hooks over a library's own functions, and take them off again.

Other tools (tracers, error reporters) put their own wrappers over the same functions, before us or
after us. A hook calls what was there before exactly as Python would have called it, so that a wrapper
that asks what it is bound to gets its answer. What another tool put over a hook is never replaced: the
hook stays below it and passes every call through.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from types import FunctionType
from typing import Any

Make = Callable[[Any], Any]
"""Makes a hook of the function that it calls: with the object first, if it is a method."""

_ABSENT: Any = object()
_MARK = "_jobguard_patch"


@dataclass(slots=True, eq=False)
class _Patch:
    owner: Any
    name: str
    before: Any
    """What the owner itself had of this name, if anything: a class may have inherited it."""
    original: Callable[..., Any]
    call: Callable[..., Any] = field(init=False)
    """The hook; the original once the patch is off."""
    stands: Any = field(init=False)
    """The function that calls ``call``."""
    placed: Any = field(init=False)
    """The same as the owner holds it."""

    def put(self, make: Make) -> None:
        self.call = hook = make(self.original)

        @wraps(hook)
        def stands(*args: Any, **kwargs: Any) -> Any:
            return self.call(*args, **kwargs)

        vars(stands)[_MARK] = self
        self.stands = stands
        of_class = inspect.isclass(self.owner)
        kind = _kind(inspect.getattr_static(self.owner, self.name)) if of_class else None
        self.placed = stands if kind is None else kind(stands)
        setattr(self.owner, self.name, self.placed)

    def take_off(self) -> None:
        self.call = self.original
        if vars(self.owner).get(self.name) is not self.placed:
            return
        if self.before is _ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.before)


@dataclass(slots=True)
class Hooks:
    """What was put on together, and comes off together."""

    _on: list[_Patch] = field(default_factory=list)

    def put(self, owner: Any, name: str, make: Make) -> None:
        """Put a hook over an attribute of a class, a module or an object."""
        getattr(owner, name)  # AttributeError: this library is not as its adapter knows it
        before = vars(owner).get(name, _ABSENT)
        patch = _passing_through(owner, name, before)
        if patch is not None:
            patch.call = make(patch.original)
        else:
            patch = _Patch(owner, name, before, _original(owner, name, before))
            patch.put(make)
        self._on.append(patch)

    def take_off(self) -> None:
        """Leave everything as it was, but for what others have put over ours."""
        while self._on:
            self._on.pop().take_off()


def _passing_through(owner: Any, name: str, found: Any) -> _Patch | None:
    """Return a patch of ours that is off and is still called, below the wrappers of others."""
    seen: set[int] = set()
    while found is not None and found is not _ABSENT and id(found) not in seen:
        seen.add(id(found))
        function = getattr(found, "__func__", found)
        patch = getattr(function, "__dict__", {}).get(_MARK)
        if isinstance(patch, _Patch) and patch.stands is function:
            ours = patch.owner is owner and patch.name == name
            if ours and patch.call is patch.original:
                return patch
        found = getattr(function, "__wrapped__", None)
    return None


def _original(owner: Any, name: str, before: Any) -> Callable[..., Any]:
    """Return a function that calls what the owner has, bound as Python would bind it."""
    if not inspect.isclass(owner):
        return before if before is not _ABSENT else _of_its_class(owner, name)
    if before is _ABSENT:
        return _inherited(owner, name)
    if type(before) is FunctionType:
        return before
    kind = _kind(before)
    if kind is staticmethod:
        return before.__get__(None, owner)  # type: ignore[no-any-return]
    if kind is classmethod:
        return _like(before, lambda cls, *args, **kw: before.__get__(None, cls)(*args, **kw))
    if not hasattr(type(before), "__get__"):
        return _like(before, lambda _, *args, **kw: before(*args, **kw))
    return _like(before, lambda self, *args, **kw: before.__get__(self, type(self))(*args, **kw))


def _of_its_class(owner: Any, name: str) -> Callable[..., Any]:
    """Return the method of an object's class as it is at each call, whoever hooks it meanwhile."""
    kind = type(owner)
    if not hasattr(kind, name):  # made by __getattr__
        return getattr(owner, name)  # type: ignore[no-any-return]

    def call(*args: Any, **kwargs: Any) -> Any:
        found = inspect.getattr_static(kind, name)
        return found.__get__(owner, kind)(*args, **kwargs)

    return _like(getattr(owner, name), call)


def _inherited(owner: type, name: str) -> Callable[..., Any]:
    """Return the method of the classes above as it is at each call."""
    if _kind(inspect.getattr_static(owner, name)) is staticmethod:
        return _like(
            getattr(owner, name),
            lambda *args, **kw: getattr(super(owner, owner), name)(*args, **kw),
        )
    return _like(
        getattr(owner, name),
        lambda self, *args, **kw: getattr(super(owner, self), name)(*args, **kw),
    )


def _like(model: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    return wraps(model)(call)


def _kind(attribute: Any) -> type[staticmethod[..., Any]] | type[classmethod[Any, ..., Any]] | None:
    """Whether it is a static or a class method, also below a transparent wrapper of another tool."""
    if isinstance(attribute, staticmethod):
        return staticmethod
    return classmethod if isinstance(attribute, classmethod) else None
