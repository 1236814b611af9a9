"""Calls of the operating system, where a library has put greenlets in their place."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from jobguard import native


def test_a_write_lets_no_other_greenlet_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who writes may hold a lock of the operating system, for which another greenlet would wait."""

    def green(*_: Any) -> int:
        raise AssertionError("eventlet would switch to another greenlet")

    raw = SimpleNamespace(write=os.write)
    reader, writer = os.pipe()
    patcher = SimpleNamespace(is_monkey_patched=lambda _: True, original=lambda _: raw)

    monkeypatch.setattr(os, "write", green)
    monkeypatch.setitem(sys.modules, "eventlet.patcher", patcher)
    try:
        assert native.write(writer, b"beat") == 4
        assert os.read(reader, 4) == b"beat"
    finally:
        os.close(reader)
        os.close(writer)
