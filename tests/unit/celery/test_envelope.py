"""Envelopes, and the headers that are read without parsing a message."""

from __future__ import annotations

import base64
import json
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobguard.adapters.celery.envelope import (
    PART,
    Routing,
    UnknownEnvelope,
    as_part,
    decode,
    encode,
    fresh,
    holder_in,
    renewed,
    token_in,
    token_of,
)
from jobguard.model import new_token

TOKEN = new_token()
MESSAGE = {
    "body": "W10=",
    "headers": {"id": "1", "jobguard": TOKEN.hex},
    "properties": {"correlation_id": "1", "delivery_tag": str(TOKEN)},
}
RAW = json.dumps(MESSAGE).encode()


@given(
    st.builds(
        Routing,
        queue=st.text(),
        step=st.integers(0, 9),
        exchange=st.text(min_size=1),
        binding=st.text(),
    ),
    st.binary(min_size=1),
)
def test_round_trip(routing: Routing, message: bytes) -> None:
    """A decoded envelope equals the encoded input."""
    assert decode(encode(routing, message)) == (routing, message)


def test_usual_queue_is_small() -> None:
    """The header of the default queue contains no default values."""
    assert len(encode(Routing("celery"), RAW)) == len(RAW) + 5 + len('{"queue":"celery"}')


@pytest.mark.parametrize(
    "damaged", [b"", b"\x09", b"\x01", b"\x01\x00\x00\x00\xffxx", b"\x01\x00\x00\x00\x02{}x"]
)
def test_damaged(damaged: bytes) -> None:
    """A damaged envelope raises an error."""
    with pytest.raises(UnknownEnvelope):
        decode(damaged)


def test_cut_short() -> None:
    """An envelope without its message is not accepted."""
    whole = encode(Routing("celery"), RAW)
    with pytest.raises(UnknownEnvelope):
        decode(whole[: -len(RAW)])


def test_fresh() -> None:
    """A message is pushed with a tag of its own, as the delivery that it is now."""
    minted = new_token()
    first, second = (json.loads(fresh(RAW, minted)) for _ in range(2))
    tags = {first["properties"].pop("delivery_tag"), second["properties"].pop("delivery_tag")}
    assert len(tags) == 2 and str(TOKEN) not in tags
    assert first == second
    assert first["headers"] == {"id": "1", "jobguard": minted.hex}
    with pytest.raises(UnknownEnvelope):
        fresh(b"{}", minted)


def test_as_part() -> None:
    """The message of a chord's last part carries the part's result."""
    message = json.loads(as_part(RAW, b"\x00left"))
    assert base64.b64decode(message["headers"].pop(PART)) == b"\x00left"
    assert message == MESSAGE


class TestHeaders:
    """The token is found in every form in which Redis stores a message."""

    def test_waiting_and_taken(self) -> None:
        """The token is found in a list and in ``unacked``, where the message also names its worker."""
        assert token_in(RAW) == TOKEN.hex.encode() and holder_in(RAW) == ""
        worker = uuid4().hex
        headers = {**MESSAGE["headers"], "redelivered": True, "jobguard-worker": worker}  # type: ignore[dict-item]
        taken = json.dumps([{**MESSAGE, "headers": headers}, "", "celery"]).encode()
        assert token_in(taken) == TOKEN.hex.encode() and holder_in(taken) == worker

    def test_somebody_elses(self) -> None:
        """A value of a user that resembles our header is not taken for it."""
        other = new_token().hex
        quoted = {"name": f'"jobguard": "{other}"', **MESSAGE["headers"]}  # type: ignore[dict-item]
        nested = {"mine": {"jobguard": other}, **MESSAGE["headers"]}  # type: ignore[dict-item]
        for headers in (quoted, nested):
            raw = json.dumps({**MESSAGE, "headers": headers}).encode()
            assert token_in(raw) == TOKEN.hex.encode()

    def test_none(self) -> None:
        """An unguarded message has no token."""
        assert token_in(b'{"headers": {}}') is None
        assert token_of({}) is None and token_of(None) is None
        assert token_of({"jobguard": "what"}) is None and token_of({"jobguard": 7}) is None
        assert token_of({"jobguard": "x" * 32}) is None
        assert token_of({"jobguard": TOKEN.hex}) == TOKEN


def test_a_requeued_delivery_has_all_its_retries() -> None:
    """A delivery that a person requeues has all its retries again, and is otherwise unchanged."""
    headers = {**MESSAGE["headers"], "retries": 3}  # type: ignore[dict-item]
    spent = encode(Routing("mail"), json.dumps({**MESSAGE, "headers": headers}).encode())
    routing, message = decode(renewed(spent))
    assert routing == Routing("mail")
    assert json.loads(message) == {**MESSAGE, "headers": {**headers, "retries": 0}}
    assert fresh(message, TOKEN) != message
    plain = encode(Routing("mail"), RAW)
    assert renewed(plain) == plain
