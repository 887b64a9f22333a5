"""Prompt sizes without a tokenizer."""

import pytest

from disagg_proxy.admission.size import TokenGuess
from disagg_proxy.protocol.size import prompt_size


@pytest.mark.parametrize(
    ("body", "size"),
    [
        ({"prompt": "abcd"}, (0, 4)),
        ({"prompt": "é漢"}, (0, 5)),
        ({"prompt": "\ud800"}, (0, 3)),
        ({"prompt": [1, 2, 3]}, (3, 0)),
        ({"prompt": [[1, 2], [3]]}, (3, 0)),
        ({"prompt": ["ab", "c"]}, (0, 3)),
        ({"prompt": [1, 2, 3], "n": 4}, (12, 0)),
        ({"prompt": "ab", "n": "4"}, (0, 8)),
        ({"prompt": "ab", "n": "many"}, (0, 2)),
        ({"messages": [{"role": "user", "content": "hi"}]}, (0, 6)),
        ({"messages": [{"content": [{"type": "image_url", "image_url": {"url": "data:" + "x" * 999}}]}]}, (0, 9)),
        ({}, (0, 0)),
        ({"prompt": None, "messages": 5}, (0, 0)),
    ],
)
def test_what_counts(body: dict, size: tuple[int, int]) -> None:
    assert prompt_size(body) == size


def test_text_is_four_bytes_a_token_until_an_answer_teaches_better() -> None:
    guess = TokenGuess()
    assert guess.tokens("m", 10, 400) == 110
    guess.learn("m", 300, 150)
    assert guess.tokens("m", 0, 400) == 200
    assert guess.tokens("other", 0, 400) == 100


def test_the_guess_follows_and_odd_counts_teach_nothing() -> None:
    guess = TokenGuess()
    for _ in range(100):
        guess.learn(None, 500, 100)
    for text, tokens in ((0, 10), (10, 0), (-1, 1)):
        guess.learn(None, text, tokens)
    assert guess.tokens(None, 0, 1000) == 200


def test_names_made_up_by_clients_do_not_fill_memory() -> None:
    guess = TokenGuess()
    for i in range(1000):
        guess.learn(f"m{i}", 100, 50)
    assert len(guess._ratios) == 256
