"""Put hooks over a library's own functions, and remove the hooks again.

Other tools (tracers, error reporters) put their own wrappers over the same functions, before or after
jobguard. A hook calls the function that was there before exactly as Python would have called it, so that a
wrapper that checks its bound object works. A wrapper that another tool put over a hook is never replaced:
the hook stays below it and passes every call through.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from types import FunctionType
from typing import Any

Make = Callable[[Any], Any]
"""Makes a hook from the original function. For a method, the first argument of both is the object."""

_ABSENT: Any = object()
_MARK = "_jobguard_patch"


@dataclass(slots=True, eq=False)
class _Patch:
    owner: Any
    name: str
    before: Any
    """The owner's own attribute of this name; _ABSENT if a class only inherits it."""
    original: Callable[..., Any]
    call: Callable[..., Any] = field(init=False)
    """The hook; after the patch is removed, the original."""
    wrapper: Any = field(init=False)
    """The function that calls ``call``."""
    attribute: Any = field(init=False)
    """The attribute that was set on the owner: ``wrapper``, as a static or class method if needed."""

    def put(self, make: Make) -> None:
        self.call = hook = make(self.original)

        @wraps(hook)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return self.call(*args, **kwargs)

        vars(wrapper)[_MARK] = self
        self.wrapper = wrapper
        of_class = inspect.isclass(self.owner)
        kind = _kind(inspect.getattr_static(self.owner, self.name)) if of_class else None
        self.attribute = wrapper if kind is None else kind(wrapper)
        setattr(self.owner, self.name, self.attribute)

    def take_off(self) -> None:
        self.call = self.original
        if vars(self.owner).get(self.name) is not self.attribute:
            return
        if self.before is _ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.before)


@dataclass(slots=True)
class Hooks:
    """A set of hooks that are removed together."""

    _on: list[_Patch] = field(default_factory=list)

    def put(self, owner: Any, name: str, make: Make) -> None:
        """Put a hook over an attribute of a class, a module or an object."""
        getattr(
            owner, name
        )  # AttributeError: the adapter does not know this version of the library
        before = vars(owner).get(name, _ABSENT)
        patch = _passing_through(owner, name, before)
        if patch is not None:
            patch.call = make(patch.original)
        else:
            patch = _Patch(owner, name, before, _original(owner, name, before))
            patch.put(make)
        self._on.append(patch)

    def take_off(self) -> None:
        """Remove all hooks. A hook under a wrapper of another tool stays and passes calls through."""
        while self._on:
            self._on.pop().take_off()


def _passing_through(owner: Any, name: str, found: Any) -> _Patch | None:
    """Return our removed patch of this function that is still called below wrappers of other tools."""
    seen: set[int] = set()
    while found is not None and found is not _ABSENT and id(found) not in seen:
        seen.add(id(found))
        function = getattr(found, "__func__", found)
        patch = getattr(function, "__dict__", {}).get(_MARK)
        if isinstance(patch, _Patch) and patch.wrapper is function:
            ours = patch.owner is owner and patch.name == name
            if ours and patch.call is patch.original:
                return patch
        found = getattr(function, "__wrapped__", None)
    return None


def _original(owner: Any, name: str, before: Any) -> Callable[..., Any]:
    """Return a function that calls the owner's attribute, bound as Python would bind it."""
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
    """Return a function that looks up the method of the object's class at each call.

    So a hook that another tool puts on the class later takes effect.
    """
    kind = type(owner)
    if not hasattr(kind, name):  # made by __getattr__
        return getattr(owner, name)  # type: ignore[no-any-return]

    def call(*args: Any, **kwargs: Any) -> Any:
        found = inspect.getattr_static(kind, name)
        return found.__get__(owner, kind)(*args, **kwargs)

    return _like(getattr(owner, name), call)


def _inherited(owner: type, name: str) -> Callable[..., Any]:
    """Return a function that looks up the method of the base classes at each call."""
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
    """Return staticmethod or classmethod if the attribute is one, also below a transparent wrapper."""
    if isinstance(attribute, staticmethod):
        return staticmethod
    return classmethod if isinstance(attribute, classmethod) else None
