"""Routes that one engine answers alone or that go to every engine; and which pair serves a model."""

from __future__ import annotations

import asyncio
import re

import pytest

from disagg_sim import encode, expected_text, render_chat
from tests.simulated import CHAT, PROMPT, REQUESTS, RIGHT, text_of

GENERATION = list(REQUESTS)


async def test_models_are_the_union_of_what_the_engines_serve(machine) -> None:
    await machine.pair(models=("first", "alias"))
    await machine.pair(models=("second",))
    status, body = await machine.get("/v1/models")
    assert (status, body["object"]) == (200, "list")
    assert sorted(card["id"] for card in body["data"]) == ["alias", "first", "second"]
    assert all(card["object"] == "model" and card["max_model_len"] == 32768 for card in body["data"])
    assert await machine.get("/v1/models/alias") == (200, next(c for c in body["data"] if c["id"] == "alias"))


async def test_a_model_whose_name_has_a_slash(machine) -> None:
    await machine.pair(models=("org/model",))
    assert (await machine.get("/v1/models/org/model"))[1]["id"] == "org/model"
    status, body = await machine.get("/v1/models/org/other")
    assert (status, body["error"]["code"]) == (404, "model_not_found") and "org/model" in body["error"]["message"]


async def test_no_engine_no_models(machine) -> None:
    assert await machine.get("/v1/models") == (200, {"object": "list", "data": []})


async def test_tokenize_and_detokenize(machine, pair) -> None:
    _, _, body = await machine.post("/tokenize", {"model": "sim-model", "prompt": PROMPT})
    assert (body["tokens"], body["count"]) == (encode(PROMPT), len(encode(PROMPT)))
    _, _, text = await machine.post("/detokenize", {"model": "sim-model", "tokens": body["tokens"]})
    assert text == {"prompt": PROMPT}
    _, _, chat = await machine.post("/tokenize", {"messages": CHAT})
    assert chat["tokens"] == encode(render_chat(CHAT))
    _, _, counted = await machine.post("/v1/messages/count_tokens", {"model": "sim-model", "messages": CHAT})
    assert counted["input_tokens"] == chat["count"]
    await machine.unharmed(*pair)


async def test_one_engine_is_enough_for_them_and_it_gets_the_clients_bytes(machine) -> None:
    engine = await machine.engine("prefill")
    await machine.proxy.until(lambda: bool(machine.proxy.services.registry.models()))
    raw = b'{ "prompt" : "caf\\u00e9" }'
    status, _, _ = await machine.send("/tokenize", raw, **{"X-Custom": "1"})
    [got] = engine.received("/tokenize")
    assert (status, got.body, got.headers["X-Custom"]) == (200, raw, "1")
    assert await machine.get("/version") == (200, {"version": "0.21.0"})


ONE_ENGINE = [
    ("GET", "/version", None, 200),
    ("POST", "/tokenize", {"prompt": PROMPT}, 200),
    ("POST", "/detokenize", {"tokens": "no"}, 400),
    ("POST", "/v1/messages/count_tokens", {"model": "sim-model", "messages": CHAT}, 200),
    ("POST", "/v1/embeddings", {"model": "sim-model", "input": PROMPT}, 200),
]


@pytest.mark.parametrize(("method", "path", "body", "status"), ONE_ENGINE, ids=[path for _, path, *_ in ONE_ENGINE])
async def test_they_can_be_followed_by_their_id(machine, method: str, path: str, body, status: int) -> None:
    """The client's own id comes back, and the engine gets it with a unique end; without one there is a new id."""
    engine = await machine.engine("prefill", connector="disagg_kv", pooling=True, enable_request_id_headers=True)
    await machine.proxy.until(lambda: bool(machine.proxy.services.registry.models()))
    sent = []
    for own in ("mine-1", "mine-1", None):
        headers = {"X-Request-Id": own} if own else {}
        async with machine.http.request(method, machine.proxy.url + path, json=body, headers=headers) as answer:
            [returned] = answer.headers.getall("X-Request-Id")
            [received] = engine.received(path)[-1].headers.getall("X-Request-Id")
            assert answer.status == status and returned == (own or received) and received.startswith(returned)
            sent.append(received)
    assert len(set(sent)) == 3 and re.fullmatch("[0-9a-f]{32}", sent[2])


async def test_their_errors_are_the_engines(machine, pair) -> None:
    for _ in range(3):
        status, _, body = await machine.post("/detokenize", {"tokens": "no"})
        assert (status, body["error"]["param"]) == (400, "tokens")
    status, _, body = await machine.post("/tokenize", {"model": "other", "prompt": "x"})
    assert (status, body["error"]["code"]) == (404, "model_not_found") and "sim-model" in body["error"]["message"]


async def test_without_engines_they_are_unavailable(machine) -> None:
    for method, path in (("POST", "/tokenize"), ("GET", "/version")):
        async with machine.http.request(method, machine.proxy.url + path, data=b"{}") as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (503, "no_pair")
            assert int(answer.headers["Retry-After"]) > 0


async def test_profiling_is_off_by_default(machine, pair) -> None:
    for path in ("/start_profile", "/stop_profile"):
        status, _, body = await machine.post(path, None)
        assert status == 404 and "ENABLE_PROFILING" in body["error"]["message"]
    assert not any(engine.state()["profiling"] or engine.received("/start_profile") for engine in pair)


@pytest.mark.settings(enable_profiling=True)
async def test_profiling_reaches_every_engine(machine, pair) -> None:
    third = await machine.engine("decode")
    await machine.proxy.until_pairs(2)
    for path, running in (("/start_profile", True), ("/stop_profile", False)):
        async with machine.http.post(machine.proxy.url + path) as answer:
            assert answer.status == 200
            assert [one["status"] for one in (await answer.json())["instances"]] == [200] * 3
        assert [engine.state()["profiling"] for engine in (*pair, third)] == [running] * 3


@pytest.mark.settings(enable_profiling=True)
async def test_profiling_that_one_engine_refuses_is_told(machine, pair) -> None:
    pair[1].faults.fail_next(404, path="/start_profile")
    status, _, body = await machine.post("/start_profile", None)
    assert status == 502
    assert {one["role"]: one["status"] for one in body["instances"]} == {"prefill": 200, "decode": 404}


UNKNOWN = [
    "/v1",
    "/nope",
    "/v1/completions/x",
    "/invocations",
    "/inference/v1/generate",
    "/sleep",
    "/collective_rpc",
    "/abort_requests",
    "/v1/chat/completions/batch",
    "/%ff",
    "/docs",
]


async def test_other_paths_are_404_and_other_methods_405_always_as_json(machine, pair) -> None:
    for path in UNKNOWN:
        for method in ("GET", "POST"):
            async with machine.http.request(method, machine.proxy.url + path) as answer:
                assert (answer.status, answer.content_type) == (404, "application/json"), path
                assert (await answer.json())["error"]["code"] == "not_found"
    for method, path in [
        *(("GET", path) for path in GENERATION),
        ("POST", "/health"),
        ("DELETE", "/v1/models"),
        ("PUT", "/tokenize"),
    ]:
        async with machine.http.request(method, machine.proxy.url + path) as answer:
            assert (answer.status, answer.content_type) == (405, "application/json"), path
            assert (await answer.json())["error"]["code"] == "method_not_allowed"


async def test_an_unknown_model_is_told_which_exist(machine, pair) -> None:
    for path in REQUESTS:
        status, _, body = await machine.post(path, {**REQUESTS[path], "model": "other"})
        assert (status, body["error"]["code"], body["error"]["param"]) == (404, "model_not_found", "model")
        assert "sim-model" in body["error"]["message"] and not pair[0].received(path)


async def test_no_model_is_the_engines_default(machine, pair) -> None:
    body = {name: value for name, value in REQUESTS["/v1/completions"].items() if name != "model"}
    for named in ({}, {"model": None}, {"model": ""}):
        status, _, answer = await machine.post("/v1/completions", {**body, **named})
        assert (status, text_of(answer)) == (200, RIGHT["/v1/completions"])


async def test_two_models_on_four_engines_are_never_mixed(machine) -> None:
    pairs = {name: await machine.pair(models=(name,)) for name in ("one", "two")}

    async def ask(number: int) -> None:
        model, prompt = ("one", "two")[number % 2], f"Prompt {number}"
        status, _, answer = await machine.post("/v1/completions", {"model": model, "prompt": prompt, "max_tokens": 6})
        assert (status, answer["model"], text_of(answer)) == (200, model, expected_text(prompt, 6))

    await asyncio.gather(*map(ask, range(40)))
    for model, engines in pairs.items():
        for engine in engines:
            got = engine.received("/v1/completions")
            assert len(got) == 20 and {request.json["model"] for request in got} == {model}
        await machine.unharmed(*engines)


async def test_a_model_that_only_one_role_serves_is_unavailable_not_unknown(machine, pair) -> None:
    await machine.engine("prefill", models=("half",))
    await machine.proxy.until(lambda: "half" in machine.proxy.services.registry.models())
    status, headers, body = await machine.post("/v1/completions", {"model": "half", "prompt": "x"})
    assert (status, body["error"]["code"], headers["Retry-After"]) == (503, "no_pair", "3")
    assert "decode" in body["error"]["message"] and "half" in body["error"]["message"]
