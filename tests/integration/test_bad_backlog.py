"""What waits in Redis may be anything: an entry that cannot be read hides no other one."""

from __future__ import annotations

import json
import uuid
from typing import Any

import redis

from jobguard.adapters.celery.backlog import BacklogReader as CeleryReader
from jobguard.adapters.celery.layout import Layout as CeleryLayout
from jobguard.adapters.dramatiq.backlog import BacklogReader as DramatiqReader
from jobguard.adapters.dramatiq.layout import Layout as DramatiqLayout
from jobguard.adapters.rq.backlog import BacklogReader as RQReader
from jobguard.adapters.rq.layout import Layout as RQLayout
from jobguard.model import Delivery

NESTED = "[" * 5000 + "]" * 5000
ANYTHING = (b"", b"\xff\xfe", b"null", b"[]", b'"x"', b"1e400", NESTED.encode())


def task(headers: dict[str, Any], properties: dict[str, Any]) -> bytes:
    """Return a message of Celery with these headers and properties."""
    message = {
        "body": "",
        "headers": {"task": "app.send", "id": "right"} | headers,
        "properties": {"delivery_tag": "tag"} | properties,
    }
    return json.dumps(message).encode()


def test_celery(redis_url: str) -> None:
    """Messages with another form of a field are counted as unreadable."""
    client = redis.Redis.from_url(redis_url)
    wrong = (
        *ANYTHING,
        task({}, {"delivery_info": "x"}),
        task({}, {"delivery_info": [1]}),
        task({}, {"priority": float("inf")}),
        task({"retries": float("nan")}, {}),
        task({}, {"delivery_tag": 5}),
    )
    client.rpush("mail", *wrong, task({}, {}))
    page = CeleryReader(client, CeleryLayout()).page(["mail"], after="", limit=100, mark=True)
    assert [one.job_id for one in page.deliveries] == ["right"]
    assert page.unreadable == len(wrong)


def test_dramatiq(redis_url: str) -> None:
    """A number that is none is not known, and a message that is none is recorded by its token."""
    client = redis.Redis.from_url(redis_url)
    numbers = (float("nan"), float("inf"), 1e300, 10**30, -(10**30))
    wrong = [
        json.dumps(
            {
                "message_id": "m",
                "actor_name": "a",
                "options": {"eta": n, "retries": n, "max_age": n},
            }
            | {"message_timestamp": n}
        ).encode()
        for n in numbers
    ]
    for data in (*ANYTHING, *wrong):
        client.hset("dramatiq:mail.DQ.msgs", str(uuid.uuid4()), data)
    client.hset("dramatiq:mail.DQ.msgs", "no token", b"{}")
    reader, found = DramatiqReader(client, DramatiqLayout()), list[Delivery]()
    after: str | None = ""
    while after is not None:
        page = reader.page(["mail"], after=after, limit=100, mark=False)
        found += page.deliveries
        after = page.after
    assert len(found) == len(ANYTHING) + len(wrong)
    assert {(one.attempt, one.due_at, one.expires_at) for one in found} == {(1, None, None)}


def test_rq(redis_url: str) -> None:
    """A hash with another form of a field is counted as unreadable."""
    client = redis.Redis.from_url(redis_url)
    wrong: tuple[dict[Any, Any], ...] = (
        {"dependency_ids": NESTED},
        {"ttl": "abc", "enqueued_at": "2026-01-01T00:00:00.0Z"},
        {"ttl": "5", "enqueued_at": "never"},
        {b"\xff\xfe": "x"},
        {"jg_attempt": "z"},
    )
    for nth, fields in enumerate((*wrong, {})):
        waits = {"status": "deferred" if "dependency_ids" in fields else "queued", "data": "x"}
        client.hset(f"rq:job:{nth}", mapping=waits | fields)
        if "dependency_ids" in fields:
            client.zadd("rq:deferred:mail", {str(nth): 1})
        else:
            client.rpush("rq:queue:mail", str(nth))
    client.rpush("rq:queue:mail", b"\xff\xfe", "no hash")
    reader, found, unreadable = RQReader(client, RQLayout()), list[str](), 0
    after: str | None = ""
    while after is not None:
        page = reader.page(["mail"], after=after, limit=100, mark=True)
        found += [one.job_id for one in page.deliveries]
        unreadable += page.unreadable
        after = page.after
    assert (found, unreadable) == ([str(len(wrong))], len(wrong))
