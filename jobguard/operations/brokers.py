"""What Redis has at this moment: the brokers of the sources, for people who look and act."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any
from uuid import UUID

import redis

from jobguard.adapter import Broker, Source
from jobguard.clients import address_of, client_from_url
from jobguard.errors import JobguardError
from jobguard.model import Observation, Owed
from jobguard.redact import redact
from jobguard.scripts import chunks

Row = Mapping[str, Any]

_TIMEOUT = 2.0
_PAGE = 1000
LARGEST_ENVELOPE = 256 << 10
"""Bytes of an envelope that is read for a person; a larger one is not shown."""


class NoRedis(JobguardError):
    """The Redis of a source is not known here, or its library is not."""


class Brokers:
    """The brokers of a namespace's sources, made when they are asked."""

    def __init__(
        self,
        urls: Sequence[str] = (),
        *,
        clients: Mapping[str, Callable[[], redis.Redis]] | None = None,
    ) -> None:
        self._clients = dict(clients or {})
        for given in urls:
            name, separator, url = given.partition("=")
            if not separator or "://" in name:
                name, url = "", given
            client = client_from_url(url, timeout=_TIMEOUT)
            self._clients[name or address_of(client)] = _same(client)
        self._made: dict[int, Broker] = {}

    def of(self, source: Row) -> Broker:
        """Return the broker of a source, given as a row. Raises NoRedis."""
        id = source.get("source", source.get("id"))
        assert isinstance(id, int)
        if id not in self._made:
            library = [
                e for e in entry_points(group="jobguard.adapters") if e.name == source["library"]
            ]
            if not library:
                raise NoRedis(f"no adapter for {source['library']} is installed here")
            given = Source(
                "", source["library"], source["address"], source["prefix"], source["name"]
            )
            self._made[id] = library[0].load()().broker(given, self._client(source))
        return self._made[id]

    def presence(self, rows: Sequence[Row]) -> Mapping[UUID, Observation]:
        """Return where Redis has these owed deliveries (rows of ReadModel.standing, of one source).

        Raises NoRedis, also if Redis does not answer.
        """
        found: dict[UUID, Observation] = {}
        for page in chunks(rows, _PAGE):
            try:
                found.update(self.of(page[0]).presence([owed_of(row) for row in page]))
            except redis.RedisError as error:
                raise NoRedis(
                    f"Redis at {page[0]['address']} does not answer: {redact(str(error))}"
                ) from error
        return found

    def _client(self, source: Row) -> redis.Redis:
        make = self._clients.get(source["address"]) or self._clients.get(source["name"] or "")
        if make is not None:
            return make()
        if self._clients:
            raise NoRedis(
                f"no --redis URL is {source['address']}; given: {', '.join(sorted(self._clients))}"
            )
        # No URL at all: use the address as it is, without a password.
        place = source["address"]
        url = place if place.startswith("unix:") else f"redis://{place}"
        return client_from_url(url.replace("unix:", "unix://"), timeout=_TIMEOUT)


def owed_of(row: Row) -> Owed:
    """Return an owed delivery as an inspection needs it, from a row of ReadModel.standing."""
    return Owed(
        token=row["token"],
        job_id=row["job_id"],
        queue=row["queue"],
        task=row["task"],
        age=row["age"],
        due_in=row["due_in"],
        expired=row["expired"],
        crashes=row["crashes"],
        recoveries=row["recoveries"],
        claims=row["claims"],
        backoff=row["backoff"],
        claim_number=row["claim_number"],
        claim_worker=row["claim_worker"],
        claim_live=row["runs"],
    )


def arguments_of(library: str, envelope: bytes) -> Mapping[str, Any] | None:
    """Return ``args`` and ``kwargs`` of a job if its message is JSON, else None.

    Nothing is ever unpickled.
    """
    for entry in entry_points(group="jobguard.adapters"):
        if entry.name != library:
            continue
        read: Any = getattr(entry.load()(), "arguments", None)
        try:
            found = None if read is None else read(envelope)
        except (ValueError, AttributeError):
            return None
        usual = found and isinstance(found["args"], list) and isinstance(found["kwargs"], dict)
        return found if usual else None
    return None


def _same(client: redis.Redis) -> Callable[[], redis.Redis]:
    return lambda: client
