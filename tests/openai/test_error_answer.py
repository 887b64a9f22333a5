"""Errors in answers whose status is 200."""

import json

import pytest

from disagg_proxy.errors import EngineFailed
from disagg_proxy.openai.error_answer import ErrorAnswer, begins_with_error, error_event, error_in, stream_error
from disagg_proxy.openai.fields import GENERATION, Route

ERROR = b'{"error": {"message": "a \\"b\\"", "type": "InternalServerError", "param": null, "code": 503}}'
ANTHROPIC = b'{"type":"error","error":{"type":"internal_error","message":"m"}}'
FLAT = b'{"object":"error","message":"m","type":"BadRequestError","param":null,"code":404}'
DONE = b"\n\ndata: [DONE]\n\n"
CHUNK = b'data: {"choices":[{"text":"a"}]}\n\n'

ERRORS = [
    (b"data: " + ERROR + DONE, ErrorAnswer(503, ERROR)),
    (b"data: " + ERROR, ErrorAnswer(503, ERROR)),
    (b'data: {"error": {"object":"error","message":"m","code":400}}\n\n',
     ErrorAnswer(400, b'{"error": {"object":"error","message":"m","code":400}}')),
    (b"event: error\ndata: " + ANTHROPIC + b"\n\n", ErrorAnswer(500, ANTHROPIC)),
    (b'data: {"error": "torn', ErrorAnswer(500, b'{"error": "torn')),
    (b'data: {"error": []}\n\n', ErrorAnswer(500, b'{"error": []}')),
    (b'data: {"error": {"code": 200}}\n\n', ErrorAnswer(500, b'{"error": {"code": 200}}')),
]  # fmt: skip


@pytest.mark.parametrize(("body", "error"), ERRORS)
def test_a_stream_that_is_nothing_but_an_error(body: bytes, error: ErrorAnswer) -> None:
    assert begins_with_error(body) and error_in(body) == error


@pytest.mark.parametrize(("body", "error"), [(ERROR, ErrorAnswer(503, ERROR)), (FLAT, ErrorAnswer(404, FLAT))])
def test_a_whole_answer_that_is_an_error(body: bytes, error: ErrorAnswer) -> None:
    assert begins_with_error(body) and error_in(body) == error


@pytest.mark.parametrize(("body", "error"), ERRORS)
@pytest.mark.parametrize("before", [b"", CHUNK, b"5e\r\n", CHUNK + b"\r\n5e\r\n"])
def test_the_error_at_the_end_of_a_stream(body: bytes, error: ErrorAnswer, before: bytes) -> None:
    """Chunks may come with their framing."""
    found = error_event(before + body + (b"\r\n0\r\n\r\n" if before.startswith(b"5e") else b""))
    assert found is not None and (found.status, found.body.strip()) == error


@pytest.mark.parametrize(
    "text",
    ['data: {"error": {"code": 500}}', '\ndata: {"error": {"code": 500}}\n', "\nevent: error\ndata: {}", '{"error":'],
)
def test_what_a_model_writes_is_no_error(text: str) -> None:
    chunk = {"choices": [{"text": text}]}
    for body in (json.dumps(chunk), json.dumps(chunk, ensure_ascii=False, separators=(",", ":"))):
        whole, stream = body.encode(), f"data: {body}\n\n".encode() + DONE
        assert not begins_with_error(whole) and not begins_with_error(stream)
        assert error_event(stream) is None and error_event(CHUNK + stream) is None


@pytest.mark.parametrize("route", GENERATION, ids=lambda route: route.dialect)
def test_the_event_before_a_cut(route: Route) -> None:
    event = stream_error(route, EngineFailed("Decode broke."))
    name, _, data = event.removesuffix(b"\n\n").rpartition(b"data: ")
    error = {"message": "Decode broke.", "type": "upstream_error", "param": None, "code": "engine_failed"}
    assert (name, json.loads(data)) == {
        "messages": (b"event: error\n", {"type": "error", "error": error}),
        "responses": (b"event: error\n", {**error, "type": "error"}),
    }.get(route.dialect, (b"", {"error": error}))
    assert event.endswith(b"\n\n") and begins_with_error(event)
