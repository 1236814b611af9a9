from __future__ import annotations

import time

import pytest

from jobguard.redact import LIMIT, redact


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://ann:S3CRET@db:5432/shop",
        "postgresql://ann:p@S3CRET@db:5432/shop",
        "redis://:S3CRET@cache/0",
        "redis://:p/S3CRET@cache/0",
        "redis://:p@x/S3CRET?y#z@cache/0",
        "postgres://u:p?S3CRET#x@db/d",
        "sentinel://:p/S3CRET@a:1;sentinel://:p/S3CRET@b:2/main",
        "host=db password=S3CRET dbname=shop",
        "host=db password='it is S3CRET' dbname=shop",
        "connect(password='S3CRET', host='db')",
        '{"password": "S3CRET", "user": "ann"}',
        '{"password": "with \\" S3CRET", "user": "ann"}',
        "{'api_key': b'S3CRET'}",
        r'"{\"access_token\": \"S3CRET x\"}"',
        "DB_PASSWORD=S3CRET",
        "aws_secret_access_key = S3CRET",
        "client-secret: S3CRET",
        "Authorization: Bearer S3CRETS3CRET",
        "Authorization: Basic S3CRET=",
        "curl -H 'Authorization: token S3CRET' https://api",
        "got 401 for bearer S3CRETS3CRET",
        "Set-Cookie: session=S3CRET; Path=/",
        "tool --db-password S3CRET --verbose",
        "tool --token=S3CRET",
        "https://bucket/key?X-Amz-Signature=S3CRET&x=1",
        "https://api/?access_token=S3CRET",
        "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,X\n\nS3CRET\n-----END RSA PRIVATE KEY-----",
        "-----BEGIN PRIVATE KEY-----\nS3CRET cut off",
    ],
)
def test_a_secret_is_masked_and_its_surroundings_are_kept(text: str) -> None:
    """Passwords, tokens, keys, and credentials in URLs and headers are masked."""
    reported = redact(text)
    assert "S3CRET" not in reported
    assert "***" in reported


@pytest.mark.parametrize(
    "token",
    [
        "AKIAIOSFODNN7EXAMPLE",
        "ghp_0123456789abcdefghijABCDEFGHIJ",
        "sk_live_0123456789abcdefghij",
        "xoxb-0123456789-abcdefghij",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.SflKxwRJSMeKKF2QT4",
    ],
)
def test_a_token_with_a_known_form_is_masked_anywhere(token: str) -> None:
    """Keys of AWS, GitHub, Stripe and Slack, and JWTs are recognised by their form."""
    assert redact(f"refused ({token}) by the server") == "refused (***) by the server"


@pytest.mark.parametrize(
    "text",
    [
        "ValueError: invalid literal for int() with base 10: 'abc'",
        'File "/app/tasks.py", line 12, in send',
        "redis://cache:6379/0 refused the connection",
        "max_tokens=4096 job 018f4e6a-7d1c-7aaa-8000-0123456789ab",
        "https://example.com/a:b@c",
        "smörgåsbord 🍣",
    ],
)
def test_a_text_without_secrets_is_left_as_it_is(text: str) -> None:
    """Text that helps to find the error is kept."""
    assert redact(text) == text


def test_a_long_text_keeps_its_head_and_its_tail() -> None:
    """At most 5,000 characters are kept, and a note has the number of the others."""
    text = "HEAD" + "x" * 20_000 + "TAIL"
    reported = redact(text)
    assert len(reported) == LIMIT
    assert reported.startswith("HEADx")
    assert reported.endswith("xTAIL")
    note = reported.split("…")[1]
    kept = LIMIT - len(f"\n…{note}…\n")
    assert note == f" {len(text) - kept:,} characters cut "


def test_a_text_of_exactly_the_limit_is_kept_whole() -> None:
    """The limit is inclusive."""
    assert redact("x" * LIMIT) == "x" * LIMIT


def test_a_secret_is_masked_before_the_text_is_cut() -> None:
    """A cut through the middle of a secret leaves no part of the secret."""
    for at in range(1_700, 1_900, 20):
        assert "S3CRET" not in redact("x" * at + " password=" + "S3CRET" * 20 + " y" * 5_000)


def test_characters_that_postgres_refuses_are_replaced() -> None:
    """NUL bytes and halves of surrogate pairs are replaced, so that Postgres accepts the row."""
    reported = redact("a\x00b\ud800c")
    assert reported == "a\N{REPLACEMENT CHARACTER}b?c"
    reported.encode()


@pytest.mark.parametrize(
    "unit",
    [
        "x",
        " ",
        "-",
        "password",
        "password=",
        "password='\"",
        'password="\\',
        "://",
        "://a:",
        "eyJ",
        "--a",
        "authorization:",
        "-----BEGIN PRIVATE KEY-----",
        '  File "/app/tasks.py", line 12, in send\n',
    ],
)
def test_a_megabyte_of_anything_is_done_in_a_moment(unit: str) -> None:
    """No text, however hostile, makes a worker wait."""
    text = unit * (1_000_000 // len(unit))
    started = time.process_time()
    assert len(redact(text)) <= LIMIT
    assert time.process_time() - started < 2.0
