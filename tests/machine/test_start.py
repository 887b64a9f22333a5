"""What a process gets from this one, waiting for what was started, and what its last words mean."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from disagg_machine import launch, messages, proc, start, up
from disagg_machine.context import Context
from disagg_machine.engines import SIM, VLLM, Engines
from disagg_machine.launch import Plan
from disagg_machine.layout import layout
from disagg_machine.start import Starting
from disagg_machine.vllm_facts import VllmFacts
from tests.machine.conftest import MakeContext


def plan(context: Context, engines: Engines | None = None) -> Plan:
    context.run_dir.mkdir(exist_ok=True)
    context.settings.log_dir.mkdir(exist_ok=True)
    return Plan(context, engines or Engines(SIM), layout(context.settings), "python")


def part(context: Context, name: str, pid: int, start_time: str) -> None:
    fields = f"pid={pid}\nstart={start_time}\nboot={proc.boot_id()}\n"
    (context.run_dir / f"{name}.pid").write_text(fields)


def alive(context: Context, name: str) -> None:
    """A part that lives as long as this test."""
    stat = proc.read_stat(os.getpid())
    assert stat is not None
    part(context, name, os.getpid(), stat.start)


# -- the environment of a process


def test_programs_get_settings_as_they_were_read_and_the_keys(make_context: MakeContext, tmp_path: Path) -> None:
    (tmp_path / "my model").mkdir()
    context = make_context(MODEL="my model", API_KEY="a", ENGINE_API_KEY="e", HTTP_PROXY_PORT="")
    environment = context.child_environment()
    assert environment["MODEL"] == str(tmp_path / "my model")
    assert environment["HTTP_PROXY_PORT"] == "10001", "an empty one that is exported is the default"
    assert "DECODE_HTTP_PORT" not in environment, "what the user did not export is passed on by the command"
    keys = {name: environment.get(name) for name in ("API_KEY", "ENGINE_API_KEY", "VLLM_API_KEY", "DISAGG_KV_SECRET")}
    assert keys == {"API_KEY": "a", "ENGINE_API_KEY": "e", "VLLM_API_KEY": "e", "DISAGG_KV_SECRET": None}


@pytest.mark.parametrize(("before", "after"), [({}, ""), ({"no_proxy": "a,b"}, "a,b,"), ({"NO_PROXY": "c"}, "c,")])
def test_an_internet_proxy_does_not_get_what_stays_here(
    make_context: MakeContext, monkeypatch: pytest.MonkeyPatch, before: dict[str, str], after: str
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    context = make_context(ENGINE_HOST="192.0.2.7", **before)
    expected = f"{after}127.0.0.1,localhost,::1,192.0.2.7"
    assert launch.without_internet_proxy(context) == {"no_proxy": expected, "NO_PROXY": expected}


def test_the_example_request(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    body = '\'{"model": "model", "prompt": "San Francisco is a", "max_tokens": 32, "stream": true}\''
    url = "http://127.0.0.1:10001/v1/completions"
    kind = '-H "Content-Type: application/json"'
    assert up.example(make_context()) == f"curl {url} {kind} -d {body}"
    keyed = up.example(make_context(API_KEY="secret", all_proxy="http://proxy"))
    assert keyed == f"curl --noproxy '*' {url} {kind} -H \"Authorization: Bearer $API_KEY\" -d {body}"


# -- waiting


def test_a_part_that_died_is_noticed_at_once(make_context: MakeContext, capsys: pytest.CaptureFixture[str]) -> None:
    messages.use("en")
    one = plan(make_context())
    part(one.context, "decode", os.getpid(), "1")
    one.log("decode").write_text("loading\nCUDA out of memory: tried\n")

    def never() -> bool:
        raise AssertionError("asked although it died")

    with pytest.raises(SystemExit, match="1"):
        Starting(one, ["decode"]).wait(never, "decode", "decode to answer")
    said = capsys.readouterr().err
    assert f"decode (PID {os.getpid()}) ended while it started" in said and "    CUDA out of memory: tried" in said
    assert "The GPU has too little free memory" in said


def test_waiting_ends_after_the_limit(make_context: MakeContext, capsys: pytest.CaptureFixture[str]) -> None:
    messages.use("en")
    one = plan(make_context(START_TIMEOUT="7"))
    alive(one.context, "proxy")
    one.log("proxy").write_text("the end\n")
    starting = Starting(one, ["proxy"])
    starting.since -= 7
    with pytest.raises(SystemExit, match="1"):
        starting.wait(lambda: False, "proxy", "the proxy")
    said = capsys.readouterr().err
    assert "gave up waiting for the proxy after 7 s (START_TIMEOUT)" in said and "    the end" in said


def test_what_is_ready_needs_no_time(make_context: MakeContext, capsys: pytest.CaptureFixture[str]) -> None:
    one = plan(make_context())
    alive(one.context, "proxy")
    Starting(one, ["proxy"]).wait(lambda: True, "proxy", "the proxy")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("engines", "setting", "limit"),
    [(Engines(SIM), "", 120), (Engines(VLLM, vllm=VllmFacts("0.33.0")), "", 1800), (Engines(SIM), "5", 5)],
)
def test_the_limit(make_context: MakeContext, engines: Engines, setting: str, limit: int) -> None:
    assert Starting(plan(make_context(START_TIMEOUT=setting), engines)).limit() == limit


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("ValueError: No available memory for the cache blocks.", "too little free memory"),
        ("Free memory on device is less than desired GPU memory utilization", "too little free memory"),
        ("OSError: [Errno 98] Address already in use", "A port was taken"),
        ("error: address already in use", "A port was taken"),
        ("x is not a valid model identifier listed on", "MODEL=org/model was found neither"),
        ("404 Client Error: Repository Not Found for url", "MODEL=org/model was found neither"),
        ("NCCL: Duplicate GPU detected : rank 0", "NCCL refuses"),
        ("KeyError: 'x'", ""),
    ],
)
def test_last_words(make_context: MakeContext, capsys: pytest.CaptureFixture[str], line: str, words: str) -> None:
    messages.use("en")
    one = plan(make_context())
    one.log("decode").write_text(f"begin\n{line}\nend\n")
    start.explain(one, "decode")
    said = capsys.readouterr().err
    assert words in said and bool(words) == bool(said)
