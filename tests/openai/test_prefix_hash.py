"""Beginnings of prompts: the same as far as the prompts are the same, whatever the route; never an error."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_proxy.openai.fields import CHAT, COMPLETIONS, MESSAGES, ROUTES, Route
from disagg_proxy.openai.prefix_hash import ENDS, MAX_BYTES, NO_AFFINITY, Affinity, AffinityNeeds, affinity
from disagg_proxy.openai.prepare import prepare

PREFIX = AffinityNeeds(prefix=True)
TEXT = "".join(f"{n} and then " for n in range(8000))


def look(route: Route, **body: Any) -> Affinity:
    return affinity(route, {"model": "m", **body}, PREFIX)


def common(one: Affinity, other: Affinity) -> int:
    """How many names two prompts have in common; all of them stand at the beginning."""
    shared = len(set(one.prefix) & set(other.prefix))
    assert one.prefix[:shared] == other.prefix[:shared]
    return shared


def said(*texts: str) -> list[dict[str, str]]:
    return [{"role": "user" if at % 2 == 0 else "assistant", "content": text} for at, text in enumerate(texts)]


@given(st.integers(0, MAX_BYTES + 9000), st.integers(0, 9000))
def test_texts_have_in_common_what_is_the_same(same: int, rest: int) -> None:
    one = look(COMPLETIONS, prompt=TEXT[:same] + "x" * rest)
    other = look(COMPLETIONS, prompt=TEXT[:same] + "y" * rest)
    whole = sum(end <= same for end in ENDS)
    assert common(one, other) == (whole if rest else len(one.prefix))
    assert len(one.prefix) == sum(end <= same + rest for end in ENDS) and one.size == same + rest


def test_token_ids_have_in_common_what_is_the_same() -> None:
    ids = list(range(5, 3005))
    one, other = look(COMPLETIONS, prompt=ids), look(COMPLETIONS, prompt=ids[:1500] + [1] * 1500)
    assert common(one, other) == sum(end <= 1500 * 4 for end in ENDS) and one.size == 12000
    assert look(COMPLETIONS, prompt=[ids, ids[:10]]).prefix == one.prefix


def test_a_conversation_goes_on_from_its_beginning() -> None:
    turns = [TEXT[at * 700 : (at + 1) * 700] for at in range(8)]
    before: Affinity | None = None
    for count in (1, 3, 5, 7):
        now = look(CHAT, messages=[{"role": "system", "content": TEXT[:3000]}, *said(*turns[:count])])
        if before is not None:
            assert now.prefix[: len(before.prefix)] == before.prefix and now.home == before.home
            assert len(now.prefix) > len(before.prefix)
        before = now
    other = look(CHAT, messages=[{"role": "system", "content": TEXT[:3000]}, *said("something else")])
    assert before is not None and other.home != before.home
    assert common(before, other) == sum(end <= 3000 for end in ENDS)


BILLING = "x-anthropic-billing-header: cc_version=2.1.{0}; cch={0};"


@pytest.mark.parametrize("route", [CHAT, MESSAGES])
@pytest.mark.parametrize("joined", [False, True])
def test_a_billing_header_is_no_part_of_the_prompt(route: Route, joined: bool) -> None:
    """Claude Code's first system block changes with every request; vLLM 0.32 does not render it."""

    def turn(number: int, *texts: str) -> Affinity:
        blocks = [BILLING.format(number), TEXT[:2000]]
        # A gateway that translates to chat may join the blocks.
        system = [{"type": "text", "text": text} for text in ([f"{blocks[0]}\n{blocks[1]}"] if joined else blocks)]
        if route is MESSAGES:
            return look(route, system=system, messages=said(*texts))
        content: Any = system[0]["text"] if joined else system
        return look(route, messages=[{"role": "system", "content": content}, *said(*texts)])

    first, second = turn(1, TEXT[:600]), turn(2, TEXT[:600], "ok", "go on")
    if joined and route is MESSAGES:
        # There the whole block is left out, whatever follows.
        assert first.size < 800
    assert common(first, second) == len(first.prefix) > 0 and first.home == second.home
    assert look(route, messages=[{"role": "user", "content": BILLING.format(1) + TEXT[:600]}]).size > 600


def test_the_mark_of_what_to_cache_is_no_part_of_the_prompt() -> None:
    def turns(*marked: bool) -> Affinity:
        results = []
        for number, mark in enumerate(marked):
            part = {"type": "tool_result", "tool_use_id": f"t{number}", "content": TEXT[:600]}
            if mark:
                part["cache_control"] = {"type": "ephemeral"}  # type: ignore[assignment]
            results.append({"role": "user", "content": [part]})
        return look(MESSAGES, messages=results)

    before, after = turns(False, True), turns(False, False, True)
    assert common(before, after) == len(before.prefix) > 4


def test_chat_and_messages_with_the_same_prompt_are_the_same() -> None:
    talk = said(TEXT[:900], TEXT[:400], "and?")
    chat = look(CHAT, messages=[{"role": "system", "content": TEXT[:1500]}, *talk])
    messages = look(MESSAGES, system=TEXT[:1500], messages=talk)
    blocks = look(MESSAGES, system=[{"type": "text", "text": TEXT[:1500]}], messages=talk)
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in talk]
    in_parts = look(CHAT, messages=[{"role": "system", "content": TEXT[:1500]}, *parts])
    assert chat.prefix and chat.prefix == messages.prefix == blocks.prefix == in_parts.prefix


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"cache_salt": "s"},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_stands_in_front_or_keeps_caches_apart_changes_everything(change: dict[str, Any]) -> None:
    plain = look(CHAT, messages=said(TEXT[:5000]))
    assert common(plain, look(CHAT, messages=said(TEXT[:5000]), **change)) == 0


def test_a_part_that_is_no_text_counts() -> None:
    def picture(url: str) -> Affinity:
        image = {"type": "image_url", "image_url": {"url": url}}
        return look(CHAT, messages=[{"role": "user", "content": [image, {"type": "text", "text": TEXT[:900]}]}])

    assert common(picture("data:one"), picture("data:two")) == 0
    assert picture("data:one") == picture("data:one")


def test_equal_values_have_equal_names_whatever_objects_hold_them() -> None:
    raw = json.dumps({"model": "m", "tools": [{"a": "x" * 300, "b": "x" * 300}], "messages": said("hi", "x" * 300)})
    body = json.loads(raw)
    shared = {"a": (text := "x" * 300), "b": text}
    assert affinity(CHAT, body, PREFIX) == look(CHAT, tools=[shared], messages=said("hi", "x" * 300))


def test_every_process_gives_the_same_names() -> None:
    code = (
        "from tests.openai.test_prefix_hash import *; print(repr((look(CHAT, messages=said(TEXT[:5000])),"
        " look(COMPLETIONS, prompt=list(range(900))))))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.dialect)
@given(data=st.data())
def test_nothing_that_is_json_is_an_error(route: Route, data: st.DataObject) -> None:
    names = ("prompt", "messages", "system", "tools", "user", "metadata", "model", "cache_salt")
    body = {name: data.draw(json_values) for name in names}
    if data.draw(st.booleans()):
        message = st.fixed_dictionaries({"role": json_values, "content": json_values}) | json_values
        body["messages"] = data.draw(st.lists(message, max_size=3))
    found = affinity(route, body, AffinityNeeds(prefix=True, session=True))
    assert found == affinity(route, json.loads(json.dumps(body)), AffinityNeeds(prefix=True, session=True))


def test_lone_surrogates_are_text() -> None:
    assert look(COMPLETIONS, prompt="\ud800" * 600).prefix


def test_the_client_names_itself_where_its_api_says() -> None:
    wanted = AffinityNeeds(session=True)
    chat = affinity(CHAT, {"user": "ann"}, wanted)
    assert chat.user is not None and chat.prefix == ()
    assert affinity(MESSAGES, {"metadata": {"user_id": "ann"}}, wanted) == chat
    assert affinity(COMPLETIONS, {"user": "bob"}, wanted).user not in (None, chat.user)
    for body in ({}, {"user": ""}, {"user": 5}, {"user": None}):
        assert affinity(CHAT, body, wanted) is NO_AFFINITY


def test_nothing_is_looked_at_unless_asked_for() -> None:
    body = {"model": "m", "user": "ann", "messages": said(TEXT[:900])}
    assert affinity(CHAT, body, AffinityNeeds()) is NO_AFFINITY
    raw = json.dumps(body).encode()
    assert prepare(CHAT, raw).affinity is NO_AFFINITY
    assert prepare(CHAT, raw, PREFIX).affinity == affinity(CHAT, body, PREFIX)
