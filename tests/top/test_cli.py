"""The command: exit codes, one look as text, a screen in a terminal that a key ends."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pexpect
import pytest

from disagg_proxy.cli import main
from disagg_proxy.top.cli import NO_RICH
from tests.conftest import soon

TOP = [sys.executable, "-m", "disagg_proxy", "top"]
ENVIRON = {**os.environ, "LC_ALL": "C.UTF-8", "API_KEY": ""}


async def run(*args: str, **environ: str) -> tuple[int | None, str, str]:
    process = await asyncio.create_subprocess_exec(
        *TOP, *args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**ENVIRON, **environ}
    )
    out, err = await soon(process.communicate())
    return process.returncode, out.decode(), err.decode()


async def test_one_look_as_text(machine, pair) -> None:
    code, out, err = await run("--url", machine.proxy.url + "/", "--once")
    assert (code, err) == (0, "")
    assert "Serving: 1 pair ready" in out and pair[1].http_address in out and "\x1b" not in out


async def test_the_address_and_the_key_come_from_the_environment_and_the_words_from_the_locale() -> None:
    from tests.conftest import running_proxy

    async with running_proxy(api_key="sesame") as proxy:
        port = proxy.url.rpartition(":")[2]
        code, out, _ = await run(HTTP_PROXY_PORT=port, API_KEY="sesame", LC_ALL="zh_CN.UTF-8", PYTHONUTF8="1")
        assert code == 0 and "无法服务：没有 prefill 注册" in out
        code, out, err = await run("--key", "wrong", HTTP_PROXY_PORT=port)
        assert (code, out) == (1, "") and "requires its API key" in err


async def test_no_proxy_answers() -> None:
    code, out, err = await run("--url", "http://127.0.0.1:9")
    assert (code, out) == (1, "") and err.startswith("disagg-proxy top: http://127.0.0.1:9 does not respond")


@pytest.mark.parametrize("wrong", [["--url", "127.0.0.1:10001"], ["--no-such"], ["word"]])
def test_wrong_usage(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["top", *wrong])
    assert end.value.code == 2 and "--help" in capsys.readouterr().err


def test_without_rich_it_says_what_to_install(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["top", "--once"]) == 2
    assert capsys.readouterr().err.strip() == NO_RICH
    # Not this project's own extra: its name on the package index is not this project's.
    assert NO_RICH.endswith("pip install rich")


class Terminal:
    """``top`` in a terminal.

    Args:
        size: lines and columns.
    """

    def __init__(self, url: str, size: tuple[int, int] = (40, 120)) -> None:
        self.child = pexpect.spawn(
            TOP[0], [*TOP[1:], "--url", url], env={**ENVIRON, "TERM": "xterm-256color"}, dimensions=size,
            encoding="utf-8", timeout=20,
        )  # fmt: skip

    async def says(self, text: str) -> None:
        await soon(self.child.expect(text, async_=True))

    async def ends(self) -> int | None:
        await soon(self.child.expect(pexpect.EOF, async_=True))
        self.child.wait()
        return self.child.exitstatus


@pytest.mark.parametrize("key", ["q", "\x03"], ids=["q", "ctrl-c"])
async def test_a_screen_that_a_key_ends(machine, pair, key: str) -> None:
    terminal = Terminal(machine.proxy.url)
    await terminal.says("Serving: 1 pair ready")
    terminal.child.send(key)
    assert await terminal.ends() == 0


async def test_events_and_requests_are_reached_by_keys_at_80x24(machine, pair) -> None:
    await machine.check_right()
    terminal = Terminal(machine.proxy.url, (24, 80))
    await terminal.says("q quit  r requests  e events")
    terminal.child.send("e")
    await terminal.says("serves sim-model")
    await terminal.says("o overview")
    terminal.child.send("\x1b[B")
    terminal.child.send("r")
    await terminal.says("completions")
    terminal.child.send("oq")
    assert await terminal.ends() == 0


async def test_pages_are_scrolled_by_keys_at_80x24(machine, pair) -> None:
    for number in range(40):
        machine.proxy.services.event_log.add_event("replayed", None, f"event {number}.")
    terminal = Terminal(machine.proxy.url, (24, 80))
    await terminal.says("q quit")
    terminal.child.send("e")
    await terminal.says(r"event 39\.")
    await terminal.says("PgUp PgDn")
    assert "event 9." not in terminal.child.before
    terminal.child.send("\x1b[6~")
    await terminal.says(r"event 9\.")
    assert "event 39." not in terminal.child.before
    terminal.child.send("\x1b[5~")
    await terminal.says(r"event 39\.")
    terminal.child.send("i")
    await terminal.says(rf"Decode {pair[1].http_address}.*Ready")
    terminal.child.send("q")
    assert await terminal.ends() == 0


async def test_it_waits_for_a_proxy_and_outlives_it() -> None:
    from tests.conftest import running_proxy

    async with running_proxy() as proxy:
        port = int(proxy.url.rpartition(":")[2])
    terminal = Terminal(proxy.url)
    await terminal.says("does not respond")
    async with running_proxy(http_port=port):
        await terminal.says("Not serving: no prefill has registered")
    await terminal.says("The proxy does not respond")
    terminal.child.send("q")
    assert await terminal.ends() == 0
