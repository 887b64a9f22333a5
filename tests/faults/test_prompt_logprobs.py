"""Log probabilities of the prompt: from prefill, since decode has only uninitialised memory for them; or refused."""

from __future__ import annotations

import json

import pytest

from disagg_sim import expected_text
from tests.simulated import CHAT, PROMPT, REQUESTS, RIGHT, text_of

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"

ANSWERED = {
    "prompt_logprobs": (COMPLETIONS, {"prompt": PROMPT, "max_tokens": 1, "prompt_logprobs": 1}),
    "prompt_logprobs 0": (COMPLETIONS, {"prompt": PROMPT, "max_tokens": 1, "prompt_logprobs": 0}),
    "echo and logprobs": (COMPLETIONS, {"prompt": PROMPT, "max_tokens": 1, "echo": True, "logprobs": 1}),
    "log-likelihood": (COMPLETIONS, {"prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 1}),
    "several prompts": (
        COMPLETIONS,
        {"prompt": [[300, 301], [302, 303, 304]], "max_tokens": 0, "echo": True, "logprobs": 0},
    ),
    "several choices": (COMPLETIONS, {"prompt": PROMPT, "max_tokens": 1, "n": 2, "prompt_logprobs": 1}),
    "chat": (CHATS, {"messages": CHAT, "max_tokens": 1, "prompt_logprobs": 1}),
    "chat, newer limit": (CHATS, {"messages": CHAT, "max_completion_tokens": 1, "prompt_logprobs": 1}),
    "chat with echo": (CHATS, {"messages": CHAT, "max_tokens": 1, "echo": True}),
}


def found(answer) -> list[float]:
    """Every log probability of a prompt token in an answer of any shape."""
    values: list[float | None] = []
    for holder in (answer, *answer["choices"]):
        for entry in holder.get("prompt_logprobs") or ():
            values += [one["logprob"] for one in (entry or {}).values()]
        # With echo, those of the prompt come first, and the very first token has none.
        values += (holder.get("logprobs") or {}).get("token_logprobs", [])
    return [value for value in values if value is not None]


@pytest.mark.parametrize("name", ANSWERED)
async def test_prefill_answers_and_its_kv_is_drained(machine, pair, name) -> None:
    prefill, decode = pair
    path, body = ANSWERED[name]
    status, headers, raw = await machine.send(path, body)
    assert (status, headers["Content-Type"]) == (200, "application/json"), raw
    values = found(json.loads(raw))
    assert len(values) >= 2 and all(-5 <= value <= 0 for value in values), values
    assert b"_addr_" not in raw
    await machine.unharmed(*pair)
    assert (machine.proxy.services.stats.kv_releases.started, machine.proxy.services.stats.kv_releases.done) == (1, 1)
    [drain] = decode.received(path)
    assert not {"prompt_logprobs", "echo", "logprobs", "top_logprobs"} & drain.json.keys()
    assert drain.headers["X-Request-Id"] == prefill.received(path)[0].headers["X-Request-Id"]
    status, _, answer = await machine.post(COMPLETIONS, REQUESTS[COMPLETIONS])
    assert (status, text_of(answer)) == (200, RIGHT[COMPLETIONS])


async def test_the_answer_is_the_one_that_was_asked_for(machine, pair) -> None:
    _, _, echoed = await machine.post(*ANSWERED["log-likelihood"])
    assert text_of(echoed) == PROMPT == "".join(echoed["choices"][0]["logprobs"]["tokens"])
    _, _, one = await machine.post(*ANSWERED["prompt_logprobs"])
    assert (text_of(one), one["usage"]["completion_tokens"]) == (expected_text(PROMPT, 1), 1)


async def test_many_log_likelihoods_at_once(machine, pair) -> None:
    prompts = [f"Question {number}, answer" for number in range(40)]
    body = {"prompt": prompts, "max_tokens": 0, "echo": True, "logprobs": 1}
    _, _, answer = await machine.post(COMPLETIONS, body)
    assert [choice["text"] for choice in answer["choices"]] == prompts
    await machine.unharmed(*pair)


MORE = [
    (COMPLETIONS, {"prompt": PROMPT, "max_tokens": 2, "prompt_logprobs": 1}),
    (COMPLETIONS, {"prompt": PROMPT, "prompt_logprobs": 1}),
    (COMPLETIONS, {"prompt": PROMPT, "prompt_logprobs": 1, "max_completion_tokens": 1}),
    (COMPLETIONS, {"prompt": PROMPT, "max_tokens": 1, "prompt_logprobs": 1, "stream": True}),
    (COMPLETIONS, {"prompt": PROMPT, "max_tokens": "1", "prompt_logprobs": 1}),
    (COMPLETIONS, {"prompt": PROMPT, "max_tokens": 2, "echo": True, "logprobs": 0}),
    (CHATS, {"messages": CHAT, "max_tokens": 2, "prompt_logprobs": 1}),
    (CHATS, {"messages": CHAT, "prompt_logprobs": 1}),
    (CHATS, {"messages": CHAT, "max_tokens": 1, "max_completion_tokens": 2, "prompt_logprobs": 1}),
    (CHATS, {"messages": CHAT, "max_tokens": 2, "echo": True}),
]


async def test_more_than_prefills_one_token_is_refused(machine, pair) -> None:
    for path, body in MORE:
        status, _, answer = await machine.post(path, body)
        assert (status, answer["error"]["code"]) == (400, "unsupported_parameter"), body
        assert answer["error"]["param"] in ("prompt_logprobs", "echo")
        assert not pair[0].received(path)


async def test_what_prefill_refuses_is_passed_on_and_nothing_drained(machine, pair) -> None:
    status, _, answer = await machine.post(COMPLETIONS, {"prompt": PROMPT, "max_tokens": 1, "prompt_logprobs": 99})
    assert status == 400 and "prompt_logprobs" in answer["error"]["message"]
    assert not pair[1].received(COMPLETIONS) and machine.proxy.services.stats.kv_releases.started == 0
    await machine.unharmed(*pair)


async def test_chat_echo_without_logprobs_of_the_prompt_needs_no_prefill_answer(machine, pair) -> None:
    body = {"messages": [*CHAT, {"role": "assistant", "content": "It"}], "echo": True, "top_logprobs": None}
    status, _, answer = await machine.post(CHATS, {**body, "max_tokens": 4})
    assert status == 200 and text_of(answer).startswith("It") and len(text_of(answer)) > 2
    assert len(pair[1].received(CHATS)) == 1
    await machine.unharmed(*pair)
