"""The bytes of an entry in the stream."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from jobguard.host.spool import Adoptable, Cancelled, Entry, JoinOpened, Released, Unsent
from jobguard.host.stream_entries import UnknownEntry, decode, encode
from jobguard.model import Delivery, End, Outcome, Parent, Part, new_token
from tests.fakes.world import delivery, request

PARENT = Parent(new_token(), 2, Outcome.COMPLETED, new_token(), "Error: it failed")
FULL: dict[str, Any] = {
    "priority": -3,
    "attempt": 4,
    "due_at": 1.5,
    "expires_at": 2.5,
    "key": "k",
    "trace": "t",
    "derived": True,
    "closes": "join",
}
ENTRIES: dict[str, Entry] = {
    "a plain record": delivery(),
    "a full record": delivery("jöb \ud800", envelope=bytes(range(256)), parent=PARENT, **FULL),
    "a record whose parent has no claim": delivery(parent=Parent(new_token())),
    "an end": End(new_token(), 1, Outcome.FAILED, new_token(), "job", "mail", "send", 1.5, "boom"),
    "a part": End(new_token(), 0, Outcome.COMPLETED, new_token(), part=Part("join", b"\x00\xff")),
    "an open join": JoinOpened("join", 3, b"state"),
    "a closed join": JoinOpened("join", 0, closed=True),
    "a reference": Adoptable(new_token(), "job", "mail"),
    "a claim": request(new_token(), new_token()),
    "unsent deliveries": Unsent([new_token(), new_token()]),
    "a release": Released(new_token(), new_token(), 2),
    "a release of an interrupted run": Released(new_token(), new_token(), 2, interrupted=True),
}


@pytest.mark.parametrize("what", ENTRIES)
def test_an_entry_is_read_as_it_was_written(what: str) -> None:
    """Every field of every kind of entry comes back."""
    assert decode(encode(ENTRIES[what])) == ENTRIES[what]


def test_a_cancel_keeps_what_it_means() -> None:
    """A cancel keeps its tokens, ids, queue and the last token that it means."""
    made = Cancelled([new_token()], ["a", "b"], "mail", [new_token()])
    read = decode(encode(made))
    assert isinstance(read, Cancelled)
    assert (read.tokens, read.job_ids, read.queue, read.until) == (
        made.tokens,
        made.job_ids,
        made.queue,
        made.until,
    )


@pytest.mark.parametrize("raw", [b"", b"\x02", b"\x01\x00", encode(delivery())[:20], b"\x01" * 60])
def test_bytes_of_another_version_are_an_error(raw: bytes) -> None:
    """What cannot be read is one kind of error, whatever is wrong with it."""
    with pytest.raises(UnknownEntry):
        decode(raw)


def test_a_kind_of_a_later_version_is_an_error() -> None:
    """A kind or a field that this version does not know is not dropped."""
    raw = encode(replace(delivery(), envelope=b""))
    assert isinstance(decode(raw), Delivery)
    with pytest.raises(UnknownEntry):
        decode(raw.replace(b'"kind":"record"', b'"kind":"wecord"'))
    with pytest.raises(UnknownEntry):
        decode(raw.replace(b'"task":', b'"tosk":'))
