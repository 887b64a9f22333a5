"""`usage`: decode's counts, with prefill's figure for the prompt tokens that were really cached."""

from __future__ import annotations

import pytest

from disagg_sim import encode, render_chat

# 90 tokens: a second request finds all but the last, unfinished block of 16 in prefill's cache.
PROMPT = [300 + i for i in range(90)]
MESSAGES = [{"role": "user", "content": "a" * 100}]
BODIES = {
    "/v1/completions": {"prompt": PROMPT, "max_tokens": 5},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 5},
}
LENGTH = {"/v1/completions": 90, "/v1/chat/completions": len(encode(render_chat(MESSAGES)))}
ON = {"enable_prompt_tokens_details": True}


def cached(usage) -> int | None:
    details = usage.get("prompt_tokens_details")
    return details and details["cached_tokens"]


@pytest.mark.parametrize("path", BODIES)
async def test_cached_tokens_are_those_that_prefill_found(machine, path) -> None:
    pair = await machine.pair(**ON)
    for expected in (0, (LENGTH[path] - 1) // 16 * 16):
        _, _, body = await machine.post(path, BODIES[path])
        usage = body["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (LENGTH[path], 5)
        assert usage["total_tokens"] == LENGTH[path] + 5
        assert cached(usage) == expected
    await machine.unharmed(*pair)


@pytest.mark.parametrize("continuous", [False, True], ids=["at the end", "in every chunk"])
@pytest.mark.parametrize("path", BODIES)
async def test_cached_tokens_in_a_stream_however_it_is_cut(machine, path, continuous) -> None:
    pair = await machine.pair(**ON)
    body = {**BODIES[path], "stream_options": {"include_usage": True, "continuous_usage_stats": continuous}}
    all_but_the_last_block = (LENGTH[path] - 1) // 16 * 16
    for expected, sizes in [(0, ()), *((all_but_the_last_block, cut) for cut in [(), (1,), (50,), (7, 300)])]:
        pair[1].faults.split_writes(sizes)
        stream = await machine.stream(path, body)
        usages = [event["usage"] for event in stream if event.get("usage")]
        assert len(usages) == (len(stream) if continuous else 1)
        last = usages[-1]
        assert (last["prompt_tokens"], last["completion_tokens"], cached(last)) == (LENGTH[path], 5, expected), sizes


@pytest.mark.parametrize("path", BODIES)
async def test_no_cached_tokens_where_the_engines_do_not_tell(machine, pair, path) -> None:
    for _ in range(2):
        _, _, body = await machine.post(path, BODIES[path])
        assert body["usage"]["prompt_tokens_details"] is None
        stream = await machine.stream(path, {**BODIES[path], "stream_options": {"include_usage": True}})
        assert cached(stream[-1]["usage"]) is None


async def test_a_stream_without_include_usage_has_none(machine) -> None:
    await machine.pair(**ON)
    stream = await machine.stream("/v1/completions", BODIES["/v1/completions"])
    assert not any(event.get("usage") for event in stream)


async def test_cached_tokens_of_a_forced_tool_call_for_which_prefill_streams(machine) -> None:
    await machine.pair(**ON)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    body = {"messages": MESSAGES, "tools": [tool], "tool_choice": "required"}
    found = [(await machine.post("/v1/chat/completions", body))[2]["usage"] for _ in range(2)]
    assert [cached(usage) for usage in found] == [0, (found[0]["prompt_tokens"] - 1) // 16 * 16]


async def test_text_that_looks_like_usage_is_left_alone(machine) -> None:
    await machine.pair(**ON)
    prompt = '"prompt_tokens_details":{"cached_tokens":7} ' * 3
    _, _, body = await machine.post("/v1/completions", {"prompt": prompt, "echo": True, "max_tokens": 2})
    assert body["choices"][0]["text"].startswith(prompt)
    assert cached(body["usage"]) == 0


VERSIONS = pytest.mark.parametrize(
    ("connector", "version"),
    [
        ("p2p_nccl", "0.21.0"),
        ("disagg_kv", "0.21.0"),
        ("disagg_kv", "0.24.0"),
        ("disagg_kv", "0.33.0"),
    ],
)
"""Of vLLM: their usage differs (docs/engine-behaviour.md)."""


def of_messages(version: str, length: int, read: int, created: int) -> dict[str, int]:
    """What was read from the cache, what was written to it, and the rest of the prompt."""
    if version < "0.24":
        return {"input_tokens": length, "output_tokens": 5}
    created = created if version >= "0.26" else 0
    cache = {"cache_creation_input_tokens": created, "cache_read_input_tokens": read}
    return {"input_tokens": length - read - created, "output_tokens": 5, **cache}


@VERSIONS
@pytest.mark.parametrize("stream", [False, True])
async def test_the_prompt_of_messages_is_split_as_prefill_split_it(
    machine, connector: str, version: str, stream: bool
) -> None:
    pair = await machine.pair(**ON, connector=connector, version=version)
    body = {"model": "sim-model", "messages": MESSAGES, "max_tokens": 5}
    length = LENGTH["/v1/chat/completions"]
    whole_blocks = length // 16 * 16
    for read, cut in ((0, ()), (whole_blocks, ()), (whole_blocks, (50,)), (whole_blocks, (7, 300))):
        pair[1].faults.split_writes(cut)
        if stream:
            found = await machine.stream("/v1/messages", body)
            assert found[0]["message"]["usage"] == {"input_tokens": length, "output_tokens": 0}
            usage = next(event["usage"] for event in found if event["type"] == "message_delta")
        else:
            usage = (await machine.post("/v1/messages", body))[2]["usage"]
        assert usage == of_messages(version, length, read, whole_blocks - read)
    assert machine.proxy.services.stats.prompt_tokens == 4 * length
    await machine.unharmed(*pair)


@VERSIONS
async def test_created_tokens_of_chat_are_those_that_prefill_wrote(machine, connector: str, version: str) -> None:
    await machine.pair(**ON, connector=connector, version=version)
    path = "/v1/chat/completions"
    for read in (0, LENGTH[path] // 16 * 16):
        _, _, body = await machine.post(path, BODIES[path])
        created = {"created_cache_tokens": LENGTH[path] // 16 * 16 - read} if version >= "0.26" else {}
        assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": read, **created}


async def test_usage_of_messages_where_the_engines_do_not_tell(machine, pair) -> None:
    body = {"model": "sim-model", "messages": MESSAGES, "max_tokens": 5}
    _, _, answer = await machine.post("/v1/messages", body)
    assert answer["usage"] == {"input_tokens": LENGTH["/v1/chat/completions"], "output_tokens": 5}
    stream = await machine.stream("/v1/messages", body)
    assert next(event["usage"] for event in stream if event["type"] == "message_delta") == answer["usage"]
