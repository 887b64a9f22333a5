"""SIGHUP and the configuration file, as processes: one, several workers, and a terminal that closes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from disagg_proxy import serve
from disagg_proxy.discovery.listener import BindError
from tests.command import LOCAL, MODULE, ROOT, Run, commands
from tests.conftest import soon
from tests.workers.conftest import Start, fleets

COMPLETIONS = "/v1/completions"
WORKERS = pytest.mark.parametrize("workers", ["1", "2"])


@pytest.fixture
async def run() -> AsyncIterator[Run]:
    async with commands() as start:
        yield start


@pytest.fixture
async def fleet() -> AsyncIterator[Start]:
    async with fleets() as start:
        yield start


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "proxy.toml"


async def status(url: str, size: int = 100) -> int:
    """The status of a request with a body of this size: 413 above MAX_BODY_BYTES, otherwise 503 without engines."""
    body = b'{"model": "m", "prompt": "' + b"a" * (size - 28) + b'"}'
    async with aiohttp.ClientSession() as session, session.post(url + COMPLETIONS, data=body) as answer:
        return answer.status


async def test_a_reload_changes_what_the_next_request_meets_and_a_bad_file_nothing(run: Run, file: Path) -> None:
    file.write_text("MAX_BODY_BYTES = 1000\nSHUTDOWN_GRACE = 5")
    command = await (await run("--config", str(file))).until_ready()
    assert [await status(command.url, size) for size in (1000, 1001)] == [503, 413]

    file.write_text("MAX_BODY_BYTES = 2000\nSHUTDOWN_GRACE = 6\nHTTP_PROXY_PORT = 1")
    command.process.send_signal(signal.SIGHUP)
    await command.until_written(
        rf"INFO +disagg_proxy.config.reload: Reloaded {file}: SHUTDOWN_GRACE 6 \(was 5\), "
        r"MAX_BODY_BYTES 2000 \(was 1000\); without effect: HTTP_PROXY_PORT \(set by the environment\)\n"
    )
    assert [await status(command.url, size) for size in (2000, 2001)] == [503, 413]

    file.write_text("MAX_BODY_BYTES = 3000\nMAX_QUEUE = true")
    command.process.send_signal(signal.SIGHUP)
    await command.until_written(rf"ERROR +\S+: Not reloaded: {file}: MAX_QUEUE: must be a number[^\n]*; the former")
    assert [await status(command.url, size) for size in (2000, 2001)] == [503, 413]
    assert await command.end(signal.SIGTERM) == 0
    assert command.written.count("eloaded") == 2 and "gets 6 s (SHUTDOWN_GRACE)" in command.written


async def test_the_log_changes_its_level_and_format(run: Run, file: Path) -> None:
    file.write_text("")
    command = await (await run(CONFIG_FILE=str(file))).until_ready()
    file.write_text("LOG_LEVEL = 'debug'\nLOG_FORMAT = 'json'")
    command.process.send_signal(signal.SIGHUP)
    await command.until_written(r"Reloaded \S+: LOG_LEVEL debug \(was info\), LOG_FORMAT json \(was text\)")
    command.process.send_signal(signal.SIGHUP)
    await command.until_written(r'"level": "info", "logger": "disagg_proxy.config.reload", "message": "Reloaded')
    assert await command.end(signal.SIGTERM) == 0


@WORKERS
async def test_without_a_file_sighup_is_a_line_and_ends_nothing(run: Run, workers: str) -> None:
    command = await (await run("--workers", workers)).until_ready()
    command.process.send_signal(signal.SIGHUP)
    await command.until_written(r"SIGHUP: there is no configuration file \(--config\); the settings stay\n")
    assert await status(command.url) == 503
    assert await command.end(signal.SIGTERM) == 0


async def test_every_worker_reloads_also_one_that_starts_later(fleet: Start, file: Path) -> None:
    file.write_text("MAX_BODY_BYTES = 1000")
    proxy = await fleet(2, CONFIG_FILE=str(file))
    doors = await proxy.doors()

    async def sizes() -> list[int]:
        return [(await door.ask(prompt="a" * 2500))[0] for door in doors]

    assert await sizes() == [413, 413]
    file.write_text("MAX_BODY_BYTES = 3000\nENGINE_API_KEY = 'needs a restart'".replace(" ", "-"))
    file.write_text("MAX_BODY_BYTES = 3000\nMAX_HEADER_BYTES = 8192\nDISAGG_KV_SECRET = 'restart'")
    proxy.process.send_signal(signal.SIGHUP)
    await proxy.until_written(
        rf"Reloaded {file}: MAX_BODY_BYTES 3000 \(was 1000\), MAX_HEADER_BYTES 8192 \(was 64K\); "
        r"needs a restart: DISAGG_KV_SECRET\n"
    )
    while await sizes() != [503, 503]:
        await asyncio.sleep(0.02)

    # The file is bad by now: the new worker gets what the others use.
    file.write_text("MAX_BODY_BYTES = 'nothing'")
    proxy.process.send_signal(signal.SIGHUP)
    await proxy.until_written(rf"ERROR +\S+: Not reloaded: {file}: MAX_BODY_BYTES: ")
    seen = len(proxy.lines)
    os.kill((await proxy.pids())[1], signal.SIGKILL)
    await proxy.until_written(r"Worker 1 has ended \(signal 9\) and is replaced.*Worker 1 serves again", seen)
    doors = await proxy.doors()
    assert await sizes() == [503, 503]
    assert proxy.written.count("eloaded") == 2, "workers do not repeat the supervisor's line"
    assert await proxy.end() == 0


@WORKERS
async def test_a_worker_and_the_supervisor_survive_a_burst_of_hangups(fleet: Start, file: Path, workers: str) -> None:
    file.write_text("")
    proxy = await fleet(int(workers), CONFIG_FILE=str(file))
    pids = await proxy.pids() if workers == "2" else []
    for _ in range(20):
        for pid in (proxy.process.pid, *pids):
            os.kill(pid, signal.SIGHUP)
    await proxy.until_written("Reloaded")
    assert await status(proxy.url) == 503
    assert "has ended" not in proxy.written
    assert await proxy.end() == 0


@WORKERS
@pytest.mark.parametrize("configured", [True, False], ids=["file", "no_file"])
async def test_the_proxy_serves_on_when_its_terminal_closes(file: Path, workers: str, configured: bool) -> None:
    """A closed terminal sends SIGHUP to the process in its foreground, and every write to it fails from then on."""
    file.write_text("MAX_BODY_BYTES = 1000")
    terminal, end = os.openpty()
    settings = {"CONFIG_FILE": str(file)} if configured else {}
    process = await asyncio.create_subprocess_exec(
        "setsid", "--ctty", *MODULE, "--workers", workers, "--access-log", "-", stdin=end, stdout=end, stderr=end,
        cwd=ROOT, env={"PATH": os.environ["PATH"], **LOCAL, **settings},
    )  # fmt: skip
    os.close(end)
    try:
        url = await soon(asyncio.to_thread(_serving, terminal))
        file.write_text("MAX_BODY_BYTES = 2000")
        os.close(terminal)
        while _terminal_of(process.pid) != "0":
            await asyncio.sleep(0.01)
        if configured:
            while await status(url, 1500) != 503:
                await asyncio.sleep(0.02)
        for _ in range(3):
            assert await status(url) == 503
        process.send_signal(signal.SIGTERM)
        assert await soon(process.wait()) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def _serving(terminal: int) -> str:
    """Read what the proxy writes until it has named its address."""
    written = b""
    while b"may register" not in written or b"Serving on" not in written:
        written += os.read(terminal, 4096)
    return written.partition(b"Serving on ")[2].split()[0].decode()


def _terminal_of(pid: int) -> str:
    """Device number of its controlling terminal; 0 for none (proc(5), ``/proc/PID/stat``, tty_nr)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[4]


def test_a_hangup_before_the_server_runs_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = []

    def listen(config: object) -> None:
        handlers.append(signal.getsignal(signal.SIGHUP))
        raise BindError("stopped here")

    monkeypatch.setattr(serve, "listen", listen)
    before = [signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)]
    try:
        assert serve.run([]) == 1
    finally:
        for number, handler in zip((signal.SIGHUP, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
    assert handlers == [signal.SIG_IGN]
