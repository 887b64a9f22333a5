"""LiteLLM against the proxy, where it is installed: in the environment of the tests, or in that of LITELLM_PYTHON."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import pytest

from disagg_sim import expected_chat_text
from tests.conftest import soon
from tests.e2e.test_keys import key_of
from tests.e2e.test_keys import keyed as keyed
from tests.simulated import CHAT, PROMPT, RIGHT, Machine

PYTHON = os.environ.get("LITELLM_PYTHON") or (sys.executable if find_spec("litellm") else None)
CALLS = Path(__file__).with_name("litellm_calls.py")
RIGHT_CHAT = expected_chat_text(CHAT, 8)
CHAT_PATH, MESSAGES = "/v1/chat/completions", "/v1/messages"

pytestmark = pytest.mark.skipif(PYTHON is None, reason="LITELLM_PYTHON names no Python with LiteLLM")


class LiteLLM:
    """A process in which LiteLLM is imported once, which takes seconds of CPU time."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._in: IO[str] = process.stdin
        self._out: IO[str] = process.stdout

    async def call(self, name: str, machine: Machine, kind: str = "openai", **arguments: Any) -> dict[str, Any]:
        """What a function of LiteLLM returned or raised: see tests/e2e/litellm_calls.py."""
        url = machine.proxy.url
        fixed = {
            "call": name,
            "model": f"{kind}/sim-model",
            "api_base": url if kind == "anthropic" else url + "/v1",
            "api_key": "none",
            "max_tokens": 8,
            **({"prompt": PROMPT} if "text" in name else {"messages": CHAT}),
        }
        self._in.write(json.dumps({**fixed, **arguments}) + "\n")
        self._in.flush()
        return json.loads(await soon(asyncio.to_thread(self._out.readline)))


@pytest.fixture(scope="module")
def litellm() -> Iterator[LiteLLM]:
    command = (str(PYTHON), "-I", str(CALLS))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        found = LiteLLM(process)
        assert found._out.readline() == "ready\n"
        yield found
        process.kill()


def text_of(result: dict[str, Any]) -> str:
    if "chunks" not in result:
        choice = result["answer"]["choices"][0]
        return choice["message"]["content"] if "message" in choice else choice["text"]
    choices = [choice for chunk in result["chunks"] for choice in chunk["choices"]]
    return "".join((choice["delta"]["content"] if "delta" in choice else choice["text"]) or "" for choice in choices)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("kind", ["openai", "hosted_vllm", "anthropic"])
@pytest.mark.parametrize("name", ["completion", "acompletion"])
async def test_chat(machine, pair, litellm, name: str, kind: str, stream: bool) -> None:
    result = await litellm.call(name, machine, kind, stream=stream)
    assert text_of(result) == RIGHT_CHAT, result
    assert len(pair[1].received(MESSAGES if kind == "anthropic" else CHAT_PATH)) == 1


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_completions(machine, pair, litellm, stream: bool) -> None:
    result = await litellm.call("atext_completion", machine, "text-completion-openai", stream=stream)
    assert text_of(result) == RIGHT["/v1/completions"], result


async def test_usage_of_a_stream(machine, pair, litellm) -> None:
    result = await litellm.call("acompletion", machine, stream=True, stream_options={"include_usage": True})
    assert result["chunks"][-1]["usage"]["completion_tokens"] == 8


async def test_the_anthropic_call(machine, pair, litellm) -> None:
    result = await litellm.call("anthropic.messages.acreate", machine, "anthropic")
    assert result["answer"]["content"][0]["text"] == RIGHT_CHAT


async def test_the_request_id_is_found(machine, pair, litellm) -> None:
    result = await litellm.call("acompletion", machine, extra_headers={"X-Request-Id": "mine"})
    assert result["headers"]["llm_provider-x-request-id"] == "mine"


async def test_a_busy_engine_is_tried_again_after_the_time_that_it_names(machine, pair, litellm) -> None:
    pair[0].faults.fail_next(503, b"", {"Retry-After": "1"}, path=CHAT_PATH)
    assert text_of(await litellm.call("acompletion", machine, max_retries=2)) == RIGHT_CHAT
    pair[0].faults.fail_next(429, b"", {"Retry-After": "1"}, path=MESSAGES)
    result = await litellm.call("acompletion", machine, "anthropic", max_retries=0)
    assert (result["error"], result["status"]) == ("ServiceUnavailableError", 503)
    assert result["headers"]["retry-after"] == "1"


@pytest.mark.parametrize("kind", ["openai", "anthropic"])
async def test_the_router_waits_and_tries_again(machine, pair, litellm, kind: str) -> None:
    path = MESSAGES if kind == "anthropic" else CHAT_PATH
    pair[0].faults.fail_next(503, b"", {"Retry-After": "1"}, path=path)
    began = time.monotonic()
    result = await litellm.call("Router", machine, kind, num_retries=2)
    assert text_of(result) == RIGHT_CHAT and time.monotonic() - began >= 1


async def test_what_cannot_succeed_is_sent_once(machine, pair, litellm) -> None:
    pair[0].faults.fail_next(501, b'{"error": {"message": "not this model"}}', path=CHAT_PATH)
    result = await litellm.call("acompletion", machine, max_retries=2)
    assert (result["error"], result["status"]) == ("APIError", 501) and "not this model" in result["message"]
    await machine.proxy.until_idle()
    assert machine.proxy.services.stats.outcomes == {"client_error": 1}


@pytest.mark.parametrize("kind", ["openai", "anthropic"])
async def test_error_classes(machine, pair, litellm, kind: str) -> None:
    path = MESSAGES if kind == "anthropic" else CHAT_PATH
    raised = {
        400: ("BadRequestError", 400),
        401: ("AuthenticationError", 401),
        500: ("BadGatewayError", 502),
    }
    for status, expected in raised.items():
        pair[0].faults.fail_next(status, json.dumps({"error": {"message": "Not now"}}), path=path)
        result = await litellm.call("acompletion", machine, kind, max_retries=0)
        assert (result["error"], result["status"]) == expected and "Not now" in result["message"], result
    result = await litellm.call("acompletion", machine, kind, model=f"{kind}/other", max_retries=0)
    assert (result["error"], result["status"]) == ("NotFoundError", 404) and "sim-model" in result["message"]


@pytest.mark.parametrize("kind", ["openai", "anthropic"])
async def test_a_stream_that_breaks_raises(machine, pair, litellm, kind: str) -> None:
    pair[1].faults.cut_stream_after(3)
    result = await litellm.call("acompletion", machine, kind, stream=True)
    assert "APIConnectionError" in result["message"]
    assert text_of(result) and RIGHT_CHAT.startswith(text_of(result))


@pytest.mark.settings(alice=["requests_per_minute = 1"])
async def test_limits_of_a_key(keyed, litellm) -> None:
    result = await litellm.call("acompletion", keyed, api_key=key_of("alice"), max_retries=0)
    assert result["headers"]["x-ratelimit-limit-requests"] == "1"
    assert result["headers"]["x-ratelimit-remaining-requests"] == "0"
    result = await litellm.call("acompletion", keyed, api_key=key_of("alice"), max_retries=0)
    assert (result["error"], result["status"]) == ("RateLimitError", 429)
    assert int(result["headers"]["retry-after"]) >= 1
    wrong = await litellm.call("acompletion", keyed, api_key="wrong", max_retries=2)
    assert (wrong["error"], wrong["status"]) == ("AuthenticationError", 401)
