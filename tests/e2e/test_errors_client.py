"""What a client does wrong: always OpenAI-style JSON, never HTML, never a connection that hangs, never an engine that
hears of it."""

import asyncio
import json
import re

import pytest

from disagg_proxy.cluster.instance import State
from tests.conftest import Wire, soon
from tests.simulated import REQUESTS, RIGHT, check_error, text_of

COMPLETIONS = "/v1/completions"
ASK = REQUESTS[COMPLETIONS]
DEEP = b'{"model":"sim-model","prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}"


async def check_usable_or_closed(wire: Wire) -> None:
    """After an error the connection serves the next request, or it is closed; it never hangs."""
    wire.post(COMPLETIONS, ASK)
    try:
        status, _, body = await wire.answer()
    except (asyncio.IncompleteReadError, ConnectionError):
        return
    assert status == 200 and text_of(json.loads(body)) == RIGHT[COMPLETIONS]


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b'{"model": ', "not valid JSON"),
        (b"<html>", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[1]", "not an array"),
        (b'"text"', "not a string"),
        (b"null", "not null"),
        (b"true", "not a boolean"),
        (b"3.5", "not a number"),
        (DEEP, "nested too deeply"),
        (b'{"model": "sim-model", "prompt": "x", "temperature": NaN}', "NaN is not a JSON value"),
        (b'{"model": "sim-model", "prompt": "x", "top_p": -Infinity}', "-Infinity is not a JSON value"),
        (b'{"model": 7, "prompt": "x"}', "model must be a string"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_body_that_is_no_json_object_is_400(machine, raw: bytes, says: str) -> None:
    # Even where no pair is there: what the client must change comes first.
    for path in REQUESTS:
        assert says in check_error(*await machine.send(path, raw), 400, "invalid_request")


async def test_no_engine_hears_of_a_body_that_cannot_be_read(machine, pair) -> None:
    for path in REQUESTS:
        assert (await machine.send(path, b'{"model": "sim-model", "prompt": '))[0] == 400
        assert all(not engine.received(path) for engine in pair)


@pytest.mark.settings(max_body_bytes=1000)
@pytest.mark.parametrize("path", [COMPLETIONS, "/tokenize"])
@pytest.mark.parametrize("chunked", [False, True], ids=["announced", "chunked"])
async def test_a_body_that_is_too_large_is_413_before_it_has_ended(machine, pair, dial, path, chunked) -> None:
    wire = await dial(machine.proxy.url)
    if chunked:
        wire.start(path, "Transfer-Encoding: chunked")
        wire.send(b"3e9\r\n" + b"x" * 1001 + b"\r\n")
    else:
        wire.start(path, "Content-Length: 1001")
    assert "1000 bytes (MAX_BODY_BYTES)" in check_error(*await wire.answer(), 413, "request_too_large")
    wire.send(b"0\r\n\r\n" if chunked else b"x" * 1001)
    await check_usable_or_closed(wire)


@pytest.mark.settings(max_body_bytes=1000)
async def test_a_body_of_exactly_the_maximum_is_served(machine, pair) -> None:
    raw = json.dumps(ASK).encode().ljust(1000)
    assert (await machine.send(COMPLETIONS, raw))[0] == 200


@pytest.mark.settings(max_body_bytes=1000)
async def test_a_client_that_waits_for_100_continue_gets_its_413_instead(machine, pair, dial) -> None:
    wire = await dial(machine.proxy.url)
    wire.start(COMPLETIONS, "Content-Length: 1001", "Expect: 100-continue")
    status, _ = await wire.head()
    if status == 100:
        status, _ = await wire.head()
    assert status == 413


@pytest.mark.settings(body_timeout=0.1)
async def test_a_slow_body_is_408(machine, pair, dial) -> None:
    wire = await dial(machine.proxy.url)
    wire.start(COMPLETIONS, "Content-Length: 10")
    wire.send(b'{"a": ')
    assert "BODY_TIMEOUT" in check_error(*await wire.answer(), 408, "request_timeout")
    wire.send(b"1}  ")
    await check_usable_or_closed(wire)


@pytest.mark.parametrize("path", [COMPLETIONS, "/tokenize"])
@pytest.mark.parametrize("encoding", ["gzip", "br", "gzip, identity"])
async def test_a_compressed_body_is_415(machine, pair, path: str, encoding: str) -> None:
    answer = await machine.send(path, ASK, **{"Content-Encoding": encoding})
    assert answer[1]["Accept-Encoding"] == "identity"
    assert "uncompressed" in check_error(*answer, 415, "unsupported_media_type")


@pytest.mark.settings(api_key="sk-right")
async def test_a_401_needs_no_body_and_leaves_the_connection_usable_or_closed(machine, pair, dial) -> None:
    wire = await dial(machine.proxy.url)
    wire.start(COMPLETIONS, "Content-Length: 100")
    check_error(*await wire.answer(), 401, "invalid_api_key")
    wire.send(b"x" * 100)
    wire.post(COMPLETIONS, ASK, "Authorization: bearer sk-right")
    assert (await wire.answer())[0] == 200


@pytest.mark.parametrize("path", [*REQUESTS, "/tokenize"])
async def test_an_unknown_model_is_404_and_lists_those_that_exist(machine, pair, path: str) -> None:
    body = {**REQUESTS.get(path, ASK), "model": "gpt-4"}
    message = check_error(*await machine.send(path, body), 404, "model_not_found")
    assert "'gpt-4'" in message and message.endswith("Models that exist: sim-model.")


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/nowhere"), ("POST", "/sleep"), ("GET", "/v1/completions/../../etc/passwd"), ("GET", "/%00%ff")],
)
async def test_a_wrong_path_is_json_too(machine, method: str, path: str) -> None:
    async with machine.http.request(method, machine.proxy.url + path) as answer:
        check_error(answer.status, answer.headers, await answer.read(), 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", COMPLETIONS, "OPTIONS, POST"),
        ("DELETE", "/v1/chat/completions", "OPTIONS, POST"),
        ("POST", "/health", "GET, HEAD, OPTIONS"),
        ("PATCH", "/tokenize", "OPTIONS, POST"),
        ("POST", "/v1/models", "GET, HEAD, OPTIONS"),
        ("PUT", "/v1/responses/stored", "DELETE, GET, HEAD, OPTIONS, POST"),
    ],
)
async def test_a_wrong_method_is_json_too_and_lists_the_right_ones(
    machine, method: str, path: str, allowed: str
) -> None:
    async with machine.http.request(method, machine.proxy.url + path) as answer:
        message = check_error(answer.status, answer.headers, await answer.read(), 405, "method_not_allowed")
        assert answer.headers["Allow"] == allowed and allowed in message


ADDRESS = re.compile(r"\d+\.\d+\.\d+\.\d+|localhost|:\d{2,5}\b")


@pytest.mark.parametrize("path", REQUESTS)
@pytest.mark.parametrize(
    ("roles", "missing"),
    [((), ["prefill", "decode"]), (("prefill",), ["decode"]), (("decode",), ["prefill"])],
    ids=["nobody", "only prefill", "only decode"],
)
async def test_no_pair_is_503_that_says_what_is_missing(machine, path: str, roles, missing) -> None:
    engines = [await machine.engine(role) for role in roles]
    for engine in engines:
        await soon(machine.proxy.until_state(engine.http_address, State.READY))
    status, headers, raw = await machine.send(path, REQUESTS[path])
    message = check_error(status, headers, raw, 503, "no_pair")
    assert int(headers["Retry-After"]) > 0
    for role in ("prefill", "decode"):
        assert (f"no {role} instance is ready (none has registered)" in message) == (role in missing)
    assert not ADDRESS.search(message)
    assert not any(engine.received(path) for engine in engines)


async def test_a_503_says_why_an_instance_is_not_ready_without_its_address(machine, pair) -> None:
    prefill = pair[0]
    await prefill.kill()
    assert (await machine.send(COMPLETIONS, ASK))[0] in (502, 503)
    await soon(machine.proxy.until_state(prefill.http_address, State.PROBING))
    status, headers, raw = await machine.send(COMPLETIONS, ASK)
    message = check_error(status, headers, raw, 503, "no_pair")
    assert "one is probing: its HTTP port" in message and not ADDRESS.search(message)


@pytest.mark.interpreted
async def test_a_bug_in_the_proxy_is_500_without_its_details(machine, pair, monkeypatch, caplog) -> None:
    def broken(*args) -> None:
        raise RuntimeError("a secret detail")

    monkeypatch.setattr(machine.proxy.services.selection, "choose", broken)
    message = check_error(*await machine.send(COMPLETIONS, ASK), 500, "internal_error")
    assert "secret" not in message and "a secret detail" in caplog.text


async def test_two_requests_sent_at_once_on_one_connection_are_answered_in_order(machine, pair, dial) -> None:
    wire = await dial(machine.proxy.url)
    wire.post(COMPLETIONS, {**ASK, "model": "gpt-4"})
    wire.post(COMPLETIONS, ASK)
    assert [(await soon(wire.answer()))[0] for _ in range(2)] == [404, 200]
