"""`status` and `logs` by PID files, without a proxy that answers."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from disagg_machine import gpus, look, messages, net, proc, signals
from disagg_machine.context import Context
from disagg_machine.gpus import Gpu
from disagg_machine.messages import MachineError
from disagg_machine.proxy_view import Engine, ProxyView
from tests.machine.conftest import MakeContext


@pytest.fixture
def context(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> Context:
    """A machine whose ports are free, without GPUs."""
    monkeypatch.setattr(net, "http_get", lambda *_: None)
    monkeypatch.setattr(net, "port_taken", lambda _: False)
    monkeypatch.setattr(gpus, "read_gpus", lambda _: [])
    one = make_context()
    one.run_dir.mkdir()
    return one


def put(context: Context, name: str, alive: bool = True, **fields: object) -> None:
    stat = proc.read_stat(os.getpid())
    assert stat is not None
    since = int(time.time()) - 3723
    known = {"pid": os.getpid(), "start": stat.start if alive else "1", "boot": proc.boot_id(), "since": since}
    lines = {"role": name.rstrip("12"), "mode": "background", **known, **fields}
    (context.run_dir / f"{name}.pid").write_text("".join(f"{key}={value}\n" for key, value in lines.items()))


def rows(shown: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split() for line in shown.splitlines()[1:] if not line.startswith(" ")}


def test_nothing_runs(context: Context, capsys: pytest.CaptureFixture[str]) -> None:
    assert look.cmd_status(context, []) == 3
    assert capsys.readouterr() == ("", "Nothing is running.\n")


def test_what_loads_is_no_error(context: Context, capsys: pytest.CaptureFixture[str]) -> None:
    put(context, "decode", kind="sim", http=20005, kv=22001)
    assert look.cmd_status(context, []) == 0
    out, err = capsys.readouterr()
    name, kind, pid, ports, state, uptime, ready = rows(out)["decode"]
    assert (name, kind, pid, ports) == ("decode", "SIMULATED", str(os.getpid()), "20005,22001")
    assert (state, uptime[:-1], ready) == ("alive", "1:02:0", "loading")
    assert "SIMULATED" in err


def test_what_is_down(context: Context, capsys: pytest.CaptureFixture[str]) -> None:
    put(context, "proxy", alive=False, kind="proxy")
    put(context, "prefill", pid=0, kind="vllm")
    put(context, "decode", pid=0, kind="vllm")
    (context.run_dir / "decode.restarts").write_text("count=5\nstate=given-up\nat=0\nreason=PID 7 died\n")
    assert look.cmd_status(context, []) == 1
    out = capsys.readouterr().out
    states = {name: row[4] for name, row in rows(out).items()}
    assert states == {"proxy": "dead", "prefill": "waiting", "decode": "given-up"}
    assert "restarts: 5; last " in out and ": PID 7 died" in out
    assert f"given up; see {context.settings.log('decode')}, then `restart`" in out


@pytest.mark.parametrize(
    ("supervised", "mode", "remedy"),
    [
        (False, "background", "`restart decode` brings it back"),
        (True, "background", ""),
        (True, "foreground", "stop it in its terminal"),
    ],
)
def test_the_remedy_for_what_hangs(
    context: Context,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    supervised: bool,
    mode: str,
    remedy: str,
) -> None:
    monkeypatch.setattr(net, "port_taken", lambda _: True)
    put(context, "decode", kind="vllm", http=20005, mode=mode)
    if supervised:
        put(context, "supervisor", kind="script")
    assert look.cmd_status(context, []) == 1
    out = capsys.readouterr().out
    assert rows(out)["decode"][4] == "hung" and "does not answer" in out
    assert remedy in out and (remedy != "" or "restart decode" not in out)


def test_what_the_proxy_calls_frozen(
    context: Context, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own /health is not asked: it only tells that the HTTP side lives."""
    engine = Engine(9, 2, "frozen", "no token for 41 s", restart_wanted=True)
    monkeypatch.setattr("disagg_machine.proxy_view.ask", lambda _: ProxyView({20005: engine}, answered=True))
    put(context, "proxy", kind="proxy", http=10001)
    put(context, "decode", kind="vllm", http=20005)
    assert look.cmd_status(context, []) == 1
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("decode"))
    assert row.split()[4] == "frozen" and row.endswith(
        "proxy: frozen, 2 in flight (no token for 41 s); 9 requests so far"
    )


def test_a_proxy_that_refuses_the_key(
    context: Context, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(net, "http_get", lambda *_: net.Answer(200, "{}"))
    monkeypatch.setattr("disagg_machine.proxy_view.ask", lambda _: ProxyView(refused=True))
    put(context, "proxy", kind="proxy", http=10001)
    put(context, "decode", kind="vllm", http=20005)
    look.cmd_status(context, [])
    out, err = capsys.readouterr()
    assert "decode" in out and "what the proxy knows of it needs API_KEY" in out and "does not know" not in out
    assert "requires a key: set API_KEY, or CONFIG to the file that has it" in err


def test_memory_of_the_gpus(
    context: Context, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpus, "read_gpus", lambda _: [Gpu(3, "GPU-a", "NVIDIA H200", 143771, 143156)])
    put(context, "supervisor", kind="script")
    assert look.cmd_status(context, []) == 0
    assert capsys.readouterr().out.endswith("GPU 3  NVIDIA H200  615 / 143771 MiB\n")


@pytest.fixture
def tail(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What became of SIGPIPE, then the words that `tail` would have been called with."""
    called: list[str] = []
    monkeypatch.setattr(signals, "restore_sigpipe", lambda: called.append("SIGPIPE"))
    monkeypatch.setattr(os, "execvp", lambda program, words: called.extend(words))
    return called


@pytest.mark.parametrize(
    ("words", "options", "names"),
    [
        (["proxy"], ["-n", "40"], ["proxy"]),
        (["proxy.log", "-f", "-n", "3"], ["-n", "3", "-F"], ["proxy"]),
        ([], ["-v", "-n", "40"], ["decode", "proxy"]),
        (["--follow"], ["-n", "40", "-F"], ["decode", "proxy"]),
    ],
)
def test_logs(context: Context, tail: list[str], words: list[str], options: list[str], names: list[str]) -> None:
    folder = context.settings.log_dir
    folder.mkdir()
    for name in ("proxy", "decode"):
        (folder / f"{name}.log").write_text("x\n")
    look.cmd_logs(context, words)
    assert tail == ["SIGPIPE", "tail", *options, "--", *(str(folder / f"{name}.log") for name in names)]


@pytest.mark.parametrize(
    ("words", "code", "key"),
    [
        (["-n", "x"], 2, "unknown_argument"),
        (["-n"], 2, "unknown_argument"),
        (["-x"], 2, "unknown_argument"),
        (["nothing"], 3, "no_log"),
        (["../run/settings"], 3, "no_log"),
        ([], 3, "no_logs"),
    ],
)
def test_logs_that_are_not_there(
    context: Context, tail: list[str], tmp_path: Path, words: list[str], code: int, key: str
) -> None:
    with pytest.raises(MachineError) as refused:
        look.cmd_logs(context, words)
    assert (refused.value.code, refused.value.key) == (code, key) and tail == []
    messages.use("en")
    assert str(refused.value)
