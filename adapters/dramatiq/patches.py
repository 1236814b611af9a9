"""Install the hooks, and remove them.

All hooks are on one broker object, except ``group.run`` and, for ``jobguard run``,
``Worker.start``. If a method is missing, or its arguments have other names, this adapter does not
know the version of Dramatiq: then nothing is patched.
"""

from __future__ import annotations

import importlib
import inspect
import threading
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import dramatiq
from dramatiq import Worker, group
from dramatiq.brokers.redis import RedisBroker

from jobguard.adapter import Tracker, second_guard
from jobguard.adapters.dramatiq.cancellation import Cancellation
from jobguard.adapters.dramatiq.consumer import InFlightMessages
from jobguard.adapters.dramatiq.joins import Joins, run_group
from jobguard.adapters.dramatiq.layout import new_short_lived
from jobguard.adapters.dramatiq.middleware import GuardMiddleware
from jobguard.adapters.dramatiq.producer import Producer
from jobguard.adapters.dramatiq.worker import WorkerHooks
from jobguard.errors import UnsupportedTarget
from jobguard.host_safety import contain_errors
from jobguard.log import log_event
from jobguard.patching import Hooks
from jobguard.registry import adopt_mark, share_mark, tracker_for_worker

if TYPE_CHECKING:
    from dramatiq import Broker


_GUARD = "_jobguard"
_ASKED = "_jobguard_asked"
"""The attribute of a broker for which the environment was asked."""
_KNOWN = {
    "enqueue": ("message",),
    "consume": ("queue_name", "prefetch", "timeout"),
    "flush": ("queue_name",),
}
_lock = threading.Lock()
_guards: list[BrokerGuard] = []
_library = Hooks()
_workers_guarded: list[Callable[..., Any] | None] = []
"""After ``guard_workers``: the function of the command's worker processes, if this Dramatiq has it."""


class BrokerGuard:
    """One guarded broker object with its hooks."""

    def __init__(self, tracker: Tracker, broker: RedisBroker) -> None:
        self.tracker = tracker
        self.broker = broker
        in_flight = InFlightMessages()
        self.joins = Joins(tracker, broker)
        self.worker = WorkerHooks(tracker, broker, in_flight, self.joins)
        producer = Producer(tracker, broker, in_flight, self.worker)
        self.cancellation = cancellation = Cancellation(tracker, broker)
        self._middleware = GuardMiddleware(producer, self.worker)
        self._hooks: dict[str, Callable[[Any], Any]] = {
            "enqueue": producer.enqueue,
            "do_enqueue": producer.do_enqueue,
            "consume": self.worker.consume,
            "do_ack": self.worker.do_ack,
            "do_nack": self.worker.do_nack,
            "flush": cancellation.flush,
            "do_purge": cancellation.do_purge,
            "add_middleware": cancellation.add_middleware,
        }
        self._on = Hooks()
        self._broker_id = broker.broker_id

    def install_hooks(self) -> None:
        """Install the hooks on the broker."""
        for name, make in self._hooks.items():
            self._on.put(self.broker, name, make)
        self._on.put(self.broker.client, "register_script", self.cancellation.register_script)
        if _is_consuming(self.broker):
            # Its consumers are not hooked. It keeps the id by which a leader sees it as unguarded.
            log_event("guard_late", source=str(self.tracker.source))
        else:
            self.broker.broker_id = str(new_short_lived())
        self.broker.add_middleware(self._middleware)
        setattr(self.broker, _GUARD, self)

    def over(self, name: str, original: Callable[..., Any]) -> Any:
        """Return the hook of this name over a call of the broker that has begun."""
        return self._hooks[name](original)

    def remove_hooks(self) -> None:
        """Restore the broker, but keep the hooks that others have put over ours."""
        delattr(self.broker, _GUARD)
        self.worker.end()
        self.joins.release()
        self.cancellation.release()
        middleware = [each for each in self.broker.middleware if each is not self._middleware]
        self.broker.middleware = middleware
        self.broker.broker_id = self._broker_id
        self._on.take_off()


def guard_of(broker: Broker) -> BrokerGuard | None:
    """Return the guard of a broker object."""
    found: BrokerGuard | None = broker.__dict__.get(_GUARD)
    return found


def install(tracker: Tracker, broker: Any) -> None:
    """Install the hooks on a broker; raise UnsupportedTarget if this Dramatiq is unknown."""
    with _lock:
        there = guard_of(broker)
        if there is not None:
            if there.tracker.source.id != tracker.source.id:
                raise second_guard("this broker", there.tracker.source, tracker.source)
            return
        for problem in _unknown_parts(broker):
            raise UnsupportedTarget(
                f"Dramatiq {dramatiq.__version__} has no {problem} as jobguard knows it: messages are "
                "not guarded. Use a Dramatiq from 1.17 to 2.x, or upgrade jobguard."
            )
        made = BrokerGuard(tracker, broker)
        made.install_hooks()
        if not _guards:
            _library.put(group, "run", run_group(guard_of))
        _guards.append(made)


def uninstall(tracker: Tracker) -> None:
    """Remove the hooks from every broker of this source; after the last broker also those on Dramatiq."""
    with _lock:
        for made in [each for each in _guards if each.tracker.source.id == tracker.source.id]:
            _guards.remove(made)
            made.remove_hooks()
        if not _guards:
            _library.take_off()


def _is_consuming(broker: Broker) -> bool:
    """Return True if a worker of this process takes messages from this broker."""
    workers = [getattr(middleware, "worker", None) for middleware in broker.middleware]
    return any(
        consumer.is_alive()
        for worker in workers
        if isinstance(worker, Worker)
        for consumer in worker.consumers.values()
    )


def guard_workers() -> None:
    """Guard each broker that a worker starts with, or that sends or is emptied, by the environment."""
    with _lock:
        if not _workers_guarded:
            command: Any = importlib.import_module("dramatiq.cli")
            original = getattr(command, "worker_process", None)
            _workers_guarded.append(original)
            if original is not None:
                # Not a hook: a new Python finds the function of its process by its name.
                command.worker_process = partial(_worker_process, share_mark())
            Hooks().put(Worker, "start", _worker_start)
            for name in ("enqueue", "flush"):
                Hooks().put(RedisBroker, name, partial(_first_use, name))


def _worker_process(mark: object, *args: Any) -> Any:
    """Be a worker process of the command, also in a new Python (``--use-spawn``, macOS)."""
    adopt_mark(mark)
    guard_workers()
    original = _workers_guarded[0]
    return original(*args) if original is not None else None


def _worker_start(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def start(self: Worker, *args: Any, **kwargs: Any) -> Any:
        _guard_by_environment(self.broker)
        return original(self, *args, **kwargs)

    return start


def _first_use(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def hook(self: RedisBroker, *args: Any, **kwargs: Any) -> Any:
        made = _guard_by_environment(self)
        call: Callable[..., Any] = partial(original, self)
        return (call if made is None else made.over(name, call))(*args, **kwargs)

    return hook


def _guard_by_environment(broker: Broker) -> BrokerGuard | None:
    """Guard a broker for which no guard() was called; return its guard if it has just got it."""
    state = vars(broker)
    if not isinstance(broker, RedisBroker) or _GUARD in state or _ASKED in state:
        return None
    state[_ASKED] = True
    with contain_errors("guard a broker by its environment", event="guard_refused"):
        tracker_for_worker(broker)
    return guard_of(broker)


def _unknown_parts(broker: RedisBroker) -> Iterator[str]:
    """Yield the parts of this Dramatiq that are not as we know them."""
    for name, leading in _KNOWN.items():
        method = getattr(broker, name, None)
        try:
            names = tuple(inspect.signature(method).parameters) if callable(method) else ()
        except (TypeError, ValueError):
            names = ()
        if names[: len(leading)] != leading:
            yield f"RedisBroker.{name}({', '.join(leading)}, ...)"
    for name in ("broker_id", "namespace", "client", "middleware", "actors"):
        if not hasattr(broker, name):
            yield f"RedisBroker.{name}"
