"""What a terminal shows of a view."""

from __future__ import annotations

import re
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from disagg_proxy.cluster.instance import State
from disagg_proxy.page.document import strings
from disagg_proxy.page.verdict import verdict
from disagg_proxy.top.cli import Shown
from disagg_proxy.top.follow import views
from disagg_proxy.top.screen import screen
from disagg_proxy.top.words import Words, count, duration, plain, size
from tests.conftest import soon
from tests.simulated import REQUESTS

PATH = "/v1/completions"
ASK = REQUESTS[PATH]


def shown(view: dict[str, Any], language: str = "en", width: int = 160, **how: Any) -> str:
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(screen(view, Words(language), width=width, **how))
    return captured.get()


async def look(machine) -> dict[str, Any]:
    async for view in views(machine.proxy.url, ""):
        return view
    raise AssertionError("no view")


async def test_a_pair_that_serves(machine, pair) -> None:
    prefill, decode = pair
    await machine.check_right()
    await machine.send(PATH, {**ASK, "model": "nobody"})
    text = shown(await soon(look(machine)))
    assert "● Serving: 1 pair ready" in text
    for role, engine in ("Prefill", prefill), ("Decode", decode):
        assert re.search(rf"{role} {engine.http_address} +● Ready +0 +0 +0 +1 +0 +sim-model", text), text
    assert f"{prefill.http_address} ─▷ {decode.http_address}  0 in flight, 1 in total" in text
    path = f":{prefill.http_address.rpartition(':')[2]} → :{decode.http_address.rpartition(':')[2]}"
    assert re.search(rf"\d\d:\d\d:\d\d +completions +{path} .*█ +\S+ ms +OK", text)
    assert re.search(r"completions +– +\S+ ms +Rejected +model_not_found", text)
    assert "SIMULATED ENGINES: no model runs." in text and "2 finished: 0 failed, 1 client errors" in text
    assert re.search(rf"Ready {decode.http_address} serves sim-model", text)


async def test_the_load_that_engines_show_is_there_where_it_fits(machine, pair) -> None:
    view = await soon(look(machine))
    load = {"running": 12, "waiting": 3, "kv_usage": 0.4567, "kv_capacity_tokens": 310_592, "kv_dropped": 7}
    for instance in view["instances"]:
        instance["engine_load"] = load if instance["role"] == "decode" else None
    text = shown(view)
    assert re.search(r"Run / wait +KV cache +KV dropped +Requests", text), text
    assert re.search(r"Decode \S+ +● Ready +0 +0 +0 +12 / 3 +46 % / 311k +7 +0 +0 +sim-model", text), text
    assert re.search(r"Prefill \S+ +● Ready +0 +0 +0 +– +– +– +0 +0 +sim-model", text), text
    assert "KV cache" not in shown(view, width=140)


async def test_where_elastic_placement_has_requests_prefilled(machine, pair) -> None:
    view = await soon(look(machine))
    assert view["placement"]["mode"] == "split" and "lastic placement" not in shown(view)
    ways = {"split": 3, "decode_alone": 1, "prefill_alone": 0}
    view["placement"] |= {"mode": "elastic", "state": "elastic", "requests": ways}
    assert "Elastic placement: 75 % split, 25 % decode alone, of 4 requests." in shown(view)
    view["placement"]["state"] = "fallback"
    assert "of 4 requests. Its predictions are wrong" in shown(view)
    view["events"] += view["events"] * 20
    for height in range(24, 50):
        text = shown(view, height=height)
        assert len(text.splitlines()) <= height and "Elastic placement" in text


async def test_one_instance_with_both_roles(machine) -> None:
    engine = await machine.engine("decode", connector="disagg_kv", kv_both=True)
    await machine.proxy.until_state(engine.http_address, State.READY)
    text = shown(await soon(look(machine)))
    assert re.search(rf"Prefill \+ Decode {engine.http_address} +● Ready", text), text


async def test_nobody_is_there(machine) -> None:
    text = shown(await soon(look(machine)))
    assert "✕ Not serving: no prefill has registered" in text
    assert "No decode has registered yet." in text and "No requests yet." in text


@pytest.mark.settings(freeze_after_min=0.4, freeze_after_max=0.4, probe_interval=0.1)
async def test_a_frozen_decode_is_named_with_what_was_done(machine, pair) -> None:
    _, decode = pair
    decode.faults.hold("schedule")
    await soon(machine.send(PATH, ASK))
    text = shown(await soon(look(machine)))
    assert re.search(rf"❄ Decode {decode.http_address} is frozen for \d+ s", text)
    assert "Action taken: out of rotation, and one prefill was replayed" in text
    assert "Only a restart can" in text and "new requests get 503" in text
    assert re.search(r"Last incident: .*\(ongoing\): [\d:]+ Frozen → [\d:]+ Replayed → [\d:]+ Needs restart", text)
    assert re.search(rf"Decode {decode.http_address} +❄ Frozen", text)
    decode.faults.release()


async def test_in_chinese(machine, pair) -> None:
    text = shown(await soon(look(machine)), "zh")
    assert "● 服务正常：1 对实例就绪" in text and "● 就绪" in text


async def test_it_fits_the_lines_that_there_are(machine, pair) -> None:
    for _ in range(30):
        await machine.check_right()
    view = await soon(look(machine))
    view["events"] += [{**view["events"][0], "text": "a long text " * 30}] * 40
    view["verdict"]["details"] = [{"key": "detail_waiting", "values": {}}, {"key": "detail_restart", "values": {}}]
    for height in range(22, 50):
        for width in 80, 160:
            found = shown(view, width=width, height=height).splitlines()
            assert height - 1 <= len(found) <= height and found[-1].startswith("q quit"), (height, width)
    assert len(shown(view, height=24).splitlines()) < len(shown(view, height=60).splitlines())


HOST = "engine-with-a-very-long-name.example.internal"


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("host", ["127.0.0.1", HOST])
async def test_80_columns_and_24_lines_show_ports_outcomes_times_events_and_keys(
    machine, pair, language: str, host: str
) -> None:
    await machine.pair()
    for _ in range(6):
        await machine.check_right()
    await machine.send(PATH, {**ASK, "model": "nobody"})
    view = await soon(look(machine))
    for place, instance in enumerate(view["instances"]):
        instance["http_address"] = f"{host}:{instance['http_address'].rpartition(':')[2]}"
        if place and host == HOST:  # Hosts that differ: requests show them too.
            instance["http_address"] = f"x{instance['http_address']}"
    text = shown(view, language, width=80, height=24)
    found = text.splitlines()
    texts = Words(language)
    assert len(found) <= 24 and max(map(cell_len, found)) <= 80
    ports = [i["http_address"].rpartition(":")[2] for i in view["instances"]]
    state = texts.word("state", "ready")
    for port in ports:
        assert re.search(rf"\S+:{port} +● {state} ", text), text
    requests = [line for line in found if re.search(r"\d ms|\d s ", line) and re.match(r"\d\d:\d\d:\d\d", line)]
    assert len(requests) >= 3 and texts.word("outcome", "client_error") in requests[0], text
    for line in requests[1:]:
        assert re.search(r":\d+ → \S*:\d+ +[\d.]+ m?s +" + texts.word("outcome", "ok"), line), line
    assert texts.say("events") in found and f" {state} " in text.partition(texts.say("events"))[2]
    assert found[-1].strip() == texts.say("top_keys")


def with_more_instances(view: dict[str, Any], count: int) -> list[int]:
    """Add instances to a view: one of each bad state, the others ready. Returns all ports."""
    ready = next(i for i in view["instances"] if i["role"] == "decode")
    bad: list[dict[str, Any]] = [
        {"state": "lost", "reason": "no ping for 11 s"}, {"breaker": "open"}, {"suspect": True}, {"busy": True},
    ]  # fmt: skip
    more = [{**ready, **(bad[number] if number < len(bad) else {}), "key": str(number),
             "http_address": f"127.0.0.1:{40000 + number}"} for number in range(count)]  # fmt: skip
    view["instances"] += more
    shown = {**view, "health": {"status": "ok", "pairs": 1, "missing": []}}
    view["verdict"] = verdict(shown)
    return [int(i["http_address"].rpartition(":")[2]) for i in view["instances"]]


async def test_states_of_a_ready_instance_are_shown_with_their_cause(machine, pair) -> None:
    view = await soon(look(machine))
    with_more_instances(view, 4)
    text = shown(view)
    for port, state in (40001, "⊘ Ejected"), (40002, "? Suspect"), (40003, "⧗ Busy"):
        why = strings()["en"][f"why_{state[2:].lower()}"]
        assert re.search(rf"Decode 127.0.0.1:{port} +{re.escape(state)} .*{re.escape(why[:30])}", text), text
        assert re.sub(r"\s+", " ", f"Decode 127.0.0.1:{port}: {state[2:]}. {why}") in re.sub(r"\s+", " ", text)
    health = {"status": "not_serving", "pairs": 1, "missing": ["3 requests wait"]}
    view["verdict"] = verdict({**view, "health": health})
    assert re.search(r"❄ Not serving: requests wait and nothing is answered *\n +3 requests wait\. *\n", shown(view))


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("width", [80, 160])
async def test_many_instances_fit_those_in_need_first_and_all_are_reached_by_scrolling(
    machine, pair, language: str, width: int
) -> None:
    await machine.check_right()
    view = await soon(look(machine))
    ports = with_more_instances(view, 30)
    words = Words(language)
    for height in 24, 40:
        text = shown(view, language, width=width, height=height)
        found = text.splitlines()
        assert height - 1 <= len(found) <= height and found[-1].strip() == words.say("top_keys"), text
        assert re.search(r"127\.0\.0\.1:40000 +✕", text) and words.say("events") in found, text
        named = len(re.findall(r"^(?:Prefill|Decode) 127", text, re.M))
        assert f"\n{words.say('top_more', count=len(ports) - named)}" in text
    keys, seen = Shown(), ""
    assert keys.press(b"i", 24)
    for _ in range(4):
        text = shown(view, language, width=width, height=24, alone="instances", above=keys.limit(view))
        seen += text
        assert len(text.splitlines()) <= 24
        assert keys.press(b"\x1b[6~", 24)
    assert all(f":{port} " in seen for port in ports)


async def test_a_list_alone_scrolls_to_its_oldest_entry(machine, pair) -> None:
    for number in range(40):
        machine.proxy.services.event_log.add_event("replayed", None, f"event {number}.")
    view = await soon(look(machine))
    text = shown(view, width=80, height=24, alone="events")
    assert "event 39." in text and "event 0." not in text and len(text.splitlines()) == 24
    keys = Shown()
    assert keys.press(b"e" + b"\x1b[6~" * 9, 24) and keys.alone == "events"
    above = keys.limit(view)
    assert above == len(view["events"]) - 1, "the oldest one stays visible"
    assert view["events"][0]["text"][:20] in shown(view, width=80, height=24, alone="events", above=above)
    assert keys.press(b"\x1bOA", 24) and keys.limit(view) == above - 1
    assert keys.press(b"r", 24) and (keys.alone, keys.above) == ("requests", 0)
    assert keys.press(b"jk\x1b", 24) and keys.alone == "" and not keys.press(b"Q", 24)


async def test_steps_without_data_are_neither_zero_nor_an_error(machine, pair) -> None:
    await machine.check_right()
    view = await soon(look(machine))
    view["now"] += 5
    assert {step["requests"] is None for step in view["rates"]["steps"]} == {True, False}
    assert "Requests per second" in shown(view)
    view["rates"]["steps"] = view["rates"]["steps"][:50]
    assert re.search(r"Requests per second +– *\n", shown(view))
    assert "–/s" in shown(view, width=80, height=20)


async def test_a_view_that_is_old_says_so(machine, pair) -> None:
    text = shown(await soon(look(machine)), gone="http://proxy does not answer (refused)")
    assert "✕ The proxy does not respond" in text and "refused" in text
    assert re.search(r"The data below is from \d\d:\d\d:\d\d", text) and "Serving" not in text


async def test_names_are_neither_markup_nor_control_characters(machine) -> None:
    name = "[red]x[/red]\x1b[31m\x07[link=http://e]y"
    await machine.pair(models=(name,))
    text = shown(await soon(look(machine)))
    assert "\x1b" not in text and "\x07" not in text
    assert "[red]x[/red] [31m [link=http://e]y" in text


async def test_a_lost_engine_and_one_that_has_gone_are_shown(machine, pair) -> None:
    prefill, decode = pair
    await machine.kill(decode)
    view = await soon(look(machine))
    text = shown(view)
    assert "▲" in text or "✕ Not serving: no decode is ready" in text
    view["instances"] = [i for i in view["instances"] if i["role"] == "prefill"]
    assert decode.http_address in shown(view), "events keep its name"
    assert machine.proxy.instance(prefill.http_address).state is State.READY


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_text_that_is_asked_for_is_there(language: str) -> None:
    from disagg_proxy.page.document import WEB

    sources = "".join((WEB.parents[1] / "top" / name).read_text() for name in ("screen.py", "cli.py", "words.py"))
    asked = set(re.findall(r'say\(\s*"(\w+)"', sources)) - {"head_"}
    assert len(asked) > 20 and asked <= set(strings()[language])


@pytest.mark.parametrize(
    ("environ", "language"),
    [
        ({}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LANG": "de"}, "en"),
    ],
)
def test_the_language_is_the_locales(environ: dict[str, str], language: str) -> None:
    assert Words.of(environ).say("live") == strings()[language]["live"]


def test_numbers() -> None:
    assert [duration(ms) for ms in (None, 0.123, 4.56, 789.0, 1234, 45678)] == [
        "–", "0.12 ms", "4.6 ms", "789 ms", "1.23 s", "45.7 s",
    ]  # fmt: skip
    assert [size(n) for n in (0, 999, 1500, 2.5e9)] == ["0 B", "999 B", "1.5 KB", "2.5 GB"]
    assert count(1234567) == "1,234,567" and plain("a\nb\x1b[0m") == "a b [0m"
    ages = [Words().age(s) for s in (0, 59, 60, 3700, 90_000)]
    assert ages == ["0 s", "59 s", "1 min", "1 h 1 min", "1 d 1 h"]
