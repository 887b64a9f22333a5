"""The chaos runner: its plan, its verdicts, and a short run of everything that the proxy promises."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest
from aiohttp import web

from disagg_proxy.request_id import new_request_id
from disagg_sim import SimConfig
from disagg_sim.chaos import ALL, KINDS, Leave, Options, PlannedRequest, Report, make_plan, run
from disagg_sim.chaos.cli import main
from disagg_sim.chaos.clients import CUT, DROPPED, LATE, LEFT, REFUSED, RIGHT, WRONG, Clients, Result
from disagg_sim.chaos.engines import Ledger, LedgerEngine, key_of
from disagg_sim.chaos.machine import running_machine
from disagg_sim.chaos.work import CHAT, COMPLETIONS, MESSAGES, REFUSED_BY_DECODE, Work
from tests.conftest import soon

SETTINGS = {"seconds": 60.0, "rate": 10.0, "kinds": tuple(KINDS), "prefills": 3, "decodes": 2, "every": 1.0}


# The plan.


def test_the_same_seed_makes_the_same_plan() -> None:
    assert make_plan(7, **SETTINGS).to_json() == make_plan(7, **SETTINGS).to_json()
    assert make_plan(7, **SETTINGS).to_json() != make_plan(8, **SETTINGS).to_json()


def test_a_plan_has_everything_in_it() -> None:
    plan = make_plan(7, **SETTINGS)
    works = [request.work for request in plan.requests]
    assert 400 < len(works) < 800
    assert {work.path for work in works} == {COMPLETIONS, CHAT, MESSAGES}
    assert {work.stream for work in works} == {True, False}
    assert any(work.body.get("n") == 2 for work in works)
    assert any(isinstance(work.body.get("prompt"), list) for work in works)
    assert {work.status for work in works} == {200, 400}
    assert {request.leave.when for request in plan.requests if request.leave} == {"body", "time", "chunks"}
    assert {trouble.kind for trouble in plan.troubles} == set(KINDS) - {"leave"}
    assert [r.at for r in plan.requests] == sorted(r.at for r in plan.requests)
    for trouble in plan.troubles:
        assert 0 <= trouble.at < 60 and trouble.target < (3 if trouble.role == "prefill" else 2)
        assert trouble.role == "decode" or trouble.kind not in ("cut", "refuse-decode", "kill-decode")


def test_other_troubles_leave_the_requests_as_they_are() -> None:
    quiet = make_plan(7, **{**SETTINGS, "kinds": ()})
    assert not quiet.troubles and not any(request.leave for request in quiet.requests)
    assert [r.work for r in quiet.requests] == [r.work for r in make_plan(7, **SETTINGS).requests]


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match="flood"):
        make_plan(1, **{**SETTINGS, "kinds": ("flood",)})


@pytest.mark.parametrize("argv", [["--trouble", "flood"], ["--rate", "0"], ["--prefills", "0"]])
def test_bad_flags(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2 and capsys.readouterr().err.startswith("error: ")


# The report.


def good() -> Report:
    report = Report({}, planned=2, afterwards=(4, 4))
    report.take([Result(0, RIGHT, "right", 0.0, 0.5), Result(1, REFUSED, "503 no_pair", 1.0, 0.1)])
    return report


def test_a_good_report() -> None:
    report = good()
    report.orphans["x"] = "its prefill was killed before its 200"
    assert report.reasons() == []
    assert "every promise kept" in report.to_text() and "1 refused: 503 no_pair" in report.to_text()
    assert json.loads(report.to_json())["failed_because"] == [] and report.longest_s == 0.5


@pytest.mark.parametrize("outcome", [WRONG, LATE, DROPPED])
def test_an_answer_that_is_wrong_or_missing_fails_the_run(outcome: str) -> None:
    report = good()
    report.planned += 1
    report.take([Result(2, outcome, "why", 3.0, 1.0)])
    assert report.reasons() == [f"1 responses wrong, missing or late: request 2 at 3.0 s: {outcome}, why"]


@pytest.mark.parametrize("what", ["decoded_twice", "dead", "stalled", "busy", "not_ready", "buffer_leaks"])
def test_what_else_fails_a_run(what: str) -> None:
    report = good()
    getattr(report, what).append("that one")
    assert len(report.reasons()) == 1 and "that one" in report.reasons()[0] and "failed" in report.to_text()


def test_orphans_afterwards_and_missing_outcomes_fail_a_run() -> None:
    report = good()
    report.orphans["x on decode"] = ""
    report.afterwards = (4, 3)
    report.planned = 5
    assert [reason.split()[0] for reason in report.reasons()] == ["1", "only", "3"]


# The clients' judgement, by a server that answers what a test wants.


async def judged(
    work: Work, answer: bytes, *, status: int = 200, stop: bool = False, leave: Leave | None = None
) -> Result:
    async def reply(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=status, headers={"Content-Type": "application/json"})
        if stop:
            response.content_length = len(answer) + 1
        await response.prepare(request)
        await response.write(answer)
        if stop and request.transport is not None:
            request.transport.close()
        elif leave is not None:
            await asyncio.Event().wait()
        return response

    server = web.Server(reply, handler_cancellation=True)
    listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    try:
        clients = Clients(f"http://127.0.0.1:{port}", 5.0)
        return await clients.visit(PlannedRequest(0, 0.0, work, leave))
    finally:
        clients.close()
        listener.close()
        await server.shutdown(0.1)


WHOLE = Work(COMPLETIONS, {}, ("yes",))
STREAM = Work(CHAT, {"stream": True}, ("yes",))
PIECE = b'data: {"choices": [{"index": 0, "delta": {"content": "%s"}}]}\n\n'


@pytest.mark.parametrize(
    ("work", "answer", "more", "outcome"),
    [
        (WHOLE, b'{"choices": [{"index": 0, "text": "yes"}]}', {}, RIGHT),
        (WHOLE, b'{"choices": [{"index": 0, "text": "no"}]}', {}, WRONG),
        (WHOLE, b'{"choices": []}', {}, WRONG),
        (WHOLE, b"", {}, WRONG),
        (WHOLE, b'{"choices"', {"stop": True}, CUT),
        (WHOLE, b'{"error": {"code": "no_pair"}}', {"status": 503}, REFUSED),
        (WHOLE, b'{"error": {"code": "bad"}}', {"status": 400}, WRONG),
        (WHOLE, b"Internal Server Error", {"status": 500}, WRONG),
        (Work(COMPLETIONS, {}, (), 400), b'{"error": {"code": "bad"}}', {"status": 400}, RIGHT),
        (Work(MESSAGES, {}, ("yes",)), b'{"content": [{"text": "yes"}]}', {}, RIGHT),
        (STREAM, PIECE % b"yes" + b"data: [DONE]\n\n", {}, RIGHT),
        (STREAM, PIECE % b"yes", {}, WRONG),
        (STREAM, PIECE % b"no" + b"data: [DONE]\n\n", {}, WRONG),
        (STREAM, b'data: {"error": {"message": "dead"}}\n\ndata: [DONE]\n\n', {}, CUT),
        (STREAM, PIECE % b"yes", {"leave": Leave("chunks", 1)}, LEFT),
        (STREAM, PIECE % b"yes", {"leave": Leave("time", 0.05)}, LEFT),
        (STREAM, PIECE % b"yes", {"leave": Leave("body", 0.01)}, LEFT),
    ],
)
async def test_judgement(work: Work, answer: bytes, more: dict, outcome: str) -> None:
    result = await judged(work, answer, **more)
    assert result.outcome == outcome, result


# The ledger.


async def test_an_id_that_a_decode_receives_twice_is_recorded() -> None:
    async with running_machine(1, 1, {}, {}) as machine, aiohttp.ClientSession() as session:
        prefill, decode = machine.engines
        pair = [machine.services.registry.instances()[place].kv for place in (0, 1)]
        headers = {"X-Request-Id": new_request_id(*pair).internal}
        body = {"prompt": "hello there", "max_tokens": 1}
        for engine in (prefill, decode):
            async with session.post(f"http://{engine.http_address}{COMPLETIONS}", json=body, headers=headers) as answer:
                assert answer.status == 200
        assert machine.ledger.twice == [] and prefill.sent_to == {decode.kv_address}
        asking = asyncio.ensure_future(
            session.post(f"http://{decode.http_address}{COMPLETIONS}", json=body, headers=headers)
        )
        await soon(decode.wait_until(lambda state: state["stalled_on"] is not None))
        asking.cancel()
        assert machine.ledger.twice == [f"{key_of(headers['X-Request-Id'])} on {decode.name}"]


async def test_a_release_after_a_refusal_is_not_twice() -> None:
    engine = LedgerEngine(SimConfig(role="decode"), Ledger())
    engine._note_decode("a", {"user": REFUSED_BY_DECODE, "max_tokens": 99}, None)
    engine._note_decode("a", {"user": REFUSED_BY_DECODE, "max_tokens": 1}, None)
    assert engine.ledger.twice == []
    engine._note_decode("a", {"user": REFUSED_BY_DECODE, "max_tokens": 1}, None)
    assert len(engine.ledger.twice) == 1


async def test_a_killed_decode_takes_the_prefills_that_sent_to_it_along() -> None:
    async with running_machine(2, 1, {}, {}) as machine, aiohttp.ClientSession() as session:
        async with session.post(machine.url + COMPLETIONS, json={"prompt": "hello there", "max_tokens": 1}) as answer:
            assert answer.status == 200
        (decode,) = machine.decodes
        before = [prefill.lives for prefill in machine.prefills]
        assert await machine.kill_decode(decode, 0.05, supervised=True) == 1
        after = [prefill.lives for prefill in machine.prefills]
        assert sorted(now - then for now, then in zip(after, before, strict=True)) == [0, 1] and decode.lives == 2
        assert await machine.until_ready(10)


# All of it.


async def test_a_short_run_of_everything_that_holds() -> None:
    report = await run(Options(seconds=8.0, seed=5, rate=15.0, every=0.7, trouble=ALL))
    assert report.reasons() == [], report.to_text()
    # Restarts come in the way of others, so not every kind has its turn in so short a time.
    assert len(set(report.troubles) & set(ALL)) >= 6, report.troubles
    assert report.sent == report.planned > 80 and report.answers[RIGHT] > report.sent / 3
    assert report.answers[LEFT] > 10 and report.afterwards == (18, 18)


async def test_a_run_without_trouble_has_right_answers_only() -> None:
    report = await run(Options(seconds=2.0, seed=2, prefills=1, decodes=2, trouble=()))
    assert report.reasons() == [] and report.answers == {RIGHT: report.planned}, report.to_text()
