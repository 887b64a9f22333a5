"""Tools and structured outputs: the same prompt on both legs, and prefill's cut-off token is no error."""

from __future__ import annotations

import json

import pytest

from disagg_sim import expected_text, render_chat
from disagg_sim.guided import json_guide, named_tool_guide, required_tool_guide
from tests.simulated import CHAT, text_of, text_of_events

PATH = "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": SCHEMA}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
RENDERED = render_chat(CHAT, tools=[TOOL])
ARGUMENTS = {
    "named": expected_text(RENDERED, 500, guide=named_tool_guide(TOOL)),
    "required": json.dumps(
        json.loads(expected_text(RENDERED, 500, guide=required_tool_guide([TOOL])))[0]["parameters"]
    ),
}

forced = pytest.mark.parametrize("kind", ["named", "required"])
streamed = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


def chat(kind: str, **more) -> dict:
    choice = {"named": NAMED, "required": "required"}.get(kind, kind)
    return {"messages": CHAT, "tools": [TOOL], "tool_choice": choice, **more}


async def call_of(machine, body, stream: bool) -> tuple[str, dict, str]:
    """Name, arguments and finish reason of the call in the answer."""
    if not stream:
        status, _, answer = await machine.post(PATH, body)
        assert status == 200, answer
        [call] = answer["choices"][0]["message"]["tool_calls"]
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        return name, json.loads(arguments), answer["choices"][0]["finish_reason"]
    name = arguments = reason = ""
    for event in await machine.stream(PATH, body):
        for choice in event["choices"]:
            reason = choice["finish_reason"] or reason
            for call in choice["delta"].get("tool_calls", ()):
                name += call["function"].get("name", "")
                arguments += call["function"]["arguments"]
    return name, json.loads(arguments), reason


@streamed
@forced
async def test_a_forced_tool_call(machine, pair, kind, stream) -> None:
    reason = "stop" if kind == "named" else "tool_calls"
    found = await call_of(machine, chat(kind), stream)
    assert found == ("get_weather", json.loads(ARGUMENTS[kind]), reason)
    await machine.unharmed(*pair)


@streamed
async def test_an_automatic_tool_call(machine, pair, stream) -> None:
    name, arguments, reason = await call_of(machine, chat("auto"), stream)
    assert (name, arguments.keys(), reason) == ("get_weather", {"city", "days"}, "tool_calls")
    await machine.unharmed(*pair)


@forced
async def test_prefill_streams_a_forced_call_and_decode_gets_the_original(machine, pair, kind) -> None:
    await machine.post(PATH, chat(kind))
    got = pair[0].received(PATH)[0].json
    assert (got["stream"], got["stream_options"], got["max_tokens"]) == (True, {"include_usage": True}, 1)
    assert got["tool_choice"] == chat(kind)["tool_choice"] and got["tools"] == [TOOL]
    assert pair[1].received(PATH)[0].json == chat(kind)


@pytest.mark.parametrize("choice", ["auto", "none"])
async def test_prefill_does_not_stream_an_unforced_call(machine, pair, choice) -> None:
    status, _, _ = await machine.post(PATH, chat(choice, max_tokens=200))
    assert status == 200
    got = pair[0].received(PATH)[0].json
    assert got["stream"] is False and "stream_options" not in got and got["tool_choice"] == choice


async def test_several_choices_of_a_forced_call(machine, pair) -> None:
    _, _, answer = await machine.post(PATH, chat("required", n=3))
    assert [len(choice["message"]["tool_calls"]) for choice in answer["choices"]] == [1, 1, 1]
    await machine.unharmed(*pair)


async def test_a_result_is_answered_in_words(machine, pair) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
    messages = [
        *CHAT,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "Sunny"},
    ]
    _, _, answer = await machine.post(PATH, {"messages": messages, "tools": [TOOL], "max_tokens": 9})
    assert text_of(answer) == expected_text(render_chat(messages, tools=[TOOL]), 9)


@pytest.mark.parametrize(
    "body",
    [
        chat("required", tools=[]),
        {"messages": CHAT, "tool_choice": "required"},
        {"messages": CHAT, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}},
        {"messages": CHAT, "tools": [TOOL], "tool_choice": "sometimes"},
    ],
)
async def test_what_prefill_refuses_is_the_answer_and_decode_is_not_asked(machine, pair, body) -> None:
    status, headers, answer = await machine.post(PATH, body)
    assert (status, headers["Content-Type"]) == (400, "application/json") and answer["error"]["message"]
    assert len(pair[0].received(PATH)) == 1 and not pair[1].received(PATH)
    await machine.unharmed(*pair)


async def test_an_error_event_of_prefill_is_a_plain_refusal(machine, pair) -> None:
    event = (
        b'data: {"error":{"message":"No grammar","type":"BadRequestError","param":null,"code":422}}\n\ndata: [DONE]\n\n'
    )
    pair[0].faults.fail_next(200, event, {"Content-Type": "text/event-stream; charset=utf-8"}, path=PATH)
    status, headers, answer = await machine.post(PATH, chat("required"))
    assert (status, headers["Content-Type"]) == (422, "application/json")
    assert answer["error"]["message"] == "No grammar" and not pair[1].received(PATH)


@streamed
@pytest.mark.parametrize(
    "form",
    [{"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}],
    ids=["object", "schema"],
)
async def test_json_answers(machine, pair, form, stream) -> None:
    body = {"messages": CHAT, "response_format": form}
    text = text_of_events(await machine.stream(PATH, body)) if stream else text_of((await machine.post(PATH, body))[2])
    schema = form.get("json_schema", {}).get("schema")
    assert text == expected_text(render_chat(CHAT), 500, guide=json_guide(schema))
    assert json.loads(text).keys() == ({"city", "days"} if schema else {"answer"})
    assert pair[0].received(PATH)[0].json["response_format"] == form
    await machine.unharmed(*pair)


async def test_structured_outputs_of_a_completion(machine, pair) -> None:
    body = {"prompt": "Yes or no?", "structured_outputs": {"choice": ["yes", "no"]}, "max_tokens": 20}
    _, _, answer = await machine.post("/v1/completions", body)
    assert text_of(answer) in ("yes", "no")
    await machine.unharmed(*pair)


MESSAGES = {
    "model": "sim-model",
    "messages": CHAT,
    "max_tokens": 500,
    "tools": [{"name": "get_weather", "description": "d", "input_schema": SCHEMA}],
}


@streamed
@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}, {"type": "auto"}])
async def test_tools_of_messages(machine, pair, choice, stream) -> None:
    body = {**MESSAGES, "tool_choice": choice}
    if stream:
        found = await machine.stream("/v1/messages", body)
        [block] = [event["content_block"] for event in found if event["type"] == "content_block_start"]
        pieces = [event["delta"].get("partial_json", "") for event in found if event["type"] == "content_block_delta"]
        block["input"] = json.loads("".join(pieces))
    else:
        status, _, answer = await machine.post("/v1/messages", body)
        assert status == 200, answer
        [block] = answer["content"]
    assert (block["type"], block["name"], block["input"].keys()) == ("tool_use", "get_weather", {"city", "days"})
    assert pair[0].received("/v1/messages")[0].json["stream"] is (choice["type"] != "auto")
    await machine.unharmed(*pair)


async def test_a_call_that_max_tokens_cuts_off_fails_on_decode_without_a_second_decode(machine, pair) -> None:
    """vLLM cannot parse it after generating it: a 500 after the KV was used, where a drain would hang the engine."""
    body = {**MESSAGES, "tool_choice": {"type": "tool", "name": "get_weather"}, "max_tokens": 3}
    status, _, answer = await machine.post("/v1/messages", body)
    assert (status, answer["error"]["type"]) == (502, "upstream_error")
    assert len(pair[1].received("/v1/messages")) == 1
    await machine.unharmed(*pair)
