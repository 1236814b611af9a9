"""Find the trackers of a Redis that a client reaches by another address than they do.

``0.0.0.0``, ``127.1``, a second host name and a Unix socket may all be one server. Only the server knows:
it is asked once for each address that no tracker has, and again after a minute, because a name may move.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import redis

from jobguard.clients import is_test_double, own_client
from jobguard.host_safety import contain_errors
from jobguard.log import log_event
from jobguard.pulse import parse_pulse, read_pulse
from jobguard.redis_values import database_of

if TYPE_CHECKING:
    from jobguard.adapter import Source, Tracker

_TIMEOUT = 0.5
"""Seconds that one answer may take."""
_VALID = 60.0
"""Seconds for which an answer is used."""
_ASK_AGAIN = 1.0
"""The same, if a server did not answer."""

_found: dict[tuple[str, ...], tuple[float, str]] = {}
"""For an address, and those of the trackers: until when, at which of these it is; "" at none."""


def trackers_at(
    trackers: Sequence[Tracker], address: str, client: Callable[[], redis.Redis]
) -> list[Tracker]:
    """Return those of these trackers whose Redis is at this address, or is the server at this address.

    ``client``: makes a client for the address. Raises nothing. A server that does not answer is asked again
    later, and its last answer is used.
    """
    named = [tracker for tracker in trackers if tracker.source.address == address]
    if named:
        return named
    others = {
        tracker.source.address: tracker
        for tracker in trackers
        if database_of(tracker.source.address) == database_of(address)
    }
    if not others:
        return []
    key = (address, *others)
    until, there = _found.get(key, (0.0, ""))
    if time.monotonic() >= until:
        valid = _ASK_AGAIN
        with contain_errors("compare two addresses"):
            there, valid = _compare(client(), address, others, there)
        _found[key] = (time.monotonic() + valid, there)
    return [tracker for tracker in trackers if tracker.source.address == there]


def _compare(
    client: redis.Redis, address: str, others: dict[str, Tracker], before: str
) -> tuple[str, float]:
    """Return the one of these addresses that is the server of this client, and how long that is valid."""
    unknown = None
    if not isinstance(client, redis.Redis) or is_test_double(client):
        return "", _VALID
    for other, tracker in others.items():
        if tracker.client is None:
            continue
        try:
            with (
                closing(own_client(client, timeout=_TIMEOUT)) as here,
                closing(own_client(tracker.client(), timeout=_TIMEOUT)) as there,
            ):
                same = _is_same(here, there, tracker.source)
        except redis.RedisError as error:
            unknown = error
            continue
        if same:
            if other != before:
                log_event("redis_recognized", redis=address, source=str(tracker.source))
            return other, _VALID
    if unknown is None:
        return "", _VALID
    log_event("redis_unrecognized", redis=address, error=str(unknown))
    return before, _ASK_AGAIN


def _is_same(here: redis.Redis, there: redis.Redis, source: Source) -> bool:
    """Return True if both clients lead to one server. Raises RedisError if that cannot be known."""
    try:
        ids: list[Any] = [client.info("server").get("run_id") for client in (here, there)]
    except redis.ResponseError:  # INFO is forbidden here
        ids = [parse_pulse(read_pulse(client, source)) for client in (here, there)]
        ids = [None if pulse is None else pulse.epoch for pulse in ids]
    if None in ids:
        raise redis.ResponseError("Redis shows neither its run id nor a pulse")
    return bool(ids[0] == ids[1])
