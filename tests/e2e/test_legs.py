"""Two legs, one answer: who is asked when, with which bytes, and that the text is the right one."""

from __future__ import annotations

import asyncio
import json

import pytest

from disagg_sim import expected_text
from tests.simulated import PROMPT, REQUESTS, RIGHT, text_of, text_of_events

every_route = pytest.mark.parametrize("path", REQUESTS)


@every_route
async def test_a_plain_answer(machine, pair, path) -> None:
    status, headers, body = await machine.post(path, REQUESTS[path])
    assert (status, headers["Content-Type"], text_of(body)) == (200, "application/json", RIGHT[path])
    await machine.unharmed(*pair)


@every_route
async def test_a_streamed_answer(machine, pair, path) -> None:
    assert text_of_events(await machine.stream(path, REQUESTS[path])) == RIGHT[path]
    await machine.unharmed(*pair)


@every_route
async def test_decode_is_asked_only_after_the_whole_answer_of_prefill(machine, pair, path) -> None:
    prefill, decode = pair
    with prefill.faults.held("answer"):
        request = asyncio.create_task(machine.post(path, REQUESTS[path]))
        await prefill.wait_until(lambda state: state["held_at"] == "answer")
        assert len(prefill.received(path)) == 1 and not decode.received(path)
    status, _, body = await request
    assert (status, text_of(body)) == (200, RIGHT[path])
    assert len(prefill.received(path)) == len(decode.received(path)) == 1


ORIGINALS = {
    "whitespace and key order": b'{ "prompt" :\t"San Francisco is a" ,\r\n"max_tokens":8 , "model":"sim-model" }\n',
    "unicode escapes": rb'{"model":"sim-model","prompt":"caf\u00e9 \ud83d\ude42 \/ \u0041 \ud800","max_tokens":8}',
    "duplicate keys": b'{"prompt":"no","max_tokens":1000,"prompt":"San Francisco is a","max_tokens":8}',
    "number spellings": b'{"prompt":"San Francisco is a","max_tokens":8,"temperature":0.70e0,"top_p":1E-1,"seed":-0}',
    "UTF-16": json.dumps({"prompt": "数据 → 🙂", "max_tokens": 8}, ensure_ascii=False).encode("utf-16"),
    "UTF-8 with a mark": b'\xef\xbb\xbf{"prompt":"San Francisco is a","max_tokens":8}',
    "unknown fields": b'{"prompt":"San Francisco is a","max_tokens":8,"x":[1.50,{"y":null}],"":0}',
}


async def test_decode_gets_the_bytes_that_the_client_sent(machine, pair) -> None:
    prefill, decode = pair
    for name, raw in ORIGINALS.items():
        sent = json.loads(raw)
        status, _, body = await machine.send("/v1/completions", raw)
        assert status == 200, (name, body)
        assert json.loads(body)["choices"][0]["text"] == expected_text(sent["prompt"], 8)
        assert decode.received("/v1/completions")[-1].body == raw
        assert prefill.received("/v1/completions")[-1].json == {**sent, "max_tokens": 1, "stream": False}


PROMPTS = {
    "a list of texts": ["one", "two and three", "東京 café"],
    "token ids": [300, 301, 302, 70_000, 151_935],
    "lists of token ids": [[300, 301], [302, 303, 304]],
    "text as long as a chunk of prefill": "a" * 8192,
    "20,000 tokens in several chunks": [300 + i % 150 for i in range(20_000)],
}


@pytest.mark.parametrize("name", PROMPTS)
async def test_every_form_of_prompt(machine, pair, name) -> None:
    prompt = PROMPTS[name]
    prompts = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    right = [expected_text(one, 6) for one in prompts]
    body = {"model": "sim-model", "prompt": prompt, "max_tokens": 6}
    status, _, answer = await machine.post("/v1/completions", body)
    assert status == 200, answer
    assert [choice["text"] for choice in answer["choices"]] == right
    stream = await machine.stream("/v1/completions", body)
    assert [text_of_events(stream, index) for index in range(len(prompts))] == right
    await machine.unharmed(*pair)


async def test_a_prompt_of_one_token(machine, pair) -> None:
    status, _, body = await machine.post("/v1/completions", {"prompt": [300], "max_tokens": 6})
    assert (status, text_of(body)) == (200, expected_text([300], 6))
    status, _, body = await machine.post("/v1/completions", REQUESTS["/v1/completions"])
    assert (status, text_of(body)) == (200, RIGHT["/v1/completions"])


@every_route
async def test_an_answer_of_one_token(machine, pair, path) -> None:
    status, _, body = await machine.post(path, {**REQUESTS[path], "max_tokens": 1})
    assert status == 200 and text_of(body) and RIGHT[path].startswith(text_of(body))
    assert len(pair[1].received(path)) == 1
    await machine.unharmed(*pair)


@pytest.mark.parametrize("prompt", [PROMPT, ["one", "two"]], ids=["one prompt", "two prompts"])
async def test_several_choices_of_each_prompt(machine, pair, prompt) -> None:
    prompts = [prompt] if isinstance(prompt, str) else prompt
    right = [expected_text(one, 6, index=index) for one in prompts for index in range(2)]
    body = {"prompt": prompt, "n": 2, "max_tokens": 6}
    _, _, answer = await machine.post("/v1/completions", body)
    assert [choice["text"] for choice in answer["choices"]] == right
    stream = await machine.stream("/v1/completions", body)
    assert [text_of_events(stream, index) for index in range(len(right))] == right
    assert [got.json["n"] for got in pair[0].received("/v1/completions")] == [2, 2]
    await machine.unharmed(*pair)


async def test_echo(machine, pair) -> None:
    for limit, text in ((8, PROMPT + RIGHT["/v1/completions"]), (1, PROMPT + expected_text(PROMPT, 1)), (0, PROMPT)):
        body = {"prompt": PROMPT, "echo": True, "max_tokens": limit}
        assert text_of((await machine.post("/v1/completions", body))[2]) == text
        assert text_of_events(await machine.stream("/v1/completions", body)) == text
    await machine.unharmed(*pair)


async def test_logprobs_of_the_answer(machine, pair) -> None:
    status, _, body = await machine.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 5, "logprobs": 2})
    logprobs = body["choices"][0]["logprobs"]
    assert status == 200 and "".join(logprobs["tokens"]) == text_of(body) == expected_text(PROMPT, 5)
    assert len(logprobs["token_logprobs"]) == 5 and all(-1 <= value <= 0 for value in logprobs["token_logprobs"])


async def test_stop_strings(machine, pair) -> None:
    long = expected_text(PROMPT, 30)
    stop = " " + long.split()[12]
    body = {"prompt": PROMPT, "max_tokens": 30, "stop": [stop]}
    assert text_of((await machine.post("/v1/completions", body))[2]) == long[: long.index(stop)]
    assert text_of_events(await machine.stream("/v1/completions", body)) == long[: long.index(stop)]
    await machine.unharmed(*pair)


async def test_a_hundred_answers_at_once_are_not_mixed_up(machine, pair) -> None:
    async def one(number: int) -> None:
        prompt = f"Number {number} of them"
        body = {"prompt": prompt, "max_tokens": 12}
        if number % 2:
            assert text_of_events(await machine.stream("/v1/completions", body)) == expected_text(prompt, 12)
        else:
            assert text_of((await machine.post("/v1/completions", body))[2]) == expected_text(prompt, 12)

    await asyncio.gather(*map(one, range(100)))
    await machine.unharmed(*pair)


async def test_an_answer_in_small_pieces_is_the_same_answer(machine, pair) -> None:
    for engine in pair:
        engine.faults.split_writes([1, 2, 7])
    await machine.check_right()
    body = REQUESTS["/v1/completions"]
    assert text_of_events(await machine.stream("/v1/completions", body)) == RIGHT["/v1/completions"]
