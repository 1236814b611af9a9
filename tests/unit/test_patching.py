from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import wrapt as typed_wrapt

from jobguard.patching import Hooks

Calls = list[str]
wrapt: Any = typed_wrapt  # its types differ between versions


class Base:
    """A base class of a library."""

    def inherited(self, word: str) -> str:
        """Return a word that names this method."""
        return f"base {word}"


class Library(Base):
    """A class of a library."""

    def method(self, word: str) -> str:
        """Return a word that names this method."""
        return f"method {word}"

    @classmethod
    def of_class(cls, word: str) -> str:
        """Return a word that names this method."""
        return f"{cls.__name__} {word}"

    @staticmethod
    def static(word: str) -> str:
        """Return a word that names this method."""
        return f"static {word}"


class Child(Library):
    """A class of the user."""


@pytest.fixture
def library() -> Iterator[type[Library]]:
    """Return the class, and restore it after the test."""
    before = dict(vars(Library))
    yield Library
    for name in set(vars(Library)) - set(before):
        delattr(Library, name)
    for name in ("method", "of_class", "static"):
        if vars(Library)[name] is not before[name]:
            setattr(Library, name, before[name])


def hook(calls: Calls) -> Callable[[Any], Any]:
    """Return a function that makes a hook, which notes each call."""

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def hooked(*args: Any, **kwargs: Any) -> Any:
            calls.append("ours")
            return original(*args, **kwargs)

        return hooked

    return make


def trace(owner: Any, name: str, calls: Calls) -> None:
    """Wrap an attribute as tracers do; the wrapper reads the object that the call is bound to."""

    def wrapper(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        calls.append(f"theirs, bound to {getattr(instance, '__name__', type(instance).__name__)}")
        return wrapped(*args, **kwargs)

    wrapt.wrap_function_wrapper(owner, name, wrapper)


def untrace(owner: Any, name: str) -> None:
    """Remove a tracer's wrapper as tracers do."""
    found: Any = getattr(owner, name)
    if isinstance(found, getattr(wrapt, "BaseObjectProxy", wrapt.ObjectProxy)):
        setattr(owner, name, found.__wrapped__)


BOUND = {
    "method": ("Library", "method x"),
    "inherited": ("Library", "base x"),
    "of_class": ("Library", "Library x"),
    "static": ("NoneType", "static x"),
}


class TestBesideATracer:
    """The wrapper of a tracer works whether it was put on before or after our hook."""

    @pytest.mark.parametrize("name", BOUND)
    @pytest.mark.parametrize("first", ["ours", "theirs"])
    def test_both_are_called(self, library: type[Library], name: str, first: str) -> None:
        """In both orders, the wrapper sees the object that the call is bound to."""
        calls: Calls = []
        hooks = Hooks()
        steps: list[Callable[[], None]] = [
            lambda: hooks.put(library, name, hook(calls)),
            lambda: trace(library, name, calls),
        ]
        for step in steps if first == "ours" else reversed(steps):
            step()
        instance, answer = BOUND[name]
        theirs = f"theirs, bound to {instance}"
        assert getattr(library(), name)("x") == answer
        assert calls == (["ours", theirs] if first == "theirs" else [theirs, "ours"])

        calls.clear()
        hooks.take_off()
        assert getattr(library(), name)("x") == answer
        assert calls == [theirs]

    def test_a_class_method_knows_its_class(self, library: type[Library]) -> None:
        """A class method is bound to the class that it is called on."""
        calls: Calls = []
        trace(library, "of_class", calls)
        Hooks().put(library, "of_class", hook(calls))
        assert Child.of_class("x") == "Child x"
        assert calls == ["ours", "theirs, bound to Child"]

    def test_a_callable_object_is_not_bound(self, library: type[Library]) -> None:
        """Python binds no object without __get__."""
        library.method = functools.partial(str.upper, "plain")  # type: ignore[method-assign]
        calls: Calls = []
        Hooks().put(library, "method", hook(calls))
        assert library().method() == "PLAIN"  # type: ignore[call-arg]
        assert calls == ["ours"]

    def test_a_module(self) -> None:
        """A hook on a function of a module works below and above a wrapper."""
        module = SimpleNamespace(function=lambda word: f"function {word}")
        calls: Calls = []
        hooks = Hooks()
        trace(module, "function", calls)
        theirs = module.function
        hooks.put(module, "function", hook(calls))
        assert module.function("x") == "function x"
        assert calls == ["ours", "theirs, bound to NoneType"]
        hooks.take_off()
        assert module.function is theirs


class TestTakingOff:
    """Hooks are installed and removed in any order."""

    def test_leaves_what_was_there(self, library: type[Library]) -> None:
        """The original objects are restored; an inherited method is inherited again."""
        before = dict(vars(library))
        hooks = Hooks()
        for name in BOUND:
            hooks.put(library, name, hook([]))
        hooks.take_off()
        assert dict(vars(library)) == before

    def test_below_a_wrapper_it_passes_through(self, library: type[Library]) -> None:
        """A removed hook passes calls through, below a wrapper and after that wrapper is removed."""
        calls: Calls = []
        hooks = Hooks()
        hooks.put(library, "method", hook(calls))
        trace(library, "method", calls)
        hooks.take_off()
        assert library().method("x") == "method x"
        assert calls == ["theirs, bound to Library"]
        untrace(library, "method")
        calls.clear()
        assert library().method("x") == "method x"
        assert calls == []

    @pytest.mark.parametrize("over", [True, False])
    def test_put_again_below_a_wrapper(self, library: type[Library], over: bool) -> None:
        """After repeated guarding below a wrapper, each hook is called once."""
        calls: Calls = []
        hooks = Hooks()
        hooks.put(library, "method", hook(calls))
        trace(library, "method", calls)
        for _ in range(5):
            hooks.take_off()
            if not over:
                untrace(library, "method")
            hooks.put(library, "method", hook(calls))
        calls.clear()
        assert library().method("x") == "method x"
        assert calls == (["theirs, bound to Library", "ours"] if over else ["ours"])
        depth, found = 0, vars(library)["method"]
        while found is not None:
            depth, found = depth + 1, getattr(found, "__wrapped__", None)
        assert depth < 6

    def test_two_sets_over_one_function(self, library: type[Library]) -> None:
        """Each set of hooks can be removed separately."""
        first: Calls = []
        second: Calls = []
        below, above = Hooks(), Hooks()
        below.put(library, "method", hook(first))
        above.put(library, "method", hook(second))
        below.take_off()
        assert library().method("x") == "method x"
        assert (first, second) == ([], ["ours"])
        above.take_off()
        second.clear()
        assert library().method("x") == "method x"
        assert (first, second) == ([], [])


class TestAnObject:
    """Hooks on one object, while other tools hook its class."""

    def test_the_class_is_asked_at_each_call(self, library: type[Library]) -> None:
        """A tracer that wraps the class later is called until it is removed."""
        calls: Calls = []
        one, hooks = library(), Hooks()
        hooks.put(one, "method", hook(calls))
        trace(library, "method", calls)
        assert one.method("x") == "method x"
        assert calls == ["ours", "theirs, bound to Library"]
        untrace(library, "method")
        calls.clear()
        assert one.method("x") == "method x"
        assert calls == ["ours"]
        hooks.take_off()
        assert vars(one) == {}

    def test_a_generated_method(self) -> None:
        """A method that __getattr__ makes is hooked as well."""

        class Proxy:
            def __getattr__(self, name: str) -> Any:
                if name.startswith("do_"):
                    return lambda word: f"{name} {word}"
                raise AttributeError(name)

        calls: Calls = []
        one, hooks = Proxy(), Hooks()
        hooks.put(one, "do_ack", hook(calls))
        assert one.do_ack("x") == "do_ack x"
        assert calls == ["ours"]
        with pytest.raises(AttributeError):
            hooks.put(one, "other", hook(calls))
