"""What vLLM 0.21's source says and no measurement has shown yet: hazards of the second rank."""

from __future__ import annotations

import asyncio
import json

import pytest

from disagg_sim import encode, expected_text, render_chat

from .pair import CHAT, COMPLETIONS, MESSAGES, Pair, cancelled, running

MESSAGE = [{"role": "user", "content": "How deep is the sea?"}]
TOOL = {"name": "depth", "input_schema": {"type": "object", "properties": {"metres": {"type": "integer"}}}}


async def test_an_id_that_is_still_running_kills_when_it_comes_again(pair: Pair) -> None:
    request_id = pair.new_id()
    body = {"prompt": "the sea", "max_tokens": 50}
    await pair.prefill(COMPLETIONS, body, request_id)
    pair.d.faults.hold("schedule", after=2)
    first = asyncio.create_task(pair.post(pair.d, COMPLETIONS, body, request_id))
    await pair.d.wait_until(lambda s: s["held_at"] == "schedule")
    second = asyncio.create_task(pair.post(pair.d, COMPLETIONS, body, request_id))
    await pair.d.wait_until(lambda s: s["waiting"] == 1)
    pair.d.faults.release()
    assert [(await first).status, (await second).status] == [500, 500]
    assert "duplicate request id" in pair.d.state()["dead"]


async def test_decode_needs_no_addresses_for_a_prompt_of_one_token(pair: Pair) -> None:
    answer = await pair.post(pair.d, COMPLETIONS, {"prompt": [42], "max_tokens": 3})
    assert answer.json["choices"][0]["text"] == expected_text([42], 3)
    assert pair.d.state()["dead"] is None
    assert (await pair.post(pair.p, COMPLETIONS, {"prompt": [42], "max_tokens": 1})).status == 500


async def test_a_dead_engine_ends_its_pings_and_its_kv_port(pair: Pair) -> None:
    await pair.post(pair.d, COMPLETIONS, {"prompt": "a b"})
    await pair.d.wait_until(lambda s: s["worker_gone"])
    host, port = pair.d.kv_address.split(":")
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(host, int(port))


async def test_the_server_of_a_dead_engine_ends() -> None:
    async with running(prefill={"exit_after_death_seconds": 0.0}) as pair:
        assert (await pair.post(pair.p, COMPLETIONS, {"prompt": "a b", "max_tokens": 1})).status == 500
        await pair.p.wait_exited()
        with pytest.raises(OSError):
            await pair.get(pair.p, "/health")


async def test_a_length_that_only_decode_refuses_leaves_an_orphan(pair: Pair) -> None:
    limit = pair.d.config.max_model_len
    prefill, decode = await pair.both(COMPLETIONS, {"prompt": "the sea", "max_tokens": limit})
    assert (prefill.status, decode.status) == (200, 400)
    assert "maximum context length" in decode.json["error"]["message"]
    state = await pair.d.wait_until(lambda s: s["kv_received"] == 4)
    assert len(state["kv_waiting"]) == 1


async def test_truncation_to_the_rest_of_the_context_depends_on_max_tokens() -> None:
    knobs = {"max_model_len": 64}
    async with running(prefill=knobs, decode=knobs) as pair:
        body = {"prompt": list(range(100)), "max_tokens": 20, "truncate_prompt_tokens": -1}
        prefill, decode = await pair.both(COMPLETIONS, body)
        assert (prefill.json["usage"]["prompt_tokens"], decode.json["usage"]["prompt_tokens"]) == (63, 44)
        assert set(decode.json["choices"][0]["text"]) == set(" ▓▒░")


async def test_kv_of_another_prompt_gives_another_text(pair: Pair) -> None:
    request_id = pair.new_id()
    await pair.prefill(COMPLETIONS, {"prompt": "the mountain"}, request_id)
    wrong = await pair.post(pair.d, COMPLETIONS, {"prompt": "the mountaix", "max_tokens": 5}, request_id)
    assert wrong.json["choices"][0]["text"] == expected_text("the mountain", 5)

    request_id = pair.new_id()
    await pair.prefill(COMPLETIONS, {"prompt": "the mountain"}, request_id)
    longer = await pair.post(pair.d, COMPLETIONS, {"prompt": "the mountains", "max_tokens": 5}, request_id)
    assert set(longer.json["choices"][0]["text"]) == set(" ▓▒░")


async def test_on_v1_messages_a_raised_error_is_a_500(pair: Pair) -> None:
    limit = pair.p.config.max_model_len
    body = {"model": "sim-model", "messages": MESSAGE, "max_tokens": limit}
    answer = await pair.post(pair.p, MESSAGES, body, pair.new_id())
    assert answer.status == 500
    assert answer.json["error"]["type"] == "internal_error"
    assert pair.p.state()["dead"] is None


async def test_on_v1_messages_a_named_tool_cut_at_one_token_is_a_500_after_the_kv_was_sent(pair: Pair) -> None:
    body = {"model": "sim-model", "messages": MESSAGE, "max_tokens": 90, "tools": [TOOL]}
    named = {**body, "tool_choice": {"type": "tool", "name": "depth"}}
    request_id = pair.new_id()
    answer = await pair.prefill(MESSAGES, named, request_id)
    assert (answer.status, answer.json["error"]["type"]) == (500, "internal_error")
    await pair.p.wait_until(lambda s: s["kv_sent"] == 4)
    decode = await pair.post(pair.d, MESSAGES, named, request_id)
    assert decode.json["content"][0]["input"].keys() == {"metres"}

    # A stream converts piece by piece and never parses the arguments.
    prefill = await pair.prefill(MESSAGES, named, pair.new_id(), stream=True)
    assert prefill.status == 200 and "message_stop" in prefill.text


async def test_a_decode_aborted_before_its_first_step_stays_in_the_buffer_s_count(pair: Pair) -> None:
    request_id = pair.new_id()
    body = {"prompt": "the sea", "max_tokens": 5}
    await pair.prefill(COMPLETIONS, body, request_id)
    used = (await pair.d.wait_until(lambda s: s["kv_received"] == 4))["kv_buffer_used"]
    with pair.d.faults.held("schedule"):
        leg = asyncio.create_task(pair.post(pair.d, COMPLETIONS, body, request_id))
        await pair.d.wait_until(lambda s: s["held_at"] == "schedule")
        await cancelled(leg)
        await pair.d.wait_until(lambda s: s["aborting"] == 1)
    state = await pair.d.wait_until(lambda s: s["aborted"] == 1)
    assert (state["kv_waiting"], state["kv_buffer_used"]) == ({}, used)


async def test_a_long_prompt_is_prefilled_in_chunks_and_sent_after_the_last() -> None:
    async with running(prefill={"max_num_batched_tokens": 10}) as pair:
        body = {"prompt": [7] * 35, "max_tokens": 3}
        request_id = pair.new_id()
        pair.p.faults.hold("schedule", after=3)
        leg = asyncio.create_task(pair.prefill(COMPLETIONS, body, request_id))
        state = await pair.p.wait_until(lambda s: s["held_at"] == "schedule")
        assert (state["steps"], state["kv_sent"]) == (3, 0)
        pair.p.faults.release()
        assert (await leg).status == 200
        assert pair.p.state()["steps"] == 4
        answer = await pair.post(pair.d, COMPLETIONS, body, request_id)
        assert answer.json["choices"][0]["text"] == expected_text([7] * 35, 3)


async def test_a_prefill_cancelled_between_two_chunks_is_never_sent() -> None:
    async with running(prefill={"max_num_batched_tokens": 10}) as pair:
        pair.p.faults.hold("schedule", after=2)
        leg = asyncio.create_task(pair.prefill(COMPLETIONS, {"prompt": [7] * 35}, pair.new_id()))
        await pair.p.wait_until(lambda s: s["held_at"] == "schedule")
        await cancelled(leg)
        await pair.p.wait_until(lambda s: s["aborting"] == 1)
        pair.p.faults.release()
        state = await pair.p.wait_until(lambda s: s["aborted"] == 1)
        assert (state["kv_sent"], state["running"]) == (0, 0)


async def test_beam_search_makes_ids_that_only_one_engine_knows(pair: Pair) -> None:
    body = {"prompt": "the sea", "max_tokens": 3, "n": 2, "use_beam_search": True}
    request_id = pair.new_id()
    prefill = await pair.prefill(COMPLETIONS, body, request_id)
    assert (prefill.status, len(prefill.json["choices"])) == (200, 2)
    victim = asyncio.create_task(pair.post(pair.d, COMPLETIONS, body, request_id))
    state = await pair.d.wait_until(lambda s: s["stalled_on"] is not None)
    assert state["stalled_on"].endswith("-beam-0")
    assert state["stalled_on"] not in state["kv_waiting"]
    await cancelled(victim)


async def test_chat_fields_that_change_the_prompt_change_the_kv(pair: Pair) -> None:
    body = {"messages": MESSAGE, "max_tokens": 4, "chat_template_kwargs": {"enable_thinking": False}}
    request_id = pair.new_id()
    lost = {key: value for key, value in body.items() if key != "chat_template_kwargs"}
    await pair.prefill(CHAT, lost, request_id)
    answer = await pair.post(pair.d, CHAT, body, request_id)
    assert set(answer.json["choices"][0]["message"]["content"]) == set(" ▓▒░")


async def test_a_cached_prefix_is_reported_by_prefill_and_all_kv_by_decode() -> None:
    """Up to 0.23 ``cached_tokens`` is missing where it would be 0."""
    knobs = {"enable_prompt_tokens_details": True}
    async with running(prefill=knobs, decode=knobs) as pair:
        prompt = [7] * 40
        first, decode = await pair.both(COMPLETIONS, {"prompt": prompt, "max_tokens": 2})
        assert first.json["usage"]["prompt_tokens_details"] is None
        assert decode.json["usage"]["prompt_tokens_details"] == {"cached_tokens": 39}
        again, _ = await pair.both(COMPLETIONS, {"prompt": prompt, "max_tokens": 2})
        assert again.json["usage"]["prompt_tokens_details"] == {"cached_tokens": 32}
        stream = {"prompt": prompt, "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}
        _, streamed = await pair.both(COMPLETIONS, stream)
        assert streamed.events[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 39}


async def test_padding_really_travels() -> None:
    async with running(prefill={"kv_wire_bytes_per_token": 10_000}) as pair:
        assert await pair.ask("the sea") == expected_text("the sea", 8)


async def test_tokenize_of_messages_is_the_prompt_of_chat(pair: Pair) -> None:
    answer = await pair.post(pair.d, "/tokenize", {"messages": MESSAGE})
    assert answer.json["tokens"] == encode(render_chat(MESSAGE))
    assert json.loads(answer.text)["count"] == len(answer.json["tokens"])
