from __future__ import annotations

from jobguard.model import new_token, token_at


def test_tokens_sort_in_the_order_in_which_they_are_made() -> None:
    """Restores are made in the order of the tokens."""
    tokens = [new_token() for _ in range(10_000)]
    assert tokens == sorted(tokens)
    assert {token.version for token in tokens} == {7}


def test_a_token_sorts_after_the_token_it_comes_from() -> None:
    """This holds also if the other machine's clock is a day ahead, and for all later tokens."""
    ahead = token_at(new_token().int / (1 << 80) / 1000 + 86400)
    first = new_token(after=ahead)
    second = new_token()
    assert ahead < first < second
    assert second.version == 7
