"""Names of keys, and the options in a source's prefix."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu.transport.redis import Channel

from jobguard.adapters.celery.layout import Layout


def test_defaults_are_kombus() -> None:
    """An option that a prefix does not name has kombu's default."""
    usual = Layout()
    assert str(usual) == "" and Layout.parse("") == usual
    assert usual.sep == Channel.sep
    assert list(usual.priority_steps) == Channel.priority_steps
    assert usual.unacked_key == Channel.unacked_key
    assert usual.unacked_index_key == Channel.unacked_index_key
    assert usual.fanout_prefix == Channel.keyprefix_fanout


@given(
    st.builds(
        Layout,
        global_keyprefix=st.text(),
        sep=st.text(min_size=1),
        priority_steps=st.lists(st.integers(0, 9), min_size=1).map(lambda s: tuple(sorted(s))),
        unacked_key=st.text(),
    )
)
def test_round_trip(layout: Layout) -> None:
    """Every layout can be written as a prefix and read again."""
    assert Layout.parse(str(layout)) == layout


def test_a_newer_word_is_passed_over() -> None:
    """An option of a later jobguard does not keep this one from reading the rest."""
    assert Layout.parse("global_keyprefix=a&colour=red") == Layout(global_keyprefix="a")


@pytest.mark.parametrize(("step", "key"), [(0, "p:q"), (3, "p:q\x06\x163")])
def test_lists(step: int, key: str) -> None:
    """The first list of a queue has no suffix."""
    assert Layout(global_keyprefix="p:").list_of("q", step) == key


def test_all_lists_of_a_queue() -> None:
    """A queue has one list for every step."""
    assert Layout(priority_steps=(0, 5)).lists_of(["a", "b"]) == [
        *("a", "a\x06\x165", "b", "b\x06\x165")
    ]
