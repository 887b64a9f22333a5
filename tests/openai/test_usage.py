"""Cached tokens are prefill's, not the KV that decode was handed."""

import pytest

from disagg_proxy.openai.fields import CHAT, MESSAGES, Route
from disagg_proxy.openai.prefill_answer import prompt_tokens
from disagg_proxy.openai.usage import CachedTokens, UsageRepair, cache_use, repair_usage

DECODE = b'{"usage":{"prompt_tokens":90,"prompt_tokens_details":{"cached_tokens":89},"x":1}}'


@pytest.mark.parametrize(
    ("route", "body", "use"),
    [
        (CHAT, b'{"usage":{"prompt_tokens_details": {"cached_tokens": 48}}}', CachedTokens(48)),
        (CHAT, b'{"prompt_tokens_details":{"cached_tokens":0,"created_cache_tokens":80}}', CachedTokens(0, 80)),
        (CHAT, b'{"usage":{"prompt_tokens_details":null}}', CachedTokens()),
        (CHAT, b"not json", CachedTokens()),
        (MESSAGES, b'{"usage":{"input_tokens":90,"output_tokens":1}}', CachedTokens()),
        (
            MESSAGES,
            b'{"usage":{"input_tokens":2,"output_tokens":1,"cache_creation_input_tokens":8,"cache_read_input_tokens":80}}',
            CachedTokens(80, 8),
        ),
    ],
)
def test_prefill_figures_are_found_or_zero(route: Route, body: bytes, use: CachedTokens) -> None:
    assert cache_use(route, body) == use


def test_other_details_stay() -> None:
    body = b'{"prompt_tokens_details":{"audio_tokens":3,"cached_tokens":7,"y":1}}'
    assert (
        repair_usage(CHAT, body, CachedTokens(5))
        == b'{"prompt_tokens_details":{"audio_tokens":3,"cached_tokens":5,"y":1}}'
    )


@pytest.mark.parametrize("body", [b'{"prompt_tokens_details":null}', b"{}", b""])
def test_nothing_to_repair(body: bytes) -> None:
    assert repair_usage(CHAT, body, CachedTokens(5)) == body


def test_text_that_looks_like_the_key_is_left_alone() -> None:
    body = rb'{"text":"\"prompt_tokens_details\":{\"cached_tokens\":1}"}'
    assert repair_usage(CHAT, body, CachedTokens(5)) == body


@pytest.mark.parametrize("cached", [0, 16, 123456])
def test_any_split_gives_the_same(cached: int) -> None:
    body = b'data: {"choices":[]}\n\ndata: ' + DECODE + b"\n\ndata: [DONE]\n\n"
    for first in range(len(body)):
        for second in (first + 1, first + 9, len(body)):
            repair = UsageRepair(CHAT, CachedTokens(cached))
            pieces = body[:first], body[first:second], body[second:]
            assert b"".join(map(repair.feed, pieces)) + repair.end() == repair_usage(CHAT, body, CachedTokens(cached))


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
        whole = repair_usage(CHAT, body, CachedTokens(77))
        for first in range(len(body)):
            repair = UsageRepair(CHAT, CachedTokens(77))
            assert repair.feed(body[:first]) + repair.feed(body[first:]) + repair.end() == whole
        repair = UsageRepair(CHAT, CachedTokens(77))
        assert b"".join(repair.feed(body[i : i + 1]) for i in range(len(body))) + repair.end() == whole


def test_an_ordinary_event_is_not_held_back() -> None:
    event = b'data: {"choices":[{"text":"a","finish_reason":null}]}\n\n'
    assert UsageRepair(CHAT, CachedTokens(1)).feed(event) == event


def test_a_key_without_an_end_is_not_held_for_ever() -> None:
    repair = UsageRepair(CHAT, CachedTokens(1))
    endless = b'"prompt_tokens_details":[' + b"1," * 200
    assert repair.feed(endless) + repair.end() == endless


def anthropic(rest: int, read: int | None = None, created: int | None = None) -> bytes:
    usage = b'"usage":{"input_tokens":%d,"output_tokens":8' % rest
    if created is not None:
        usage += b',"cache_creation_input_tokens":%d' % created
    return usage + (b"}" if read is None else b',"cache_read_input_tokens":%d}' % read)


@pytest.mark.parametrize(
    ("decode", "prefill", "right"),
    [
        (anthropic(1, 748, 0), CachedTokens(0, 736), anthropic(13, 0, 736)),
        (anthropic(1, 748, 0), CachedTokens(736, 0), anthropic(13, 736, 0)),
        (anthropic(1, 748), CachedTokens(0), anthropic(749, 0)),
        (anthropic(1, 748), CachedTokens(16, 736), anthropic(733, 16)),
        (anthropic(1, 748, 0), CachedTokens(0), anthropic(749, 0, 0)),
        # Up to 0.23, and without the details.
        (anthropic(749), CachedTokens(16), anthropic(749)),
        # More than there is of the prompt.
        (anthropic(1, 748, 0), CachedTokens(700, 736), anthropic(0, 700, 736)),
    ],
)
def test_the_prompt_of_messages_is_split_as_prefill_split_it(
    decode: bytes, prefill: CachedTokens, right: bytes
) -> None:
    whole = b'{"content":[{"type":"text","text":"a"}],' + decode + b"}"
    assert repair_usage(MESSAGES, whole, prefill) == b'{"content":[{"type":"text","text":"a"}],' + right + b"}"
    start = b'event: message_start\ndata: {"type":"message_start","message":{' + anthropic(749) + b"}}\n\n"
    stream = start + b'event: message_delta\ndata: {"type":"message_delta",%b}\n\n'
    body = stream % decode
    for first in range(len(body)):
        for second in (first + 1, first + 9, len(body)):
            repair = UsageRepair(MESSAGES, prefill)
            pieces = body[:first], body[first:second], body[second:]
            assert b"".join(map(repair.feed, pieces)) + repair.end() == stream % right


def test_created_tokens_of_chat_are_prefills_too() -> None:
    body = b'{"prompt_tokens_details":{"cached_tokens":%d,"created_cache_tokens":%d,"multimodal_tokens":{"image":64}}}'
    assert repair_usage(CHAT, body % (89, 0), CachedTokens(16, 64)) == body % (16, 64)
    assert repair_usage(CHAT, body % (89, 0), CachedTokens(16)) == body % (16, 0)


def test_arguments_of_a_tool_call_are_not_changed() -> None:
    """In a complete answer to /v1/messages they are JSON, which the model may fill with anything."""
    call = b'{"content":[{"type":"tool_use","input":{"input_tokens":1,"cache_read_input_tokens":9}}],'
    body = call + anthropic(1, 748) + b"}"
    assert repair_usage(MESSAGES, body, CachedTokens(0)) == call + anthropic(749, 0) + b"}"


@pytest.mark.parametrize("usage", [anthropic(749), anthropic(1, 748), anthropic(13, 0, 736), anthropic(1, 700, 48)])
def test_cached_tokens_belong_to_the_prompt(usage: bytes) -> None:
    assert prompt_tokens(b"{" + usage + b"}") == 749
    assert prompt_tokens(b'data: {"message":{' + anthropic(0) + b"}}\n\ndata: {" + usage + b"}\n\n") == 749
