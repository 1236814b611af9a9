"""Which adapter a target is for: the one whose library it is made of."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points

from jobguard.adapter import Adapter, DeferredTarget, Guarded
from jobguard.errors import UnsupportedTarget
from jobguard.redact import redact
from jobguard.settings import Settings


def find_adapter(target: object, settings: Settings) -> tuple[Adapter, Guarded | DeferredTarget]:
    """Return the adapter that knows this target, and what guarding it means.

    Raises UnsupportedTarget.
    """
    _refuse_cluster(target)
    tried = []
    for entry in _adapters_for(target):
        try:
            adapter: Adapter = entry.load()()
        except ImportError as error:
            tried.append(f"{entry.name} ({error})")
            continue
        tried.append(entry.name)
        try:
            guarded = adapter.sources(target, namespace=settings.namespace, name=settings.source)
        except (UnsupportedTarget, ValueError) as error:
            # A library that cannot read its URL quotes it, and a password may be in the quotation.
            raise UnsupportedTarget(redact(str(error))) from None
        if guarded is not None:
            return adapter, guarded
    kind = f"{type(target).__module__}.{type(target).__qualname__}"
    raise UnsupportedTarget(
        f"cannot guard a {kind}: give an rq.Queue, a list of them, or a redis.Redis; a "
        "celery.Celery; or a dramatiq RedisBroker "
        f"(adapters tried: {', '.join(tried) or 'none installed'})"
    )


def _refuse_cluster(target: object) -> None:
    """Raise UnsupportedTarget for a client of Redis Cluster, or what is made of one."""
    several = target if isinstance(target, list | tuple) else (target,)
    for one in several:
        for client in (one, getattr(one, "connection", None), getattr(one, "client", None)):
            if any(kind.__name__ == "RedisCluster" for kind in type(client).__mro__):
                raise UnsupportedTarget(
                    "Redis Cluster cannot be guarded: scripts need all keys of a job on one node. Use a "
                    "Redis without cluster mode, with Sentinel if it is to fail over"
                )


def _adapters_for(target: object) -> Iterator[EntryPoint]:
    """The adapter whose library the target is made of comes first; no other library is imported for it."""
    found = {entry.name: entry for entry in entry_points(group="jobguard.adapters")}
    roots = [kind.__module__.split(".")[0] for kind in type(target).__mro__]
    named = [name for name in found if name in roots]
    for name in named or found:
        yield found[name]
