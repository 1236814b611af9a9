"""What cannot be guarded is refused with the reason and a way out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import redis

import jobguard
from jobguard.errors import UnsupportedTarget


@pytest.mark.parametrize("shape", ["client", "connection", "list"])
def test_a_cluster_is_refused(shape: str) -> None:
    """Its client itself, a queue on it, or a broker with it; nothing is connected to."""
    cluster: Any = redis.RedisCluster.__new__(redis.RedisCluster)
    target = {
        "client": cluster,
        "connection": SimpleNamespace(connection=cluster),
        "list": [SimpleNamespace(connection=cluster)],
    }[shape]
    with pytest.raises(UnsupportedTarget, match="without cluster mode"):
        jobguard.guard(target, postgres="postgresql://h/d")
