from __future__ import annotations

import json
import pickle
from uuid import UUID, uuid4

import pytest

from jobguard.adapters.dramatiq.envelope import VERSION, Envelope, UnknownEnvelope, decode
from jobguard.adapters.dramatiq.layout import (
    Layout,
    canonical,
    is_short_lived,
    is_stranger,
    name_of,
    new_short_lived,
    new_worker,
    token_of,
    worker_of,
)
from jobguard.adapters.dramatiq.run import derive
from jobguard.model import new_token, token_at


@pytest.mark.parametrize("data", [b"", b"{}", bytes(range(256)) * 300])
@pytest.mark.parametrize("queue", ["mail", "mail.DQ", "späte.DQ"])
def test_it_comes_back_as_it_was(queue: str, data: bytes) -> None:
    """Encoding and decoding keep any bytes unchanged."""
    envelope = Envelope(new_token(), queue, data)
    assert decode(envelope.encode()) == envelope
    assert envelope.data_for(envelope.rid) is data


@pytest.mark.parametrize("encode", [lambda m: json.dumps(m).encode(), pickle.dumps])
def test_it_goes_back_under_another_id(encode: object) -> None:
    """The id in the message is replaced, whichever encoder wrote it."""
    rid, other = new_token(), new_token()
    data = encode({"options": {"redis_message_id": str(rid)}})  # type: ignore[operator]
    expected = encode({"options": {"redis_message_id": str(other)}})  # type: ignore[operator]
    assert Envelope(rid, "mail", data).data_for(other) == expected


def test_an_id_that_the_encoder_hid_cannot_be_changed() -> None:
    """If the encoder hides the id, it cannot be changed: a worker would acknowledge another message."""
    with pytest.raises(UnknownEnvelope):
        Envelope(new_token(), "mail", b"encrypted").data_for(new_token())


def test_what_a_person_requeues_has_all_its_retries() -> None:
    """A requeued message is a new delivery of the same message, with all its retries."""
    rid, fresh = new_token(), new_token()
    options = {"redis_message_id": str(rid), "max_retries": 3}
    spent = {**options, "retries": 3, "traceback": "…", "requeue_timestamp": 1}
    data = json.dumps({"args": [1.5, "ä"], "options": spent}).encode()
    again = Envelope(rid, "mail", data).renewed(fresh)
    assert (again.rid, again.queue) == (fresh, "mail")
    expected = {**options, "redis_message_id": str(fresh)}
    assert json.loads(again.data) == {"args": [1.5, "ä"], "options": expected}
    assert again.data_for(fresh) == again.data


def test_what_no_json_says_keeps_its_retries() -> None:
    """In a message that is not JSON, only the id is changed."""
    rid, fresh = new_token(), new_token()
    data = pickle.dumps({"options": {"redis_message_id": str(rid), "retries": 3}})
    again = Envelope(rid, "mail", data).renewed(fresh)
    assert pickle.loads(again.data)["options"] == {"redis_message_id": str(fresh), "retries": 3}
    with pytest.raises(ValueError, match="encoder hides the id"):
        Envelope(rid, "mail", b"encrypted").renewed(fresh)


def test_what_is_damaged_or_of_another_version_is_named() -> None:
    """A damaged envelope, or one of another version, raises UnknownEnvelope."""
    good = Envelope(new_token(), "mail", b"data").encode()
    for bad in (b"", bytes([VERSION + 1]) + good[1:], good[:10], good[:20]):
        with pytest.raises(UnknownEnvelope):
            decode(bad)


@pytest.mark.parametrize("namespace", ["dramatiq", "other", "{a}", ""])
def test_a_prefix_names_its_layout(namespace: str) -> None:
    """A prefix is parsed back to its layout, whose keys are those of dispatch.lua."""
    layout = Layout.parse(Layout(namespace).prefix)
    assert layout == Layout(namespace)
    assert layout.key("mail.msgs") == f"{namespace}:mail.msgs"
    assert layout.acks("w", "mail.DQ") == f"{namespace}:__acks__.w.mail.DQ"


def test_a_list_belongs_to_a_queue() -> None:
    """The name of a list without its ending is the name of its queue."""
    assert [canonical(name) for name in ("m", "m.DQ", "m.XQ", "m.DQx")] == ["m", "m", "m", "m.DQx"]


def test_ids_tell_whose_they_are() -> None:
    """An id shows if it belongs to a guarded worker, a guarded producer, or an unguarded process."""
    worker, producer, stranger = str(new_worker()), str(new_short_lived()), str(uuid4())
    assert [is_stranger(each) for each in (worker, producer, stranger, "x")] == [
        False,
        False,
        True,
        True,
    ]
    assert [is_short_lived(each) for each in (worker, producer, stranger, "x")] == [
        False,
        True,
        False,
        False,
    ]
    assert name_of(worker) == UUID(worker).hex
    assert [name_of(each) for each in (producer, stranger, "x")] == [producer, stranger, "x"]
    assert [worker_of(name_of(each)) for each in (worker, stranger, "x")] == [worker, stranger, "x"]


@pytest.mark.parametrize(
    "rid", [None, 7, "", "x", "ab" * 16, "AA436043-9075-49DF-8E86-4EE5DECA30E0"]
)
def test_an_id_in_another_writing_is_no_token(rid: object) -> None:
    """An id in another spelling is no token, because it could not be found again by it."""
    assert token_of(rid) is None


def test_what_comes_of_an_unguarded_producers_message_sorts_by_its_age() -> None:
    """A token derived from a random id sorts by the age of the message."""
    parent = UUID("ffffffff-ffff-4fff-bfff-ffffffffffff")
    derived = derive(parent, "j", 0, sent_at=1_700_000_000.0)
    assert token_at(1_700_000_000.0) < derived < token_at(1_700_000_001.0)
    assert derived == derive(parent, "j", 0, sent_at=1_700_000_000.0)
    assert derived != derive(parent, "j", 1, sent_at=1_700_000_000.0)
