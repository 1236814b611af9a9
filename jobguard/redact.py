"""Mask secrets in a text before it is stored or shown.

Error texts contain arguments, URLs and headers, and Postgres copies them to backups and replicas. This is
no guarantee: a secret that looks like an ordinary word is not masked.
"""

from __future__ import annotations

import re

LIMIT = 5_000
"""The number of characters that are kept of one text."""
HEAD = 1_800
"""The number of these that are kept from the beginning; the end of a traceback is more useful."""
MASK = "***"

# Longer texts are cut to this before the search, so that the time is bounded.
_WINDOW = 100_000

# Every repetition below is bounded, most are possessive (…}+), and no text can match a repetition in two
# ways. So the time grows only with the length of the text, for any text.
_SECRET = (
    r"(?:passw(?:or)?d|passphrase|passwd|pwd|secret|token(?!s)|api[_-]?key|access[_-]?key|"
    r"private[_-]?key|credentials?|signature|client[_-]?secret)"
)
_IS = r"\\?[\"']?\s{0,3}(?:=>|[=:])\s{0,3}"
_VALUE = (
    r"(?:[bru]{0,2}(?:\\\"[^\"]{0,4096}+\"?"  # \"…\": JSON within a string
    r"|\"(?:[^\"\\]|\\.){0,4096}+\"?"
    r"|'(?:[^'\\]|\\.){0,4096}+'?)"
    r"|[^\s&;\"')\]}]{1,4096}+)"
)

_RULES: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(
            r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----(?:[^-]|-(?!----)){0,16384}+"
            r"(?:-----END [A-Z ]{0,40}PRIVATE KEY-----)?"
        ),
        MASK,
    ),
    # Up to the last @ of the word: the password may hold an @ or a / that is not encoded.
    (re.compile(r"(://[^\s/:@\"']{0,128}:)[^\s\"'<>]{0,512}@"), rf"\1{MASK}@"),
    # Errors of urllib and kombu about a URL that they cut inside a password.
    (
        re.compile(
            r"(cast to integer value as |Database is int between 0 and limit - 1, not )[^\r\n]{1,4096}+"
        ),
        rf"\1{MASK} (in a password write / as %2F, @ as %40, # as %23 and ? as %3F)",
    ),
    (
        re.compile(
            rf"(?i)\b((?:proxy-)?authorization|(?:set-)?cookie)({_IS})[\"']?[^\r\n\"']{{1,4096}}+"
        ),
        rf"\1\2{MASK}",
    ),
    (re.compile(r"(?i)\b(bearer\s{1,3})[\w.~+/=-]{6,4096}+"), rf"\1{MASK}"),
    (re.compile(rf"(?is)({_SECRET}[\w-]{{0,40}}+{_IS}){_VALUE}"), rf"\1{MASK}"),
    (
        re.compile(rf"(?i)((?<![\w-])--[\w-]{{0,20}}?{_SECRET}[\w-]{{0,20}}+\s)\S{{1,4096}}+"),
        rf"\1{MASK}",
    ),
    # Tokens that are known by their form: AWS, GitHub, GitLab, Slack, Stripe, …, JWT.
    (re.compile(r"(?<![A-Z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])"), MASK),
    (
        re.compile(
            r"(?<![\w-])(?:gh[pousr]_|github_pat_|glpat-|xox[abeprs]-|[rs]k_(?:live|test)_|sk-|AIza)"
            r"[\w-]{16,512}+"
        ),
        MASK,
    ),
    (re.compile(r"(?<![\w-])eyJ[\w-]{8,4096}+\.[\w-]{8,8192}+(?:\.[\w-]{0,4096}+)?"), MASK),
)


def redact(text: str) -> str:
    """Return at most 5,000 characters that Postgres accepts, with probable secrets masked."""
    length = len(text)
    if length > 2 * _WINDOW:
        # Mask the two windows separately: joining the two sides of a cut could make or hide a secret.
        head, tail = _masked(text[:_WINDOW]), _masked(text[-_WINDOW:])
        return _cut(head, tail, length - 2 * _WINDOW)
    text = _masked(text)
    return text if len(text) <= LIMIT else _cut(text, text, 0)


def _masked(text: str) -> str:
    # Postgres accepts neither NUL nor half of a surrogate pair.
    text = text.replace("\x00", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text


def _cut(head: str, tail: str, between: int) -> str:
    whole = len(head) if head is tail else len(head) + between + len(tail)
    note = f"\n… {whole - LIMIT:,} characters cut …\n"
    kept = LIMIT - HEAD - len(note)
    note = f"\n… {whole - HEAD - kept:,} characters cut …\n"
    return head[:HEAD] + note + tail[-(LIMIT - HEAD - len(note)) :]
