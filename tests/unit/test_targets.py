"""A target that cannot be guarded is refused with the reason and an alternative."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import celery
import pytest
import redis

import jobguard
from jobguard.errors import UnsupportedTarget


@pytest.mark.parametrize("shape", ["client", "connection", "list"])
def test_a_cluster_is_refused(shape: str) -> None:
    """A client of a cluster, a queue on it and a broker with it are refused; nothing is connected."""
    cluster: Any = redis.RedisCluster.__new__(redis.RedisCluster)
    target = {
        "client": cluster,
        "connection": SimpleNamespace(connection=cluster),
        "list": [SimpleNamespace(connection=cluster)],
    }[shape]
    with pytest.raises(UnsupportedTarget, match="without cluster mode"):
        jobguard.guard(target, postgres="postgresql://h/d")


@pytest.mark.parametrize(
    "url",
    [
        "redis://:S3cr/t0k@h:6379/0",
        "redis://:12/t0k@h/0",
        "redis://:S3cr?t0k@h/0",
        "sentinel://:S3cr/t0k@h:1/0",
        "redis+socket://:S3cr/t0k@/x",
    ],
)
def test_a_url_that_the_library_cannot_read_is_not_repeated(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The library's own error quotes a part of the password, and ours does not."""
    app = celery.Celery("app", broker=url, set_as_current=False)
    guard = jobguard.guard(app, postgres="postgresql://h/d")
    shown = f"{guard.inert} {guard!r} {caplog.text}"
    assert "S3cr" not in shown and "t0k" not in shown
    assert "%2F" in (guard.inert or "")
    assert [record.levelname for record in caplog.records] == ["ERROR"]
