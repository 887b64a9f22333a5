"""Parsers of responses from instances: id rewriting and usage repair in chunks, prefill's response, figures, errors.

Holds: the filters' output does not depend on how the body was cut, and equals that of the whole body; the internal id
never comes out; what is held back is bounded; and reading an answer never raises.
"""

from __future__ import annotations

import json

from disagg_proxy.address import parse_address
from disagg_proxy.openai.fields import CHAT, MESSAGES, ROUTES, Route
from disagg_proxy.openai.prefill_answer import (
    Verdict,
    blames_client,
    error_message,
    prompt_tokens,
    read_prefill,
)
from disagg_proxy.openai.usage import CachedTokens, UsageRepair, cache_use, repair_usage
from disagg_proxy.request_id import RequestId, RequestIdRewriter, hide, new_request_id
from fuzz.source import Source

ID = RequestId("___prefill_addr_127.0.0.1:21001___decode_addr_127.0.0.1:22001_" + "5a" * 16, "b7" * 47)
"""One id for all executions, so that an input says everything; :func:`check_shape` keeps it like a real one."""

MOST_HELD = 1024
"""Bytes that the two filters may hold back together."""

_INTERNAL = ID.internal.encode()

WORDS = [
    _INTERNAL,
    *(_INTERNAL[:n] for n in (1, 3, 10, 17, 40, len(_INTERNAL) - 1)),
    b'"prompt_tokens_details"',
    b'"prompt_tokens_details":{"cached_tokens":',
    b'"prompt_tokens_details": {"audio_tokens": null, "cached_tokens": 12',
    b'{"input_tokens":1,"output_tokens":8,"cache_creation_input_tokens":0,"cache_read_input_tokens":748}',
    *(b'"cache_read_input_tokens":', b'"cache_creation_input_tokens":', b'"created_cache_tokens":'),
    *(b'"cached_tokens":', b'"prompt_tokens":', b'"input_tokens" : ', b"7}", b"{", b"}", b'"', b"\\", b":", b" " * 60),
    *(
        b'data: {"choices":[]}\n\n',
        b'data: {"error":{"code":',
        b'{"object":"error","code":',
        b'"type":"message"',
        b"[" * 80,
    ),
    *(b"data: [DONE]\n\n", b'{"type":"message_start"}', b"\r\n", b"9" * 90),
]

SEEDS = [
    b"\2\0" + b'{"id":"cmpl-' + _INTERNAL + b'-0","choices":[{"text":"x"}],"usage":{"prompt_tokens":5,'
    b'"prompt_tokens_details":{"cached_tokens":4}}}',
    b"\1\1"
    + b'data: {"id":"'
    + _INTERNAL
    + b'","choices":[{"text":"x"}]}\n\ndata: {"error":{"code":400}}\n\ndata: [DONE]\n\n',
    b"\0\2" + b'event: error\r\ndata: {"type":"error","error":{"message":"maximum context length"}}\r\n\r\n',
    b"\3\1" + b'{"object":"error","message":"x","code":500}',
    b"\0" * 24 + b'{"choices":[],"usage":{"prompt_tokens":5,"prompt_tokens_details":{"cached_tokens":4}}}',
    b"\2" * 24 + b'{"type":"message","usage":{"input_tokens":1,"output_tokens":8,"cache_creation_input_tokens":0,'
    b'"cache_read_input_tokens":748}}',
]


def check(data: bytes) -> str:
    """One execution: some bytes decide on the cuts, the rest is the body."""
    decisions = Source(data[:24])
    body = data[24:]
    cached = decisions.number(300)
    pieces, use = decisions.pieces(body), CachedTokens(cached, cached // 2 or None)
    for route in (CHAT, MESSAGES):
        check_pieces(route, pieces, body, use)
    assert repair_usage(CHAT, body, use) == _at_once(CHAT, body, use)
    return check_reading(decisions, body)


def _at_once(route: Route, body: bytes, use: CachedTokens) -> bytes:
    repair = UsageRepair(route, use)
    return repair.feed(body) + repair.end()


def check_pieces(route: Route, pieces: list[bytes], body: bytes, use: CachedTokens) -> None:
    """Relay's two filters, as it joins them."""
    assert b"".join(pieces) == body
    rewriter, repair = RequestIdRewriter(ID), UsageRepair(route, use)
    passed, fed = [], 0
    for piece in pieces:
        fed += len(piece)
        passed.append(repair.feed(rewriter.feed(piece)))
        assert sum(map(len, passed)) >= (fed - MOST_HELD) // 4, "too much is held back"
    passed.append(repair.feed(rewriter.end()) + repair.end())
    whole = _at_once(route, hide(ID, body), use)
    got = b"".join(passed)
    assert got == whole, f"in pieces {got!r}, whole {whole!r}"
    assert _INTERNAL not in got
    assert len(hide(ID, body)) == len(body)


def check_reading(decisions: Source, body: bytes) -> str:
    """Prefill's response for every route, complete and streamed."""
    route, streamed, choices = ROUTES[decisions.number(2)], bool(decisions.number(1)), decisions.number(2)
    found = read_prefill(route, body, streamed, choices)
    if found.verdict is Verdict.REFUSED:
        assert 400 <= found.status < 600 and "error" in json.loads(found.body)
    assert cache_use(route, body).cached >= 0 and prompt_tokens(body) >= 0
    assert isinstance(repair_usage(route, body, cache_use(route, body)), bytes)
    assert isinstance(error_message(body), str) and blames_client(body) in (True, False)
    return found.verdict.name.lower()


def check_shape() -> None:
    """Raises where :data:`ID` is no longer built like a real one."""
    real = new_request_id(parse_address("127.0.0.1:21001"), parse_address("127.0.0.1:22001"))
    assert real.internal[:-32] == ID.internal[:-32] and len(real.public) == len(real.internal) == len(ID.public)
