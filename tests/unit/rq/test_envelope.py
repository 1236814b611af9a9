from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as some

from jobguard.adapters.rq.envelope import (
    VERSION,
    Mode,
    Routing,
    UnknownEnvelope,
    decode,
    encode,
)

ROUTINGS = some.builds(
    Routing,
    mode=some.sampled_from(Mode),
    at_front=some.booleans(),
    score=some.sampled_from(["", "+inf", "1700000000"]),
    parents=some.lists(some.text(max_size=9), max_size=3).map(tuple),
    allow_failure=some.booleans(),
    group=some.text(max_size=9),
    rate_key=some.text(max_size=9),
    rate_concurrency=some.integers(0, 9),
)
NAMES = some.text(some.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
FIELDS = some.dictionaries(NAMES, some.binary(max_size=300), max_size=30)


@given(ROUTINGS, FIELDS)
def test_round_trip(routing: Routing, fields: dict[str, bytes]) -> None:
    """Decoding an envelope returns the same fields, byte for byte and in the same order."""
    read, raw = decode(encode(routing, fields))

    assert read == routing
    assert list(raw.items()) == [(name.encode(), value) for name, value in fields.items()]


@given(FIELDS, some.integers(0, 255).filter(lambda version: version != VERSION))
def test_other_versions(fields: dict[str, bytes], version: int) -> None:
    """An envelope of another version is refused."""
    envelope = bytes([version]) + encode(Routing(), fields)[1:]

    with pytest.raises(UnknownEnvelope):
        decode(envelope)


@given(some.data())
def test_cut_short(data: some.DataObject) -> None:
    """An envelope that is cut off inside a field is refused."""
    envelope = encode(Routing(), {"data": b"x" * 20})
    end = data.draw(some.integers(0, len(envelope) - 1).filter(lambda at: at != 7))

    with pytest.raises(UnknownEnvelope):
        decode(envelope[:end])


def test_a_plain_push_has_no_header() -> None:
    """Default routing needs no space: version, length, an empty object, then the fields."""
    assert encode(Routing(), {"a": b"b"}) == b"\x01\x00\x00\x00\x02{}\x00\x01a\x00\x00\x00\x01b"
