"""Names the connections by which this process takes messages, so that a leader can count the others."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from kombu.transport.redis import Channel

from jobguard.adapter import trackers
from jobguard.adapters.celery.connection import broker_address_of
from jobguard.adapters.celery.contain_errors import contain_errors
from jobguard.adapters.celery.hooks import Hooks
from jobguard.adapters.celery.lookup import LIBRARY
from jobguard.client_names import label_pool


def put_on(hooks: Hooks) -> None:
    """Name what kombu takes by, in workers and in programs that wait for a reply alike."""
    hooks.put(Channel, "_create_client", create_client)


def create_client(original: Callable[..., Any]) -> Callable[..., Any]:
    """Channel._create_client: ``asynchronous`` is the client that takes messages."""

    @wraps(original)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        client = original(self, *args, **kwargs)
        if kwargs.get("asynchronous", args[0] if args else False):
            with contain_errors("name the connection by which messages are taken"):
                _name(self)
        return client

    return hook


def _name(channel: Any) -> None:
    broker_address = broker_address_of(channel.connection.client)
    if broker_address is None:
        return
    for tracker in trackers():
        source = tracker.source
        there = (source.address, source.prefix) == (
            broker_address.address,
            str(broker_address.layout),
        )
        if source.library == LIBRARY and there:
            label_pool(channel.async_pool, source)
            return
