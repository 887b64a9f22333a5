"""The command as a process: settings, ports, signals, exit codes, and what it writes."""

from __future__ import annotations

import json
import platform
import re
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import aiohttp
import pytest

from disagg_proxy import __version__, cli, compiled, serve
from disagg_proxy.config.commands import COMMANDS
from disagg_proxy.config.table import SETTINGS
from disagg_sim import expected_text
from tests.command import SCRIPT, Engines, Run, commands, engine_pairs
from tests.conftest import soon
from tests.ports import hold_port, may_listen

ASK = {"model": "sim-model", "prompt": "San Francisco is a", "max_tokens": 8}


@pytest.fixture
async def run() -> AsyncIterator[Run]:
    async with commands() as start:
        yield start


@pytest.fixture
async def engines() -> AsyncIterator[Engines]:
    async with engine_pairs() as start:
        yield start


async def test_help_names_every_setting(run: Run, tmp_path: Path) -> None:
    command = await run("--help", entry=SCRIPT, cwd=tmp_path)
    out, err = await soon(command.process.communicate())
    assert command.process.returncode == 0 and not err
    for setting in SETTINGS:
        assert setting.flag in out.decode() and setting.env in out.decode()
    assert out.decode().startswith("usage: disagg-proxy [serve] ")


def test_help_shows_the_kind_of_value_that_each_setting_takes(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = dict(re.findall(r"^  (--[\w-]+) (\S+)", capsys.readouterr().out, re.M))
    kinds: dict[str, set[str]] = {}
    for flag, metavar in shown.items():
        kinds.setdefault(metavar, set()).add(flag)
    assert set(shown) == {setting.flag for setting in SETTINGS}
    assert kinds.keys() == {
        "0|1", "ADDRESS,...", "BYTES", "FACTOR", "FILE", "FORMAT", "GPUS", "HEADER", "HOST", "HOST:PORT,...", "KEY",
        "LEVEL", "MS", "N", "ORIGIN,...", "PLACEMENT", "POLICY", "PORT", "ROLES", "SECONDS", "URL[,KV_ADDRESS]",
    }  # fmt: skip
    assert kinds["N"] >= {"--workers", "--max-tries", "--max-in-flight", "--max-queue", "--decode-alone-below"}
    assert kinds["BYTES"] == {"--max-body-bytes", "--max-header-bytes", "--kv-buffer-bytes", "--kv-bytes-per-token"}
    assert kinds["0|1"] == {
        "--decode-alone", "--enable-profiling", "--power-meter", "--served-by-header", "--stream-error-event",
        "--traces",
    }  # fmt: skip
    assert {"--freeze-after-min", "--freeze-after-max", "--instance-expiry"} <= kinds["SECONDS"]


@pytest.mark.parametrize("argv", [["--version"], ["serve", "--version"]])
def test_version_is_the_packages(capsys, argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    how = "compiled" if compiled() else "interpreted"
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"disagg-proxy {__version__} ({how}, Python {platform.python_version()})\n"


@pytest.mark.parametrize("command", [*COMMANDS])
def test_help_mentions_the_subcommands_and_each_has_a_help_of_its_own(capsys, command: str) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    assert re.search(rf"^  {command} +{COMMANDS[command].help}$", capsys.readouterr().out, re.M)
    try:
        status = cli.main([command, "--help"])
    except SystemExit as stopped:  # argparse's way
        status = stopped.code
    assert status == 0 and "--http-port" not in capsys.readouterr().out


def test_a_subcommand_gets_the_rest_of_the_line_and_gives_the_exit_code(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr("disagg_report.cli.main", lambda argv: calls.append(argv) or 7)
    assert cli.main(["bench", "plots", "a folder"]) == 7
    assert calls == [["plots", "a folder"]]


async def test_serve_is_the_command_that_can_be_left_out(run: Run) -> None:
    command = await (await run("serve", "--workers", "2")).until_ready()
    assert await command.end(signal.SIGTERM) == 0
    assert "Traceback" not in command.written


@pytest.mark.parametrize(
    ("argv", "environ", "named"),
    [
        (["--http-port", "80000"], {}, "--http-port"),
        (["--nonsense"], {}, "--nonsense"),
        (["--http-port"], {}, "--http-port"),
        (["left over"], {}, f"no such command: 'left over'; commands: {', '.join(['serve', *COMMANDS])}"),
        (["serve", "left over"], {}, "left over"),
        ([], {"PROXY_PORT": "many"}, "PROXY_PORT"),
        ([], {"INSTANCE_EXPIRY": "-1"}, "INSTANCE_EXPIRY"),
        (["--prefill", "ftp://x"], {}, "--prefill"),
        (["--decode", "http://a:1,other"], {}, "DECODE_INSTANCES: must name a KV protocol"),
    ],
)
def test_a_bad_setting_is_one_line_and_exit_2_before_any_port_opens(
    capsys, monkeypatch, argv: list[str], environ: dict[str, str], named: str
) -> None:
    def opened(*args: object) -> None:
        raise AssertionError("a port was opened")

    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(serve, "listen", opened)
    monkeypatch.setattr(serve, "Services", opened)
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and named in captured.err and not captured.out


async def test_a_bad_setting_ends_the_process_with_2(run: Run) -> None:
    command = await run(LOG_LEVEL="loud")
    assert await command.end() == 2
    assert command.written == ("disagg-proxy: LOG_LEVEL: must be one of debug, info, warning, error, not 'loud'\n"), (
        command.written
    )


def test_a_secret_is_not_shown_when_it_is_bad(capsys) -> None:
    assert cli.main(["--api-key", "two words"]) == 2
    assert "two words" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("port", "says"), [("HTTP_PROXY_PORT", "clients on 127.0.0.1:"), ("PROXY_PORT", "instances on 127.0.0.1:")]
)
async def test_a_port_in_use_is_one_line_and_exit_1(run: Run, port: str, says: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = await run(**{port: str(taken.getsockname()[1])})
        assert await command.end() == 1
    assert command.written.count("\n") == 1, command.written
    assert says in command.written and port in command.written and "ddress already in use" in command.written


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
async def test_a_signal_ends_it_with_0_and_nothing_is_left(run: Run, number: int) -> None:
    with ExitStack() as hold:
        ports = hold_port(hold), hold_port(hold)
        command = await run(HTTP_PROXY_PORT=str(ports[0]), PROXY_PORT=str(ports[1]))
        await command.until_ready()
        children = Path(f"/proc/{command.process.pid}/task/{command.process.pid}/children")
        assert not children.exists() or not children.read_text()
        assert await command.end(number) == 0
        assert command.written.count("\n") == 3 and "Stopping" in command.written.splitlines()[2], command.written
        assert all(map(may_listen, ports))


async def test_it_runs_from_another_directory_and_serves(run: Run, engines, http, tmp_path: Path) -> None:
    command = await (await run(entry=SCRIPT, cwd=tmp_path)).until_ready()
    await engines(command.zmq)
    await command.until_serving()
    async with http.post(command.url + "/v1/completions", json=ASK) as answer:
        assert (await answer.json())["choices"][0]["text"] == expected_text(ASK["prompt"], 8)
    assert await command.end(signal.SIGTERM) == 0
    assert "Traceback" not in command.written


async def test_sigterm_lets_a_running_stream_finish(run: Run, engines, http, dial) -> None:
    command = await (await run()).until_ready()
    _, decode = await engines(command.zmq)
    await command.until_serving()
    decode.faults.hold("schedule", after=2)
    async with http.post(command.url + "/v1/completions", json={**ASK, "stream": True}) as answer:
        await soon(decode.wait_until(lambda state: state["held_at"] == "schedule"))
        idle = await dial(command.url)
        idle.send("GET /livez HTTP/1.1\r\nHost: proxy\r\n\r\n")
        assert (await idle.answer())[0] == 200
        command.process.send_signal(signal.SIGTERM)
        await command.until_written("Stopping")
        idle.post("/v1/completions", ASK)
        assert (await idle.answer())[0] == 503
        decode.faults.release()
        assert (await soon(answer.read())).endswith(b"data: [DONE]\n\n")
    assert await command.end() == 0
    assert "Traceback" not in command.written


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
async def test_a_second_signal_ends_it_at_once(run: Run, engines, http, number: int) -> None:
    command = await (await run(SHUTDOWN_GRACE="600")).until_ready()
    _, decode = await engines(command.zmq)
    await command.until_serving()
    decode.faults.hold("schedule", after=2)
    async with http.post(command.url + "/v1/completions", json={**ASK, "stream": True}) as answer:
        await soon(decode.wait_until(lambda state: state["held_at"] == "schedule"))
        command.process.send_signal(signal.SIGTERM)
        await command.until_written("Stopping;")
        assert await command.end(number) == 0
        with pytest.raises(aiohttp.ClientError):
            await soon(answer.read())
    assert "Stopping at once" in command.written and "Traceback" not in command.written


async def test_log_lines_are_json_and_a_cut_stream_is_one_of_them(run: Run, engines, http) -> None:
    command = await (await run("--log-format", "json", "--api-key", "sk-quiet", LOG_LEVEL="debug")).until_ready()
    _, decode = await engines(command.zmq)
    await command.until_serving()
    decode.faults.cut_stream_after(2)
    headers = {"Authorization": "Bearer sk-quiet"}
    async with http.post(command.url + "/v1/completions", json={**ASK, "stream": True}, headers=headers) as answer:
        with pytest.raises(aiohttp.ClientError):
            await soon(answer.read())
    assert await command.end(signal.SIGTERM) == 0
    lines = [json.loads(line) for line in command.written.splitlines()]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    bad = [line for line in lines if line["level"] in ("warning", "error")]
    cause = "An answer was cut off: The decode instance closed the connection without an answer."
    assert [line["message"] for line in bad] == [cause]
    assert "sk-quiet" not in command.written and "exception" not in bad[0]
