"""What the page says of whether it works: every verdict, what was done, and where an incident begins and ends."""

from __future__ import annotations

import re
from typing import Any

import pytest

from disagg_proxy.page.document import WEB, strings
from disagg_proxy.page.verdict import KEPT_FROM, incident, verdict


def instance(role: str, state: str = "ready", **more: Any) -> dict[str, Any]:
    name = more.pop("name", role)
    return {
        "key": name, "http_address": f"{name}:1", "role": role, "state": state, "reason": f"why it is {state}",
        "draining": False, "restart_wanted": False, "breaker": "closed", "suspect": False, "busy": False, **more,
    }  # fmt: skip


def view(
    *instances: dict[str, Any], pairs: int = 0, status: str = "", events: str = "", able: dict[str, int] | None = None
) -> dict[str, Any]:
    """``events``: "decode frozen, decode replayed 2", one second after the other."""
    told = [line.split() for line in events.split(", ") if line]
    return {
        "instances": list(instances),
        "health": {
            "pairs": pairs,
            "status": status or ("ok" if pairs else "unavailable"),
            "missing": ["3 requests wait"],
            **{role: {"ready": (able or {}).get(role, 1)} for role in ("prefill", "decode")},
        },
        "events": [
            {"seq": at, "time": at, "instance": key, "kind": kind, "text": "", "count": int(count[0]) if count else 1}
            for at, (key, kind, *count) in enumerate(told)
        ],
    }


def said(shown: dict[str, Any], language: str = "en") -> list[str]:
    """The sentences, as the page says them."""
    texts = strings()[language]
    lines = []
    for sentence in (shown["head"], *shown["details"]):
        values = {
            name: texts[f"{name}_{value}"] if name in ("role", "state", "why") else value
            for name, value in sentence["values"].items()
        }
        lines.append(texts[sentence["key"]].format(**values))
    return lines


P, D = instance("prefill"), instance("decode")
SUSPECT, BUSY = instance("decode", suspect=True, name="s"), instance("decode", busy=True, name="b")
EJECTED = instance("decode", breaker="open", name="e")

CASES = [
    (view(P, D, pairs=1), "ok", ["Serving: 1 pair ready"]),
    (view(P, D, D, pairs=2), "ok", ["Serving: 2 pairs ready"]),
    (view(P, D, pairs=1, status="stopping"), "warn", ["The proxy is shutting down"]),
    (view(), "bad", ["Not serving: no prefill has registered"]),
    (view(P), "bad", ["Not serving: no decode has registered"]),
    (
        view(P, instance("decode", "lost")),
        "bad",
        ["Not serving: no decode is ready", "Decode decode:1: Lost. why it is lost"],
    ),
    (view(P, D), "bad", ["Not serving: no prefill and decode can exchange KV"]),
    (view(D, status="ok"), "warn", ["Serving without prefill: decode computes the prompts"]),
    (
        view(P, D, instance("decode", draining=True, name="other"), pairs=1),
        "warn",
        ["Serving: 1 pair ready, but some instances are not", "Decode other:1: Drained. why it is ready"],
    ),
    (
        view(P, D, SUSPECT, pairs=2),
        "warn",
        ["Serving: 2 pairs ready, but some instances may be stalled", "Decode s:1: Suspect. {why_suspect}"],
    ),
    (
        view(P, D, SUSPECT, BUSY, EJECTED, pairs=2),
        "warn",
        [
            "Serving: 2 pairs ready, but some instances are not",
            "Decode s:1: Suspect. {why_suspect}", "Decode b:1: Busy. {why_busy}", "Decode e:1: Ejected. {why_ejected}",
        ],
    ),
    (
        view(P, BUSY),
        "warn",
        ["Saturated: every decode is busy, requests may get 503", "Decode b:1: Busy. {why_busy}"],
    ),
    (
        view(P, BUSY, EJECTED, able={"prefill": 1, "decode": 0}),
        "bad",
        [
            "Not serving: every decode keeps failing or is busy",
            "Decode b:1: Busy. {why_busy}", "Decode e:1: Ejected. {why_ejected}",
        ],
    ),
    (
        view(P, SUSPECT, instance("decode", "frozen"), pairs=1, status="not_serving"),
        "bad",
        [
            "Not serving: requests wait and nothing is answered", "3 requests wait.",
            "Decode s:1: Suspect. {why_suspect}", "Decode decode:1: Frozen. why it is frozen",
        ],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("shown", "level", "lines"), CASES)
def test_what_is_said(shown: dict[str, Any], level: str, lines: list[str]) -> None:
    found = verdict(shown)
    lines = [line.format(**strings()["en"]) for line in lines]
    assert (found["level"], said(found), found["since"]) == (level, lines, None)
    assert said(found, "zh")


FROZEN = instance("decode", "frozen")
GIVEN_UP = instance("decode", "frozen", restart_wanted=True)
ONLY_OUT = "Action taken: out of rotation, no new requests are sent to it."
TRYING = "The proxy is still trying to recover it."


@pytest.mark.parametrize(
    ("shown", "done"),
    [
        (view(P, FROZEN, events="decode admitted, decode frozen"), [ONLY_OUT, TRYING]),
        (view(P, FROZEN, events="decode admitted, decode frozen, other replayed 3"), [ONLY_OUT, TRYING]),
        (view(P, FROZEN, events="x lost, decode frozen, decode replayed"), ["one prefill was replayed", TRYING]),
        (
            view(P, FROZEN, events="x lost, decode frozen, decode replayed 2"),
            ["2 prefills were replayed", TRYING],
        ),
        (
            view(P, GIVEN_UP, events="decode replayed 7, decode frozen, decode replayed 2, decode restart_wanted"),
            ["2 prefills were replayed", "Only a restart can"],
        ),
    ],
)
def test_a_frozen_decode_is_named_with_what_was_done(shown: dict[str, Any], done: list[str]) -> None:
    found = verdict(shown)
    assert (found["level"], found["sign"], found["since"]) == ("bad", "frozen", 1)
    head, why, *rest, others = said(found)
    assert head == "Decode decode:1 is frozen"
    assert why == "Decode decode:1: why it is frozen."
    assert len(rest) == len(done) and all(part in line for part, line in zip(done, rest, strict=True))
    assert others == "There is no other pair: new requests get 503 until it recovers."


def test_who_goes_on_while_one_is_frozen() -> None:
    found = verdict(view(P, D, FROZEN, pairs=1, events="decode frozen"))
    assert found["level"] == "warn" and said(found)[-1] == "Requests continue on the other pair."
    found = verdict(view(P, D, FROZEN, pairs=2))
    assert said(found)[-1] == "Requests continue on the other 2 pairs." and found["since"] is None
    found = verdict(view(FROZEN, instance("prefill", "frozen"), events="prefill frozen, decode frozen"))
    assert said(found)[0] == "2 engines are frozen" and found["since"] == 0
    found = verdict(view(P, D, FROZEN, BUSY, instance("decode", "lost"), pairs=1))
    assert [line.split(". ")[0] for line in said(found)[-2:]] == ["Decode b:1: Busy", "Decode decode:1: Lost"]


@pytest.mark.parametrize(
    ("events", "steps", "over_after"),
    [
        ("decode admitted", None, None),
        ("decode admitted, decode frozen", ["frozen"], None),
        (
            "decode frozen, decode replayed, decode freed, decode admitted",
            ["frozen", "replayed", "freed", "admitted"],
            3,
        ),
        ("decode frozen, prefill lost, decode restart_wanted", ["frozen", "restart_wanted"], None),
        ("decode lost, decode admitted, decode frozen, decode freed", ["frozen", "freed"], None),
        ("decode frozen, decode admitted, prefill lost, prefill admitted, prefill kv_drained", ["lost", "admitted"], 1),
        ("decode probing, decode lost, decode restarted, decode admitted", ["lost", "restarted", "admitted"], 2),
        ("decode breaker_opened, decode breaker_closed", ["breaker_opened", "breaker_closed"], 1),
    ],
)
def test_an_incident_from_its_beginning_to_its_end(
    events: str, steps: list[str] | None, over_after: float | None
) -> None:
    found = incident(view(P, D, events=events))
    if steps is None:
        assert found is None
        return
    assert found is not None
    assert ([e["kind"] for e in found["steps"]], found["over_after"]) == (steps, over_after)


def test_an_incident_of_one_that_is_gone_keeps_its_name() -> None:
    found = incident(view(P, events="decode lost"))
    assert found is not None and (found["role"], found["name"]) == (None, "decode")


def test_every_sentence_has_a_text_in_both_languages() -> None:
    source = (WEB.parent / "verdict.py").read_text(encoding="utf-8")
    keys = set(re.findall(r'_sentence\(\s*"(\w+)"', source)) | {
        "head_none_prefill",
        "head_none_decode",
        "head_none_ready_prefill",
        "head_none_ready_decode",
        "head_none_able_prefill",
        "head_none_able_decode",
        "head_busy_prefill",
        "head_busy_decode",
    }
    keys |= {f"{kind}_{state}" for state in KEPT_FROM for kind in ("state", "why")}
    keys |= set(re.findall(r'"(detail_restart|detail_waiting)"', source))
    keys |= {f"{stem}_{n}" for stem in re.findall(r'_counted\(\s*"(\w+)"', source) for n in ("one", "many")}
    assert len(keys) > 15
    for texts in strings().values():
        assert keys <= set(texts)


def test_one_instance_with_both_roles_is_neither_missing_nor_counted_twice() -> None:
    both = instance("decode", roles=["prefill", "decode"])
    assert said(verdict(view(both, status="unavailable"))) != said(verdict(view(D, status="unavailable")))
    assert verdict(view(both, status="unavailable"))["head"]["key"] == "head_apart"
    busy = verdict(view({**both, "busy": True}, status="unavailable"))
    assert busy["head"]["key"] == "head_busy_prefill"
