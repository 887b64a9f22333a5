"""When a 200 of prefill means that the KV is on its way, and when not."""

from __future__ import annotations

import json

import pytest

from disagg_proxy.openai.fields import CHAT, COMPLETIONS, MESSAGES
from disagg_proxy.openai.prefill_answer import Verdict, blames_client, error_message, prompt_tokens, read_prefill

CHOICES = b'{"id":"cmpl-1","choices":[{"text":"a"}]}'
MESSAGE = b'{"type":"message","content":[]}'
ERROR = b'{"error":{"message":"No","type":"T","param":"p","code":422}}'
FLAT = b'{"object":"error","message":"No","type":"T","param":null,"code":400}'


@pytest.mark.parametrize(
    ("route", "body", "verdict"),
    [
        (COMPLETIONS, CHOICES, Verdict.DONE),
        (CHAT, CHOICES, Verdict.DONE),
        (MESSAGES, MESSAGE, Verdict.DONE),
        (MESSAGES, CHOICES, Verdict.UNKNOWN),
        (CHAT, MESSAGE, Verdict.UNKNOWN),
        (COMPLETIONS, ERROR, Verdict.REFUSED),
        (COMPLETIONS, FLAT, Verdict.REFUSED),
        (MESSAGES, b'{"type":"error","error":{"type":"x","message":"No"}}', Verdict.REFUSED),
        (COMPLETIONS, b"", Verdict.UNKNOWN),
        (COMPLETIONS, b"<html>", Verdict.UNKNOWN),
        (COMPLETIONS, b"[]", Verdict.UNKNOWN),
        (COMPLETIONS, b'{"choices":null}', Verdict.UNKNOWN),
        (COMPLETIONS, b'{"choices":[],"error":null}', Verdict.DONE),
        (COMPLETIONS, b"[" * 100_000, Verdict.UNKNOWN),
        (COMPLETIONS, b"\xff", Verdict.UNKNOWN),
    ],
)
def test_a_whole_answer(route, body, verdict) -> None:
    assert read_prefill(route, body, streamed=False, choices=1).verdict is verdict


def stream(*events: bytes) -> bytes:
    return b"".join(b"data: " + event + b"\n\n" for event in events)


@pytest.mark.parametrize(
    ("route", "body", "choices", "verdict"),
    [
        (CHAT, stream(CHOICES, b"[DONE]"), 1, Verdict.DONE),
        (CHAT, stream(CHOICES, CHOICES), 3, Verdict.DONE),
        (CHAT, b": ping\r\n\r\n" + stream(CHOICES).replace(b"\n", b"\r\n"), 1, Verdict.DONE),
        (CHAT, stream(ERROR, b"[DONE]"), 1, Verdict.REFUSED),
        (CHAT, stream(ERROR, CHOICES), 1, Verdict.REFUSED),
        (CHAT, stream(CHOICES, ERROR, b"[DONE]"), 1, Verdict.DONE),
        (CHAT, stream(CHOICES, ERROR, b"[DONE]"), 2, Verdict.UNKNOWN),
        (CHAT, stream(b"[DONE]"), 1, Verdict.UNKNOWN),
        (CHAT, b"", 1, Verdict.UNKNOWN),
        (MESSAGES, b"event: message_start\n" + stream(b'{"type":"message_start"}'), 1, Verdict.DONE),
        (MESSAGES, b"event: error\n" + stream(b'{"type":"error","error":{"message":"No"}}'), 1, Verdict.REFUSED),
        (MESSAGES, stream(b'{"type":"message_stop"}'), 1, Verdict.UNKNOWN),
    ],
)
def test_a_streamed_answer(route, body, choices, verdict) -> None:
    assert read_prefill(route, body, streamed=True, choices=choices).verdict is verdict


@pytest.mark.parametrize(
    ("code", "status"), [(422, 422), (503, 503), (None, 400), ("400", 400), (200, 400), (600, 400), (True, 400)]
)
def test_a_refusal_has_the_status_of_its_code(code, status) -> None:
    body = json.dumps({"error": {"message": "No", "code": code}}).encode()
    found = read_prefill(CHAT, body, streamed=False, choices=1)
    assert (found.verdict, found.status) == (Verdict.REFUSED, status)
    assert json.loads(found.body) == {"type": "error", "error": {"message": "No", "code": code}}


def test_a_flat_refusal_of_vllm_0_9_gets_todays_shape() -> None:
    found = read_prefill(COMPLETIONS, FLAT, streamed=False, choices=1)
    assert json.loads(found.body)["error"]["message"] == "No"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (ERROR, "No"),
        (FLAT, "No"),
        (b"Internal Server Error", ""),
        (b'{"error":"Unauthorized"}', ""),
        (b'{"error":{}}', ""),
    ],
)
def test_the_message_of_an_error_of_any_version(body, message) -> None:
    assert error_message(body) == message


MESSAGE_OF_CONTEXT = "This model's maximum context length is 64 tokens. However, you requested 70 output tokens."


@pytest.mark.parametrize(
    ("body", "blamed"),
    [
        ({"type": "error", "error": {"type": "internal_error", "message": MESSAGE_OF_CONTEXT}}, True),
        ({"object": "error", "message": MESSAGE_OF_CONTEXT}, True),
        ({"type": "error", "error": {"type": "internal_error", "message": "Expecting value"}}, False),
        ({"error": {"message": "At most 0 image(s) may be provided in one prompt."}}, True),
        ({"error": {"message": "At most 1 audio(s) may be provided in one request."}}, True),
        ({"choices": [{"text": MESSAGE_OF_CONTEXT}]}, False),
        ([], False),
    ],
)
def test_a_clients_mistake_is_known_by_vllms_message(body, blamed) -> None:
    assert blames_client(json.dumps(body).encode()) is blamed


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        (b'{"content":[],"usage":{"input_tokens":40,"output_tokens":1}}', 40),
        (stream(b'{"usage":{"input_tokens":0}}', b'{"usage": {"input_tokens" : 1234}}'), 1234),
        (rb'{"content":[{"text":"\"input_tokens\":9"}],"usage":{"input_tokens":40}}', 40),
        (b'{"prompt_tokens":' + b"9" * 5000 + b"}", 0),
        (b'{"usage":{"prompt_tokens":40,"prompt_tokens_details":{"cached_tokens":50}}}', 40),
        (b"", 0),
    ],
)
def test_the_length_of_the_prompt_in_an_answer(body, tokens) -> None:
    assert prompt_tokens(body) == tokens
