"""What clients do with X-Should-Retry and Retry-After: the official ones repeat what can succeed, and nothing else."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import anyio
import openai
import pytest
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI

from tests.simulated import CHAT, PROMPT, REQUESTS, RIGHT, text_of

COMPLETIONS, MESSAGES = "/v1/completions", "/v1/messages"
ASK: Any = REQUESTS[COMPLETIONS]


@pytest.fixture
async def openai_client(machine) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=machine.proxy.url + "/v1", api_key="none", max_retries=2) as found:
        yield found


@pytest.fixture
async def anthropic_client(machine) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic(base_url=machine.proxy.url, api_key="none", max_retries=2) as found:
        yield found


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """The seconds that the clients wait before they repeat a request, which are not waited."""
    found: list[float] = []

    async def sleep(seconds: float) -> None:
        found.append(seconds)

    monkeypatch.setattr(anyio, "sleep", sleep)
    return found


async def test_what_is_not_served_is_sent_once(openai_client, pair, pauses) -> None:
    with pytest.raises(openai.InternalServerError) as failed:
        await openai_client.embeddings.create(model="sim-model", input=PROMPT)
    assert failed.value.status_code == 501 and not pauses


@pytest.mark.parametrize("leg", ["prefill", "decode"])
async def test_an_engines_501_is_passed_on_and_counts_against_nobody(machine, openai_client, pair, pauses, leg) -> None:
    engine = pair[leg == "decode"]
    engine.faults.fail_next(501, b'{"error": {"message": "not this model"}}', path=COMPLETIONS)
    with pytest.raises(openai.InternalServerError, match="not this model") as failed:
        await openai_client.completions.create(**ASK)
    assert failed.value.status_code == 501 and not pauses and len(engine.received(COMPLETIONS)) >= 1
    await machine.proxy.until_idle()
    assert machine.proxy.services.stats.outcomes == {"client_error": 1}
    assert all(machine.proxy.instance(one.http_address).failures_total == 0 for one in pair)


async def test_a_501_of_a_route_that_one_engine_serves_is_sent_once(machine, openai_client, pauses) -> None:
    engine = await machine.engine("decode", connector="disagg_kv", pooling=True)
    await machine.proxy.until(lambda: bool(machine.proxy.services.registry.models()))
    engine.faults.fail_next(501, b'{"error": {"message": "not this model"}}', path="/v1/embeddings")
    with pytest.raises(openai.InternalServerError):
        await openai_client.embeddings.create(model="sim-model", input=PROMPT)
    assert not pauses and len(engine.received("/v1/embeddings")) == 1


@pytest.mark.parametrize("message", ["list index out of range", ""])
async def test_a_500_on_messages_is_mostly_the_requests_fault(anthropic_client, pair, pauses, message: str) -> None:
    pair[0].faults.fail_next(500, json.dumps({"error": {"message": message}}), path=MESSAGES)
    with pytest.raises(anthropic.InternalServerError) as failed:
        await anthropic_client.messages.create(model="sim-model", max_tokens=8, messages=CHAT)
    assert failed.value.status_code == 502 and not pauses


async def test_a_500_of_a_dead_engine_is_worth_a_retry(machine, pair) -> None:
    said = {"message": "EngineCore encountered an issue. See stack trace (above) for the root cause."}
    pair[0].faults.fail_next(500, json.dumps({"error": said}), path=MESSAGES)
    status, headers, _ = await machine.post(MESSAGES, REQUESTS[MESSAGES])
    assert (status, headers["X-Should-Retry"]) == (502, "true")


async def test_a_500_elsewhere_is_left_to_the_client(machine, pair) -> None:
    pair[0].faults.fail_next(500, b"", path=COMPLETIONS)
    status, headers, _ = await machine.post(COMPLETIONS, ASK)
    assert status == 502 and "X-Should-Retry" not in headers


@pytest.mark.settings(engine_api_key="other")
async def test_a_wrong_key_for_the_engines_is_not_repeated(machine, pair) -> None:
    pair[0].faults.fail_next(401, b"{}", path=COMPLETIONS)
    status, headers, _ = await machine.post(COMPLETIONS, ASK)
    assert (status, headers["X-Should-Retry"]) == (502, "false")


async def test_a_busy_engine_is_tried_again_after_the_time_that_it_names(openai_client, pair, pauses) -> None:
    pair[0].faults.fail_next(429, b"", {"Retry-After": "7"}, path=COMPLETIONS)
    answer = await openai_client.completions.create(**ASK)
    assert answer.choices[0].text == RIGHT[COMPLETIONS] and pauses == [7.0]


async def test_a_busy_engine_is_tried_again_by_the_other_client_too(anthropic_client, pair, pauses) -> None:
    pair[0].faults.fail_next(429, b"", {"Retry-After": "7"}, path=MESSAGES)
    answer = await anthropic_client.messages.create(model="sim-model", max_tokens=8, messages=CHAT)
    assert text_of(answer.model_dump()) == RIGHT[MESSAGES] and pauses == [7.0]


async def test_no_pair_is_tried_again(openai_client, pauses) -> None:
    with pytest.raises(openai.InternalServerError) as failed:
        await openai_client.completions.create(**ASK)
    assert failed.value.status_code == 503 and pauses == [3.0, 3.0]
