"""The fuzz targets in a few seconds, by seed: that they run, and find nothing. Longer runs: docs/fuzzing.md."""

import pytest

from fuzz import answers, http_side, pair_side, zmq_side
from fuzz.mutate import mutants
from fuzz.pure import run_seeded
from fuzz.source import Source


@pytest.mark.parametrize(
    ("target", "executions", "labels"),
    [
        ("prepare", 2000, {"served", "400 invalid_request", "400 unsupported_parameter", "refused by prefill"}),
        ("bodies", 400, {"served", "400 unsupported_parameter"}),
        ("answers", 3000, {"done", "refused", "unknown"}),
        ("announcement", 5000, {"accepted", "malformed", "mistyped", "oversized"}),
        ("wire", 400, {"1 taken, then nothing", "0 taken, then 400"}),
    ],
)
def test_functions_that_see_hostile_bytes(target: str, executions: int, labels: set[str]) -> None:
    report = run_seeded(target, 20003, executions=executions)
    assert not report.findings, report.findings
    assert report.executions == executions and labels <= set(report.labels), report.labels


def test_the_id_that_is_hidden_looks_like_a_real_one() -> None:
    answers.check_shape()


@pytest.mark.parametrize(("side", "rounds"), [(http_side, 1), (pair_side, 20)])
async def test_a_live_proxy(side, rounds: int) -> None:
    report = await side.run(20003, rounds=rounds)
    assert not report.findings, report.findings
    assert report.executions > 50 and report.labels["200"] and report.labels["400"]


async def test_a_live_registration_port() -> None:
    report = await zmq_side.run(20003, rounds=60)
    assert not report.findings, report.findings
    assert report.executions > 1000 and report.labels["plain requests answered"]
    assert {"identities", "thieves"} <= set(report.labels)


def test_the_same_seed_makes_the_same_inputs() -> None:
    first, second = (mutants(7, [b"abc", b"12345"], [b"word"]) for _ in range(2))
    assert [next(first) for _ in range(200)] == [next(second) for _ in range(200)]


@pytest.mark.parametrize("decisions", [b"", bytes(24), bytes(range(24)), b"\xff" * 24])
def test_pieces_add_up(decisions: bytes) -> None:
    whole = bytes(range(200))
    assert b"".join(Source(decisions).pieces(whole)) == whole


@pytest.mark.parametrize("target", ["prepare", "answers", "announcement", "wire"])
def test_what_breaks_a_promise_is_a_finding(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {
        "prepare": ("fuzz.prepare.prepare", lambda route, raw: 1 / 0),
        "answers": ("fuzz.answers.hide", lambda request_id, body: body),
        "announcement": ("fuzz.announcement.decode", lambda frames: frames[5]),
        "wire": ("fuzz.wire.second_reading", lambda data: __import__("fuzz.wire").wire.Second()),
    }
    monkeypatch.setattr(*broken[target])
    report = run_seeded(target, 1, executions=500)
    assert len(report.findings) == 1
