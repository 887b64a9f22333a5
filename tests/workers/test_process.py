"""The command with several workers: ports, signals, exit codes, and processes left over."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from contextlib import ExitStack

import aiohttp
import pytest

from disagg_proxy.config.reload import LiveSettings
from disagg_proxy.workers.supervisor import Supervisor
from tests.command import LOCAL, commands
from tests.conftest import soon
from tests.ports import hold_port, may_listen


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize(
    ("port", "says"), [("HTTP_PROXY_PORT", "clients on 127.0.0.1:"), ("PROXY_PORT", "instances on 127.0.0.1:")]
)
async def test_a_port_in_use_is_one_line_and_exit_1(port: str, says: str) -> None:
    async with commands() as run:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            command = await run("--workers", "2", **{port: str(taken.getsockname()[1])})
            assert await command.end() == 1
    assert command.written.count("\n") == 1, command.written
    assert says in command.written and port in command.written and "ddress already in use" in command.written


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
async def test_a_signal_ends_all_with_0(fleet, number: int) -> None:
    with ExitStack() as hold:
        ports = hold_port(hold), hold_port(hold)
        proxy = await fleet(2, LOG_LEVEL="info", HTTP_PROXY_PORT=str(ports[0]), PROXY_PORT=str(ports[1]))
        pids = await proxy.pids()
        assert await proxy.end(number) == 0
        assert all(map(gone, pids)), proxy.written
        assert "Traceback" not in proxy.written and " ERROR " not in proxy.written
        assert all(map(may_listen, ports))


async def test_sigterm_lets_running_streams_finish_and_rejects_new_requests(fleet, engines) -> None:
    proxy = await fleet(2, SHUTDOWN_GRACE="20")
    _prefill, decode = pair = await engines(proxy.zmq)
    for engine in pair:
        await proxy.until_known(engine)
    doors = await proxy.doors()
    decode.faults.hold("schedule", after=3)
    stream = await doors[0].begin_stream()
    await soon(decode.wait_until(lambda state: state["held_at"] == "schedule"))
    proxy.process.send_signal(signal.SIGTERM)
    for worker in range(2):
        await proxy.until_written(rf"worker {worker} [^\n]*Stopping")
    async with aiohttp.ClientSession() as session, session.post(proxy.url + "/v1/completions", json={}) as answer:
        assert answer.status == 503 and "shutting down" in await answer.text()
    decode.faults.release()
    assert (await soon(stream.read())).endswith(b"data: [DONE]\n\n")
    assert await proxy.end(0) == 0
    assert "is replaced" not in proxy.written and "killed" not in proxy.written


async def test_a_second_signal_ends_all_at_once(fleet, engines) -> None:
    proxy = await fleet(2, SHUTDOWN_GRACE="600")
    for engine in await engines(proxy.zmq):
        await proxy.until_known(engine)
    pids = await proxy.pids()
    stream = await (await proxy.door()).begin_stream(max_tokens=3000, ignore_eos=True)
    proxy.process.send_signal(signal.SIGTERM)
    await proxy.until_written("supervisor: Stopping:")
    assert await proxy.end(signal.SIGTERM) == 0
    with pytest.raises(aiohttp.ClientError):
        await soon(stream.read())
    assert all(map(gone, pids))


async def test_a_worker_that_is_signalled_directly_ends_gracefully_and_is_replaced(fleet) -> None:
    proxy = await fleet(2)
    pids = await proxy.pids()
    seen = len(proxy.lines)
    os.kill(pids[1], signal.SIGTERM)
    await proxy.until_written(r"Worker 1 has ended \(exit code 0\) and is replaced.*Worker 1 serves again", seen)
    doors = await proxy.doors()
    stats = await doors[0].get("/stats")
    assert [worker["restarts"] for worker in stats["workers"]] == [0, 1]


async def test_workers_end_when_the_supervisor_is_killed(fleet) -> None:
    proxy = await fleet(2)
    proxy.process.kill()
    await soon(proxy.process.wait())
    # The last of them closes what it writes to.
    await soon(proxy._reading)
    assert "The supervisor has ended: shutting down" in proxy.written
    assert all(map(gone, proxy.seen))


async def test_a_stopped_worker_does_not_keep_the_proxy_from_ending(fleet) -> None:
    proxy = await fleet(2, SHUTDOWN_GRACE="0.5")
    pids = await proxy.pids()
    os.kill(pids[0], signal.SIGSTOP)
    assert await proxy.end(signal.SIGTERM) == 0
    assert "Worker 0 did not end in time: killing it" in proxy.written
    assert all(map(gone, pids))


async def test_workers_that_do_not_start_end_the_proxy_with_1(monkeypatch, caplog) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    supervisor = Supervisor(LiveSettings([], {**LOCAL, "WORKERS": "2"}), [])
    assert await soon(supervisor.run()) == 1
    assert "The workers do not start" in caplog.text
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
