"""Run Lua scripts on a client of our own: loaded once, many calls in one round trip."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

from redis.exceptions import NoScriptError, RedisError

from jobguard.log import log_event
from jobguard.model import Restored
from jobguard.redis_refusal import RedisRefuses, refusal_of

if TYPE_CHECKING:
    import redis

T = TypeVar("T")
RESTORES_A_TRIP = 200
SEARCHED = 10_000
"""Length of a list up to which it is searched for one entry: that blocks Redis for 0.1 ms."""


def text_of(package: str, name: str) -> str:
    """Return the text of a script in a package."""
    return files(package).joinpath(name).read_text(encoding="utf-8")


class Script:
    """A script that is loaded once, and again only if Redis has lost it."""

    def __init__(self, client: redis.Redis, package: str, name: str):
        self._client = client
        self._text = text_of(package, name)
        self._sha = ""

    def run(self, calls: Sequence[tuple[Sequence[Any], Sequence[Any]]]) -> list[Any]:
        """Run these calls (keys, arguments) in order, in one round trip; the answers contain errors."""
        answers: list[Any] = [NoScriptError()] * len(calls)
        for load in (not self._sha, True):
            left = [at for at, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
            if not left:
                break
            if load:
                self._sha = str(self._client.script_load(self._text))
            with self._client.pipeline(transaction=False) as pipe:
                for at in left:
                    keys, args = calls[at]
                    pipe.evalsha(self._sha, len(keys), *keys, *args)
                for at, answer in zip(left, pipe.execute(raise_on_error=False), strict=True):
                    answers[at] = answer
        return answers


def is_past(client: Any, deadline: float) -> bool:
    """Return True if the clock of Redis is past the deadline."""
    seconds, micros = client.time()
    return float(seconds) + float(micros) / 1e6 > deadline


def restored_by(
    script: Script, calls: Sequence[tuple[UUID, list[Any], list[Any]]]
) -> dict[UUID, Restored]:
    """Run a restore script for these (token, keys, arguments), in order; return the result of each.

    If Redis takes no writes at all, raises RedisRefuses with the results so far.
    """
    result: dict[UUID, Restored] = {}
    for batch in chunks(calls, RESTORES_A_TRIP):
        answers = script.run([(keys, args) for _, keys, args in batch])
        refusal: str | None = None
        for (token, _, _), answer in zip(batch, answers, strict=True):
            if not isinstance(answer, RedisError):
                result[token] = Restored(answer.decode())
            elif (reason := refusal_of(answer)) is not None:
                refusal = reason
            else:
                result[token] = Restored.ERROR
                log_event("restore_failed", error=str(answer), token=token)
        if refusal is not None:
            raise RedisRefuses(refusal, result)
    return result


def chunks(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Cut these into pieces of at most ``size`` values."""
    for start in range(0, len(values), size):
        yield values[start : start + size]
