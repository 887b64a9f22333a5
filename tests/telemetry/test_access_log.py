"""The access log: its lines, rotation, and a reader that stalls."""

from __future__ import annotations

import asyncio
import json
import os
import re
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from disagg_proxy.errors import BadRequest
from disagg_proxy.telemetry import access_log
from disagg_proxy.telemetry.access_log import AccessLog
from tests.command import commands, engine_pairs
from tests.conftest import running_proxy, soon
from tests.simulated import REQUESTS, Machine
from tests.telemetry.metrics import PAGE

PATH = "/v1/completions"
SECRET = "a secret prompt"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def ended(desk, client_id: str | None = None):
    record = desk.recorder.open(PATH, client_id)
    record.end()
    return record


async def test_a_line_for_every_request_and_no_secrets(tmp_path, http) -> None:
    file = tmp_path / "access.log"
    async with running_proxy(access_log=str(file), api_key="sk-secret") as proxy, AsyncExitStack() as stack:
        machine = Machine(proxy, stack, http)
        pair = await machine.pair()
        key = {"Authorization": "Bearer sk-secret"}
        for path, body in REQUESTS.items():
            field = "prompt" if "prompt" in body else "messages"
            secret = SECRET if field == "prompt" else [{"role": "user", "content": SECRET}]
            await machine.stream(path, {**body, field: secret}, **key, **{"X-Request-Id": "mine"})
        await machine.post(PATH, {"prompt": [SECRET, 1], "secret": SECRET}, **key)
        await machine.unharmed(*pair)
        await proxy.until_idle()
        assert not file.exists() or lines(file), "written after the responses"
    found = lines(file)
    assert [(one["route"], one["status"], one["outcome"]) for one in found] == [
        *((path, 200, "ok") for path in REQUESTS), (PATH, 400, "client_error"),
    ]  # fmt: skip
    first = found[0]
    assert first["client_id"] == "mine" and first["stream"] and first["ttft_ms"] < first["total_ms"] < 20_000
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["time"])
    assert "secret" not in file.read_text() and "127.0.0.1:" + proxy.url.rpartition(":")[2] not in file.read_text()


async def test_the_docs_list_its_fields(tmp_path, desk) -> None:
    file = tmp_path / "log"
    out = AccessLog(str(file), worker=3)
    out.take(ended(desk))
    await out.stop()
    section = PAGE.read_text(encoding="utf-8").split("## The access log")[1].split("\n## ")[0]
    names = {name for row in re.findall(r"^\| (`.*?) \|", section, re.M) for name in re.findall(r"`(\w+)`", row)}
    assert set(lines(file)[0]) == names and lines(file)[0]["worker"] == 3


@pytest.mark.parametrize("hostile", ["a\nb", 'x"}\n{"y', "\u2028\x1b[31m", "\x00", "é"])
async def test_hostile_ids_stay_in_their_line(tmp_path, desk, hostile: str) -> None:
    file = tmp_path / "log"
    out = AccessLog(str(file))
    record = ended(desk, hostile)
    record.model = hostile
    out.take(record)
    await out.stop()
    (line,) = file.read_bytes().split(b"\n")[:-1]
    assert not re.search(rb"[\x00-\x1f]", line)
    assert (json.loads(line)["client_id"], json.loads(line)["model"]) == (hostile, hostile)


async def test_a_rejected_request(tmp_path, desk) -> None:
    file = tmp_path / "log"
    out = AccessLog(str(file))
    record = desk.recorder.open(PATH, None)
    record.fail(BadRequest("x"))
    record.end()
    out.take(record)
    await out.stop()
    (line,) = lines(file)
    assert (line["status"], line["cause"], line["decode"], line["ttft_ms"]) == (400, "invalid_request", None, None)


async def written(path: Path, count: int) -> None:
    while not path.exists() or len(path.read_bytes().splitlines()) < count:
        await asyncio.sleep(0.005)


async def test_a_renamed_or_removed_file_is_reopened(tmp_path, desk, monkeypatch) -> None:
    monkeypatch.setattr(access_log, "_FLUSH_INTERVAL", 0.0)
    file = tmp_path / "log"
    out = AccessLog(str(file))
    out.take(ended(desk, "one"))
    await soon(written(file, 1))
    file.rename(tmp_path / "log.1")
    out.take(ended(desk, "two"))
    await soon(written(file, 1))
    file.unlink()
    out.take(ended(desk, "three"))
    await soon(written(file, 1))
    await out.stop()
    assert [one["client_id"] for one in lines(tmp_path / "log.1")] == ["one"]
    assert [one["client_id"] for one in lines(file)] == ["three"]


async def test_a_write_error_is_logged_once_and_logging_continues(tmp_path, desk, monkeypatch, caplog) -> None:
    monkeypatch.setattr(access_log, "_FLUSH_INTERVAL", 0.0)
    file = tmp_path / "folder" / "log"
    out = AccessLog(str(file))
    for _ in range(3):
        out.take(ended(desk))
        while out._timer is not None or out._out.unwritten:
            await asyncio.sleep(0.001)
    assert caplog.text.count("Cannot write the access log (ACCESS_LOG)") == 1
    file.parent.mkdir()
    out.take(ended(desk, "at last"))
    await out.stop()
    assert [one["client_id"] for one in lines(file)] == ["at last"]


async def test_a_stalled_reader_delays_nothing_and_gets_the_number_of_dropped_lines(desk, monkeypatch, caplog) -> None:
    monkeypatch.setattr(access_log, "_FLUSH_INTERVAL", 0.0)
    monkeypatch.setattr(access_log, "_MAX_BACKLOG", 100_000)
    reader, writer = os.pipe()
    out = AccessLog("-")
    out._out._file = writer
    for _ in range(3000):
        out.take(ended(desk))
        if out._timer is not None and len(out._lines) > 50:
            await asyncio.sleep(0)
    assert out._dropped or "dropped" in caplog.text
    assert out._waiting + out._out.unwritten < 110_000
    os.set_blocking(reader, False)
    whole = b""

    async def read() -> None:
        nonlocal whole
        while b'"dropped"' not in whole:
            try:
                whole += os.read(reader, 1 << 20)
            except BlockingIOError:
                out.take(ended(desk))
                await asyncio.sleep(0.001)

    await soon(read())
    found = [json.loads(line) for line in whole.splitlines()[:-1]]
    assert len(found) > 100
    await out.stop()
    os.close(reader)
    os.close(writer)


async def test_pending_lines_are_written_at_shutdown_and_workers_share_a_file(tmp_path, http) -> None:
    file = tmp_path / "log"
    async with commands() as run, engine_pairs() as engines:
        command = await run("--workers", "2", "--access-log", str(file), LOG_LEVEL="debug")
        await command.until_ready()
        await engines(command.zmq)
        await command.until_written("(?s)(worker 0 .*decode \\S+ is ready.*worker 1 .*decode \\S+ is ready|worker 1 .*"
                                    "decode \\S+ is ready.*worker 0 .*decode \\S+ is ready)")  # fmt: skip
        for _ in range(10):
            async with http.post(command.url + PATH, json=REQUESTS[PATH], headers={"Connection": "close"}) as answer:
                await answer.read()
        assert await command.end(15) == 0
    found = lines(file)
    assert len(found) == 10 and {one["worker"] for one in found} <= {0, 1}


async def test_standard_output(http) -> None:
    async with commands() as run:
        command = await run("--access-log", "-")
        await command.until_ready()
        async with http.post(command.url + PATH, json=REQUESTS[PATH]) as answer:
            assert answer.status == 503
        line = json.loads(await soon(command.process.stdout.readline()))
        assert (line["outcome"], line["status"]) == ("no_pair", 503)
        assert await command.end(15) == 0
