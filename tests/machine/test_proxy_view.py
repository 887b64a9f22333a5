"""What is read from the proxy's /health and /stats, and from answers that are neither."""

from __future__ import annotations

import json
from typing import Any

import pytest

from disagg_machine import messages
from disagg_machine.net import Answer
from disagg_machine.proxy_view import Engine, Health, ProxyView, ask, hosts, key_problem, read, read_health
from tests.machine.conftest import MakeContext


def instance(address: str, **changes: Any) -> dict[str, Any]:
    known = {"http_address": address, "state": "ready", "requests_total": 7, "in_flight": 2, "reason": ""}
    return {**known, "restart_wanted": False, **changes}


def view(*instances: dict[str, Any], engine_host: str = "127.0.0.1") -> ProxyView:
    return read(json.dumps({"instances": instances}), engine_host)


def test_engines_by_their_ports() -> None:
    frozen = {"state": "frozen", "reason": "no token\nfor 41 s", "restart_wanted": True}
    hung = {"state": "ejected", "reason": "no ping", "restart_wanted": True}
    found = view(
        instance("127.0.0.1:20003"),
        instance("127.0.0.1:20005", **frozen),
        instance("127.0.0.1:20006", **hung),
        instance("192.0.2.7:20004"),
    )
    assert found.answered and list(found.engines) == [20003, 20005, 20006]
    assert found.engines[20003] == Engine(7, 2, "ready", "-", False)
    assert (found.requests(20003), found.requests(20004)) == (7, None)
    assert [found.frozen(port) for port in (20003, 20004, 20005, 20006)] == ["", "", "no token for 41 s", ""]
    assert [found.wanted(port) for port in (20003, 20004, 20006)] == ["", "", "no ping"]


@pytest.mark.parametrize(("answer", "refused"), [(Answer(401, "{}"), True), (Answer(503, "{}"), False), (None, False)])
def test_a_proxy_that_refuses_the_key_is_told_from_one_that_does_not_answer(
    make_context: MakeContext, monkeypatch: pytest.MonkeyPatch, answer: Answer | None, refused: bool
) -> None:
    monkeypatch.setattr("disagg_machine.net.http_get", lambda *_: answer)
    assert ask(make_context().settings) == ProxyView(refused=refused)
    assert key_problem(make_context().settings) == "key_missing"
    assert key_problem(make_context(API_KEY="k").settings) == "key_wrong"


def test_a_restart_that_is_wanted_without_a_reason_is_wanted() -> None:
    assert view(instance("127.0.0.1:1", restart_wanted=True, reason=None)).wanted(1) == "-"


def test_the_state_of_an_engine_for_people() -> None:
    messages.use("en")
    assert Engine(7, 2, "frozen", "no token", True).words == "frozen, 2 in flight (no token)"


@pytest.mark.parametrize(
    ("engine_host", "address", "known"),
    [
        ("0.0.0.0", "127.0.0.1:1", True),
        ("localhost", "127.0.0.1:1", True),
        ("localhost", "localhost:1", True),
        ("::1", "[::1]:1", True),
        ("10.0.0.7", "127.0.0.1:1", False),
    ],
)
def test_engines_of_other_machines_are_left_out(engine_host: str, address: str, known: bool) -> None:
    assert bool(view(instance(address), engine_host=engine_host).engines) is known
    assert "" not in hosts(engine_host)


@pytest.mark.parametrize("value", [{}, [], "x", {"instances": 3}, {"instances": [{}]}, {"instances": [1]}])
def test_an_answer_that_names_no_engine(value: Any) -> None:
    assert read(json.dumps(value), "127.0.0.1").engines == {}
    assert read_health(Answer(200, json.dumps(value))) is None


def test_health() -> None:
    counts = {"prefill": {"ready": 1, "known": 1}, "decode": {"ready": 2, "known": 3}}
    good = Answer(200, json.dumps({"pairs": 2, **counts, "missing": []}))
    assert read_health(good) == Health(200, 2, {"prefill": 1, "decode": 2}, "")
    bad = read_health(Answer(503, json.dumps({"pairs": 0, "missing": ["no decode (one is [loading])", "x\ty"]})))
    assert bad and (bad.status, bad.pairs, bad.ready) == (503, 0, {"prefill": 0, "decode": 0})
    assert "no decode (one is [loading])" in bad.missing and "x" in bad.missing and "\t" not in bad.missing
    assert read_health(Answer(502, "<html>")) is None
