"""Texts of strangers: ids, queues, tasks, workers and errors may contain anything."""

from __future__ import annotations

import re

HOSTILE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
"""Characters that move the cursor, change colours or the direction of a text, or cannot be encoded."""
_IN_LINES = re.compile(HOSTILE.pattern.replace("\x00-\x1f", "\x00-\x09\x0b-\x1f"))


def visible(text: object, *, lines: bool = False) -> str:
    """Return a text with every such character escaped; ``lines``: but for the ends of lines."""
    return (_IN_LINES if lines else HOSTILE).sub(_escape, str(text))


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
