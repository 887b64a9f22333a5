"""Cached tokens are prefill's, not the KV that decode was handed."""

import pytest

from disagg_proxy.protocol.usage import UsageRepair, cached_tokens, repair_usage

DECODE = b'{"usage":{"prompt_tokens":90,"prompt_tokens_details":{"cached_tokens":89},"x":1}}'


def test_prefill_figure_is_found_or_zero() -> None:
    assert cached_tokens(b'{"usage":{"prompt_tokens_details": {"cached_tokens": 48}}}') == 48
    assert cached_tokens(b'{"usage":{"prompt_tokens_details":null}}') == 0
    assert cached_tokens(b"not json") == 0


def test_other_details_stay() -> None:
    body = b'{"prompt_tokens_details":{"audio_tokens":3,"cached_tokens":7,"y":1}}'
    assert repair_usage(body, 5) == b'{"prompt_tokens_details":{"audio_tokens":3,"cached_tokens":5,"y":1}}'


@pytest.mark.parametrize("body", [b'{"prompt_tokens_details":null}', b"{}", b""])
def test_nothing_to_repair(body: bytes) -> None:
    assert repair_usage(body, 5) == body


def test_text_that_looks_like_the_key_is_left_alone() -> None:
    body = rb'{"text":"\"prompt_tokens_details\":{\"cached_tokens\":1}"}'
    assert repair_usage(body, 5) == body


@pytest.mark.parametrize("cached", [0, 16, 123456])
def test_any_split_gives_the_same(cached: int) -> None:
    body = b'data: {"choices":[]}\n\ndata: ' + DECODE + b"\n\ndata: [DONE]\n\n"
    for first in range(len(body)):
        for second in (first + 1, first + 9, len(body)):
            repair = UsageRepair(cached)
            pieces = body[:first], body[first:second], body[second:]
            assert b"".join(map(repair.feed, pieces)) + repair.end() == repair_usage(body, cached)


ODD = [
    rb'"\"prompt_tokens_details":{"cached_tokens":5}',
    b'"prompt_tokens_details":{"prompt_tokens_details":1,"cached_tokens":5}',
    b'"prompt_tokens_details":{"a":{"prompt_tokens_details":{"cached_tokens":5}}}',
    b'"prompt_tokens_details":{"cached_tokens":5' + b" " * 300 + b"}",
    b'"prompt_tokens_details":{' + b" " * 210 + b'"cached_tokens":55}',
    b'"prompt_tokens_details":{"cached_tokens":' + b"5" * 5000 + b"}",
    b'"prompt_tokens_details":{"cached_tokens":5',
]


@pytest.mark.parametrize("odd", ODD)
def test_any_split_of_what_no_engine_sends_gives_the_same(odd: bytes) -> None:
    for body in (odd, odd + DECODE):
        whole = repair_usage(body, 77)
        for first in range(len(body)):
            repair = UsageRepair(77)
            assert repair.feed(body[:first]) + repair.feed(body[first:]) + repair.end() == whole
        repair = UsageRepair(77)
        assert b"".join(repair.feed(body[i : i + 1]) for i in range(len(body))) + repair.end() == whole


def test_an_ordinary_event_is_not_held_back() -> None:
    event = b'data: {"choices":[{"text":"a","finish_reason":null}]}\n\n'
    assert UsageRepair(1).feed(event) == event


def test_a_key_without_an_end_is_not_held_for_ever() -> None:
    repair = UsageRepair(1)
    endless = b'"prompt_tokens_details":[' + b"1," * 200
    assert repair.feed(endless) + repair.end() == endless
