"""The command line: processes that start, ping, serve and end as told."""

from __future__ import annotations

import asyncio
import re
import runpy
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest

from disagg_sim import expected_text
from disagg_sim.cli import _configs, _parser, main

from .test_discovery import router

READY = re.compile(r"(prefill|decode) http=(\S+) kv=(\S+) models=(\S+)")


@asynccontextmanager
async def process(*flags: str) -> AsyncIterator[asyncio.subprocess.Process]:
    command = (sys.executable, "-W", "error", "-m", "disagg_sim", *flags)
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
    try:
        yield child
    finally:
        if child.returncode is None:
            child.kill()
        await child.communicate()


async def ready(child: asyncio.subprocess.Process) -> dict[str, str]:
    assert child.stdout is not None
    match = READY.match((await child.stdout.readline()).decode())
    assert match is not None
    return {"role": match[1], "http": match[2], "kv": match[3], "models": match[4]}


async def ended(child: asyncio.subprocess.Process, number: signal.Signals) -> tuple[int | None, bytes]:
    child.send_signal(number)
    _, errors = await child.communicate()
    return child.returncode, errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_pair_in_one_process_pings_serves_and_ends(number: signal.Signals) -> None:
    free = ("--port", "0", "--kv-port", "0", "--decode-port", "0", "--decode-kv-port", "0")
    with router() as proxy:
        flags = ("--proxy", proxy.address, "--model", "m", "--model", "alias", "--time-per-output-token", "0")
        async with process("--role", "pair", *free, *flags) as child, aiohttp.ClientSession() as http:
            p, d = await ready(child), await ready(child)
            assert (p["role"], d["role"], p["models"]) == ("prefill", "decode", "m,alias")
            pings = dict([await proxy.ping(), await proxy.ping()])
            assert pings == {
                p["kv"]: {"type": "P", "http_address": p["http"], "zmq_address": p["kv"]},
                d["kv"]: {"type": "D", "http_address": d["http"], "zmq_address": d["kv"]},
            }
            headers = {"X-Request-Id": f"___prefill_addr_{p['kv']}___decode_addr_{d['kv']}_x"}
            for address, most in ((p["http"], 1), (d["http"], 6)):
                body = {"model": "alias", "prompt": "the sea", "max_tokens": most}
                async with http.post(f"http://{address}/v1/completions", json=body, headers=headers) as response:
                    text = (await response.json())["choices"][0]["text"]
            assert text == expected_text("the sea", 6)
            assert await ended(child, number) == (0, b"")


async def test_two_processes_hand_over_kv_and_one_can_hang() -> None:
    free = ("--port", "0", "--kv-port", "0")
    async with (
        process("--role", "prefill", *free) as prefill,
        process("--role", "decode", *free, "--time-per-output-token", "0") as decode,
        aiohttp.ClientSession() as http,
    ):
        p, d = await asyncio.gather(ready(prefill), ready(decode))
        headers = {"X-Request-Id": f"___prefill_addr_{p['kv']}___decode_addr_{d['kv']}_x"}
        for address, most in ((p["http"], 1), (d["http"], 6)):
            body = {"prompt": "the sea", "max_tokens": most}
            async with http.post(f"http://{address}/v1/completions", json=body, headers=headers) as response:
                text = (await response.json())["choices"][0]["text"]
        assert text == expected_text("the sea", 6)

        body = {"prompt": "the sea", "stream": True}
        async with http.post(f"http://{d['http']}/v1/completions", json=body, headers=headers) as response:
            assert response.status == 200
            async with http.get(f"http://{d['http']}/sim/state") as state:
                assert (await state.json())["stalled_on"] == f"cmpl-{headers['X-Request-Id']}-0"
            assert await ended(decode, signal.SIGTERM) == (0, b"")


async def test_a_signal_ends_the_start_up_too() -> None:
    with router() as proxy:
        flags = ("--role", "decode", "--port", "0", "--kv-port", "0", "--startup-seconds", "3600")
        async with process(*flags, "--proxy", proxy.address) as child:
            await proxy.ping()
            assert await ended(child, signal.SIGTERM) == (0, b"")


async def test_a_dead_engine_ends_the_process() -> None:
    flags = ("--role", "decode", "--port", "0", "--kv-port", "0", "--exit-after-death-seconds", "0")
    async with process(*flags) as child, aiohttp.ClientSession() as http:
        d = await ready(child)
        async with http.post(f"http://{d['http']}/v1/completions", json={"prompt": "a b"}) as response:
            assert response.status == 500
        assert await child.wait() == 1


async def test_a_taken_port_is_one_line_and_exit_code_1() -> None:
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = str(server.sockets[0].getsockname()[1])
    async with process("--role", "prefill", "--port", port, "--kv-port", "0") as child:
        _, errors = await child.communicate()
    assert child.returncode == 1
    assert errors.decode().splitlines() == [f"error: cannot bind 127.0.0.1:{port}: Address already in use"]
    server.close()


@pytest.mark.parametrize(
    ("flags", "needle"),
    [
        ([], "--role"),
        (["--role", "both"], "--role"),
        (["--role", "pair", "--proxy", "nowhere"], "--proxy"),
        (["--role", "pair", "--proxy", ":1"], "--proxy"),
        (["--role", "pair", "--max-model-len", "0"], "max_model_len"),
        (["--role", "pair", "--port", "x"], "--port"),
    ],
)
def test_a_bad_flag_is_one_line_and_exit_code_2(
    flags: list[str], needle: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(flags)
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and needle in line


def test_every_flag_is_explained() -> None:
    assert all(action.help for action in _parser()._actions)


@pytest.mark.parametrize("name", ["disagg_sim", "disagg_sim.chaos", "disagg_proxy.sim", "disagg_proxy.chaos"])
def test_modules_that_are_commands(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last two are former names of the first two; scripts of users have them."""
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_module(name, run_name="__main__")
    assert exit_info.value.code == 0
    command = "chaos" if name.endswith("chaos") else "sim"
    assert capsys.readouterr().out.startswith(f"usage: disagg-proxy {command} [-h] ")


def test_the_version_to_imitate_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--role", "decode", "--vllm-version", "0.24.0"])
    assert ended.value.code == 2 and "0.24.0 has no P2pNcclConnector" in capsys.readouterr().err
    flags = _parser().parse_args(["--role", "pair", "--connector", "nixl", "--vllm-version", "0.31.0"])
    assert [config.vllm_version for config in _configs(_parser(), flags)] == ["0.31.0"] * 2


def test_the_key_comes_from_the_environment_as_vllms_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag is shown by `ps` to every user of the machine."""

    def key(*flags: str) -> str | None:
        parser = _parser()
        [config] = _configs(parser, parser.parse_args(["--role", "decode", *flags]))
        return config.api_key

    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert key() is None
    monkeypatch.setenv("VLLM_API_KEY", "of the environment")
    assert key() == "of the environment"
    assert key("--api-key", "of the flag") == "of the flag"
    assert "of the environment" not in _parser().format_help()
