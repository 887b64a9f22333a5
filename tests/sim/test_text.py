"""Tokens and text: reversible, deterministic, and derived from the KV alone."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_sim.frontend import Choice
from disagg_sim.guided import auto_tool_guide, choice_guide, json_guide, parse_tool_call, required_tool_guide
from disagg_sim.request import EngineRequest, Sampling, Token, WorkerError, engine_ids, peer_address
from disagg_sim.text import Answer, Dice, expected_ids, expected_text, seed_of
from disagg_sim.tool_choice import ToolChoice, ToolStream, message_of
from disagg_sim.vocabulary import EOS_ID, VOCAB_SIZE, WORDS, StreamDecoder, decode, encode


@given(st.text())
def test_text_survives_a_round_trip(text: str) -> None:
    assert decode(encode(text)) == text.encode("utf-8", "replace").decode()


@given(st.lists(st.integers(0, VOCAB_SIZE - 1)))
def test_every_id_has_text(ids: list[int]) -> None:
    assert isinstance(decode(ids), str)
    assert all(0 <= number < VOCAB_SIZE for number in encode(decode(ids)))


@given(st.text(max_size=20))
def test_a_stream_of_tokens_is_the_text(text: str) -> None:
    decoder = StreamDecoder()
    out = "".join(decoder.feed(number) for number in encode(text) if number not in (256, 257, 258))
    assert out + decoder.feed(EOS_ID, final=True) == decode(encode(text), skip_special=True)


def test_words_are_one_token_each() -> None:
    assert len(set(WORDS)) == len(WORDS)
    assert all(len(encode(word)) == 1 for word in WORDS)


def test_the_answer_depends_on_every_token_of_the_prompt() -> None:
    texts = {expected_text(prompt, 12) for prompt in ("the sea", "the seb", "The sea", "the sea ", "sea the")}
    assert len(texts) == 5
    assert expected_text("the sea", 12).startswith(expected_text("the sea", 5))
    assert expected_text("the sea", 12) == expected_text(encode("the sea"), 12)


def test_an_answer_ends_by_itself_unless_told_not_to() -> None:
    length = Answer(seed_of(encode("the sea"))).natural_length
    ids = expected_ids("the sea", 1000)
    assert len(ids) == length and ids[-1] == EOS_ID
    assert len(expected_ids("the sea", 1000, ignore_eos=True)) == 1000
    assert EOS_ID not in expected_ids("the sea", length + 5, min_tokens=length + 5)[:-1]


def test_ids_of_children_and_random_suffixes() -> None:
    assert engine_ids("cmpl-x-0", 1, randomize=False) == ["cmpl-x-0"]
    assert engine_ids("cmpl-x-0", 2, randomize=False) == ["0_cmpl-x-0", "1_cmpl-x-0"]
    assert engine_ids("x", 1, randomize=True) != engine_ids("x", 1, randomize=True)


def test_addresses_in_an_id() -> None:
    request_id = "0_cmpl-___prefill_addr_[::1]:21001___decode_addr_host.name:22001_abc-0"
    assert peer_address(request_id, is_prefill=True) == "host.name:22001"
    assert peer_address(request_id, is_prefill=False) == "[::1]:21001"
    with pytest.raises(WorkerError):
        peer_address("cmpl-abc-0", is_prefill=True)


def fed(text: str, **sampling: object) -> tuple[list[str], Choice]:
    choice = Choice(EngineRequest("x", [1], Sampling(max_tokens=99, **sampling), None))  # type: ignore[arg-type]
    deltas = []
    ids = encode(text)
    for position, number in enumerate(ids):
        deltas.append(choice.feed(Token(number, finish_reason="length" if position + 1 == len(ids) else None)).text)
        if choice.ended:
            break
    return deltas, choice


def test_stop_strings_are_held_back_and_cut() -> None:
    deltas, choice = fed("xyabcz", stop=("abc",))
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("xy", "stop", "abc")
    assert "".join(deltas) == "xy"

    deltas, choice = fed("xyabcz", stop=("abc",), include_stop=True)
    assert (choice.text, "".join(deltas)) == ("xyabc", "xyabc")

    deltas, choice = fed("xyab", stop=("abc",))
    assert (choice.text, "".join(deltas), choice.finish_reason) == ("xyab", "xyab", "length")

    _, choice = fed("abcabc", stop=("abc",), min_tokens=4)
    assert choice.text == "abc"


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 3, "maximum": 4},
        "kind": {"enum": ["a", "b"]},
        "on": {"type": "boolean"},
        "list": {"type": "array", "items": {"$ref": "#/$defs/x"}, "minItems": 2},
        "none": {"type": "null"},
        "any": {"anyOf": [{"const": 5}]},
    },
    "$defs": {"x": {"type": "number"}},
}


@given(st.binary(min_size=32, max_size=32))
def test_guided_json_fits_its_schema(seed: bytes) -> None:
    value = json.loads(json_guide(SCHEMA)(Dice(seed)))
    assert value.keys() == SCHEMA["properties"].keys()
    assert isinstance(value["name"], str) and value["age"] in (3, 4) and value["kind"] in ("a", "b")
    assert isinstance(value["on"], bool) and value["none"] is None and value["any"] == 5
    assert len(value["list"]) == 2 and all(isinstance(item, int) for item in value["list"])


def test_a_schema_that_contains_itself_ends() -> None:
    schema = {"type": "object", "properties": {"again": {"$ref": "#"}}}
    assert json.loads(json_guide(schema)(Dice(bytes(32))))


def test_choice() -> None:
    assert choice_guide(["yes"])(Dice(bytes(32))) == "yes"


TOOLS = [{"type": "function", "function": {"name": 'a"b', "parameters": SCHEMA}}]


@pytest.mark.parametrize(("mode", "guide"), [("auto", auto_tool_guide), ("required", required_tool_guide)])
def test_tool_calls_parse_whole_and_in_a_stream(mode: str, guide: object) -> None:
    text = guide(TOOLS)(Dice(bytes(32)))  # type: ignore[operator]
    name, arguments = parse_tool_call(mode, text) or ("", "")
    assert name == 'a"b' and json.loads(arguments).keys() == SCHEMA["properties"].keys()

    choice = ToolChoice.of({"messages": [], "tools": TOOLS, "tool_choice": mode})
    stream = ToolStream(choice)
    deltas = [stream.feed(char, final=False) for char in text]
    deltas.append(stream.feed("", final=True))
    calls = [delta["tool_calls"][0]["function"] for delta in deltas if delta]
    assert calls[0]["name"] == name
    assert "".join(call["arguments"] for call in calls) == arguments


@pytest.mark.parametrize("text", ["plain words", "<tool_", "<tool_call>\nbut then nothing"])
def test_text_that_is_no_call_stays_text(text: str) -> None:
    choice = ToolChoice.of({"messages": [], "tools": TOOLS})
    stream = ToolStream(choice)
    deltas = [stream.feed(char, final=False) for char in text] + [stream.feed("", final=True)]
    assert "".join(delta["content"] for delta in deltas if delta) == text
    message, called = message_of(choice, text)
    assert (message["content"], called) == (text, False)


def test_a_tool_s_result_is_answered_in_words() -> None:
    body = {"messages": [{"role": "tool", "content": "5"}], "tools": TOOLS}
    assert ToolChoice.of(body).guide is None
