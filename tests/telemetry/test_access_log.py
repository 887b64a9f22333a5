"""The access log: its lines, rotation, and a reader that stalls."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from disagg_power.book import EnergyBook
from disagg_proxy.errors import BadRequest
from disagg_proxy.telemetry import access_log
from disagg_proxy.telemetry.access_log import AccessLog
from tests.command import commands, engine_pairs
from tests.conftest import running_proxy, soon
from tests.power.figures import count_energy
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


def test_a_line_has_the_energy_only_where_it_is_known(desk, tmp_path) -> None:
    book = EnergyBook()
    log = AccessLog(str(tmp_path / "access.log"), energy=book)
    record = desk.recorder.open(PATH, None)
    record.prefill, record.prompt_tokens, record.cached_tokens, record.output_tokens = "prefill:1", 400, 100, 20
    assert "energy_j" not in json.loads(log._line(record))
    count_energy(book, 1000.0)
    line = json.loads(log._line(record))
    assert (line["energy_j"], line["energy_idle_j"]) == (0.0, 300 * 1.0 + 20 * 2.0), "the GPUs drew idle power only"
    log._out.close()


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
    book = EnergyBook()
    count_energy(book, 1000.0)
    out = AccessLog(str(file), worker=3, energy=book)
    record = desk.recorder.open(PATH, None)
    record.output_tokens = 7
    record.end()
    out.take(record)
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


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0.002)


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


async def test_lines_that_cannot_be_written_are_kept_and_the_error_is_logged_once(
    tmp_path, desk, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(access_log, "_FLUSH_INTERVAL", 0.0)
    monkeypatch.setattr(access_log, "_RETRY_INTERVAL", 0.01)
    file, stats = tmp_path / "folder" / "log", desk.recorder.stats
    out = AccessLog(str(file), stats=stats)
    for name in "abc":
        errors = stats.access_log_write_errors
        out.take(ended(desk, name))
        await soon(until(lambda errors=errors: stats.access_log_write_errors > errors + 1))
    assert caplog.text.count("Cannot write the access log (ACCESS_LOG)") == 1
    file.parent.mkdir()
    await soon(written(file, 3))
    out.take(ended(desk, "d"))
    await out.stop()
    assert [one["client_id"] for one in lines(file)] == ["a", "b", "c", "d"]
    assert caplog.text.count("is written again") == 1 and stats.access_log_lines_dropped == 0


@pytest.fixture
def disk(monkeypatch):
    """A disk with ``free`` bytes; once it is full, ``write`` writes what still fits and then fails."""

    class Disk:
        free = 1 << 20
        real = staticmethod(os.write)

        def write(self, fd: int, data: bytes) -> int:
            if not self.free:
                raise OSError(errno.ENOSPC, "No space left on device")
            written = self.real(fd, bytes(data)[: self.free])
            self.free -= written
            return written

    disk = Disk()
    monkeypatch.setattr(access_log.os, "write", disk.write)
    return disk


@pytest.mark.parametrize("others_append", [False, True])
async def test_a_full_disk_loses_no_line_and_fails_no_request(tmp_path, http, disk, monkeypatch, others_append) -> None:
    monkeypatch.setattr(access_log, "_FLUSH_INTERVAL", 0.0)
    monkeypatch.setattr(access_log, "_RETRY_INTERVAL", 0.01)
    file = tmp_path / "log"
    disk.free = 100
    async with running_proxy(access_log=str(file)) as proxy, AsyncExitStack() as stack:
        machine = Machine(proxy, stack, http)
        await machine.pair()
        for number in range(5):
            status, *_ = await machine.post(PATH, REQUESTS[PATH], **{"X-Request-Id": f"r{number}"})
            assert status == 200
        await soon(until(lambda: proxy.services.stats.access_log_write_errors))
        async with http.get(proxy.url + "/metrics") as answer:
            assert re.search(r"access_log_write_errors_total [1-9]", await answer.text())
        if others_append:
            with file.open("ab") as other:
                other.write(b'{"client_id":"other"}\n')
        disk.free = 1 << 20
        await soon(written(file, 5))
    found = [line for line in file.read_bytes().splitlines() if line]
    if others_append:
        assert found.pop(0).endswith(b'{"client_id":"other"}'), "the line of another writer ends the torn one"
    assert [json.loads(line)["client_id"] for line in found] == [f"r{number}" for number in range(5)]


async def test_a_target_that_stays_full_drops_counted_lines_with_one_log_line(
    tmp_path, desk, disk, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(access_log, "_FLUSH_INTERVAL", 0.0)
    monkeypatch.setattr(access_log, "_RETRY_INTERVAL", 0.01)
    monkeypatch.setattr(access_log, "_MAX_BACKLOG", 20_000)
    disk.free, stats, file = 0, desk.recorder.stats, tmp_path / "log"
    out = AccessLog(str(file), stats=stats)
    for _ in range(200):
        out.take(ended(desk))
    await soon(until(lambda: stats.access_log_write_errors > 2))
    dropped = stats.access_log_lines_dropped
    assert 100 < dropped < 200
    assert caplog.text.count("Dropping lines") == caplog.text.count("Cannot write") == 1
    disk.free = 1 << 20
    await soon(until(lambda: not out._out.unwritten))
    out.take(ended(desk, "after"))
    await out.stop()
    *kept, marker, last = lines(file)
    assert (len(kept), marker, last["client_id"]) == (200 - dropped, {"dropped": dropped}, "after")


async def test_lines_that_cannot_be_written_at_shutdown_are_counted(tmp_path, desk, disk, caplog) -> None:
    disk.free, stats = 0, desk.recorder.stats
    out = AccessLog(str(tmp_path / "log"), stats=stats)
    for _ in range(3):
        out.take(ended(desk))
    await soon(out.stop())
    assert stats.access_log_lines_dropped == 3 and re.search(r"Dropped \d+ bytes .* at shutdown", caplog.text)


def test_the_docs_state_what_sigkill_can_lose() -> None:
    bound = f"{access_log._FLUSH_INTERVAL * 1000:.0f} ms or {access_log._FLUSH_BYTES // 1024} KB"
    assert bound in PAGE.read_text(encoding="utf-8") and access_log._FLUSH_INTERVAL <= 0.1


async def test_sigkill_loses_no_line_that_was_flushed(tmp_path, http) -> None:
    file = tmp_path / "log"
    async with commands() as run:
        command = await run("--access-log", str(file))
        await command.until_ready()
        for number in range(40):
            async with http.post(
                command.url + PATH, json=REQUESTS[PATH], headers={"X-Request-Id": f"r{number}"}
            ) as answer:
                assert answer.status == 503
        await soon(written(file, 40))
        command.process.kill()
        await command.process.wait()
    assert [one["client_id"] for one in lines(file)] == [f"r{number}" for number in range(40)]


async def test_a_burst_is_flushed_by_size_before_the_interval(tmp_path, desk, monkeypatch) -> None:
    monkeypatch.setattr(access_log, "_FLUSH_INTERVAL", 3600.0)
    file = tmp_path / "log"
    out = AccessLog(str(file))
    while not out._out.unwritten and not file.exists():
        out.take(ended(desk))
        assert out._waiting < access_log._FLUSH_BYTES
    await soon(until(lambda: not out._out.unwritten))
    assert file.stat().st_size >= access_log._FLUSH_BYTES
    await out.stop()


async def test_a_name_that_is_no_unicode_fails_no_request(tmp_path, http) -> None:
    file = tmp_path / "log"
    async with running_proxy(access_log=str(file)) as proxy:
        for _ in range(2):
            async with http.post(
                proxy.url + PATH, data=b'{"model":"\\ud800","prompt":"x"}', headers={"Content-Type": "application/json"}
            ) as answer:
                assert answer.status in (400, 404, 503), await answer.text()
        await proxy.services.page_view()
    assert len(lines(file)) == 2


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
