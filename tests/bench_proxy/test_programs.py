"""The engine and the load generator: that they are right about right answers, and notice wrong ones."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.proxy import machine, short
from bench.proxy.machine import Cores, Unable
from bench.proxy.slices import floor_us

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    cache = tmp_path_factory.mktemp("programs")
    return {name: machine.build(name, cache) for name in ("engine", "load")}


@pytest.fixture
def engine(programs: dict[str, Path]) -> Iterator[tuple[int, int]]:
    """Its ports."""
    with subprocess.Popen([programs["engine"]], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        prefill, decode = map(int, process.stdout.readline().split())
        yield prefill, decode
        process.kill()


async def load(programs: dict[str, Path], *arguments: object) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Slices and the end."""
    process = await asyncio.create_subprocess_exec(
        programs["load"], *map(str, arguments), stdout=asyncio.subprocess.PIPE
    )
    said = [json.loads(line) for line in (await process.communicate())[0].splitlines()]
    assert process.returncode == (3 if said[-1]["failed"] else 0)
    return said[:-1], said[-1]


@needs_gcc
@pytest.mark.parametrize("stream", [True, False])
async def test_right_answers(stream: bool, programs: dict[str, Path], engine: tuple[int, int]) -> None:
    kind = ("--stream", "--tokens", 7) if stream else ("--body", 70_000)
    times = ("--clients", 4, "--warmup", 0.1, "--duration", 1.2, "--cached", 4)
    (one,), end = await load(programs, "--port", engine[1], "--prefill-port", engine[0], *kind, *times)
    assert end["failed"] == 0 and end["failures"] == {} and end["answered"] >= one["requests"] > 0
    assert abs(one["tokens"] - one["requests"] * (7 if stream else 1)) <= 4 * 7
    counted = {name: sum(count for _, count in one[name]) for name in ("ttft", "delay", "latency")}
    assert counted["latency"] == one["requests"] and counted["delay"] == (one["tokens"] if stream else 0)


@needs_gcc
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("api", ["completions", "chat", "tools", "messages"])
async def test_every_api_is_spoken(api: str, stream: bool, programs: dict[str, Path], engine: tuple[int, int]) -> None:
    kind = ("--stream", "--tokens", 7) if stream else ()
    times = ("--clients", 4, "--warmup", 0.1, "--duration", 1.2, "--cached", 4)
    (one,), end = await load(programs, "--port", engine[1], "--prefill-port", engine[0], "--api", api, *kind, *times)
    assert end["failures"] == {} and end["answered"] >= one["requests"] > 0


@needs_gcc
async def test_a_pace_is_kept(programs: dict[str, Path], engine: tuple[int, int]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", engine[0])
    writer.write(b"GET /set?gap_us=100000&lockstep=1 HTTP/1.1\r\n\r\n")
    assert (await reader.readline()).endswith(b"200 OK\r\n")
    writer.close()
    streams = ("--stream", "--tokens", 50, "--clients", 20, "--hold")
    (one,), _ = await load(programs, "--port", engine[1], *streams, "--warmup", 0.2, "--duration", 1.1)
    assert 180 <= one["tokens"] <= 240 and one["open"] == 20


@needs_gcc
async def test_sigterm_ends_the_measuring_orderly(programs: dict[str, Path], engine: tuple[int, int]) -> None:
    process = await asyncio.create_subprocess_exec(
        programs["load"], "--port", str(engine[1]), "--warmup", "0", "--duration", "600", stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    await process.stdout.readline()
    process.terminate()
    assert json.loads((await process.communicate())[0].splitlines()[-1])["failed"] == 0 and process.returncode == 0


USAGE = '"usage":{"cached_tokens":0}'
TOKENS = [f'data: {{"text":" tok000{number}"}}\n\n' for number in range(3)]
RIGHT = [*TOKENS, f"data: {{{USAGE}}}\n\n", "data: [DONE]\n\n"]


@needs_gcc
@pytest.mark.parametrize(
    ("events", "failure"),
    [
        (RIGHT, None),
        ([TOKENS[1], TOKENS[0], *RIGHT[2:]], "order"),
        (RIGHT[1:], "order"),
        ([*TOKENS[:2], *RIGHT[3:]], "count"),
        ([*TOKENS, *RIGHT], "order"),
        (RIGHT[:-1], "unfinished"),
        ([*TOKENS, "data: [DONE]\n\n"], "unfinished"),
        ([*TOKENS, RIGHT[3].replace("0}", "5}"), RIGHT[4]], "wrong usage"),
        (['data: {"id":"___prefill_addr_1.2.3.4:5"}\n\n', *RIGHT], "shown id"),
    ],
)
async def test_wrong_answers_are_noticed(events: list[str], failure: str | None, programs: dict[str, Path]) -> None:
    body = "".join(f"{len(event):x}\r\n{event}\r\n" for event in events) + "0\r\n\r\n"
    end = await against(programs, f"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{body}")
    assert (failure in end["failures"]) if failure else (end["failures"] == {} and end["answered"] > 0)


@needs_gcc
@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        ("HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n", "status"),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab", "cut"),
        ("", "cut"),
    ],
)
async def test_failing_servers_are_noticed(answer: str, failure: str, programs: dict[str, Path]) -> None:
    end = await against(programs, answer, stays=failure != "cut")
    assert list(end["failures"]) == [failure] and end["answered"] == 0


async def against(programs: dict[str, Path], answer: str, stays: bool = True) -> dict[str, Any]:
    """What load says of a server that gives everybody this answer."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]
                await reader.readexactly(int(length))
                writer.write(answer.encode())
                if not stays:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    checks = ("--stream", "--tokens", 3, "--hidden", "--cached", 0)
    _, end = await load(programs, "--port", port, *checks, "--clients", 1, "--warmup", 0, "--duration", 0.1)
    server.close()
    await server.wait_closed()
    return end


@needs_gcc
def test_both_sides_have_the_same_classes_of_times(tmp_path: Path) -> None:
    source = tmp_path / "classes.c"
    source.write_text(
        f'#include "{machine.HERE / "histogram.h"}"\n'
        "static struct histogram h;\n"
        'int main(void) { unsigned long long ns; while (scanf("%llu", &ns) == 1) {\n'
        ' add_ns(&h, ns); for (int i = 0; i < CLASSES; i++) if (h.counts[i]) printf("%d\\n", i);\n'
        ' memset(&h, 0, sizeof h); } if (0) print_and_clear("", &h); }\n'
    )
    subprocess.run(["gcc", "-o", tmp_path / "classes", source], check=True)
    times = [100 * int(1.37**step) for step in range(70)]
    said = subprocess.run([tmp_path / "classes"], input=" ".join(map(str, times)), capture_output=True, text=True)
    for ns, number in zip(times, map(int, said.stdout.split()), strict=True):
        assert floor_us(number) * 1000 <= ns < floor_us(number + 1) * 1000, ns


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    core = min(machine.os.sched_getaffinity(0))
    with pytest.raises(Unable, match="two cores are needed"):
        machine.check(Cores(core, core))
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "gcc" else tool)
    with pytest.raises(Unable, match="gcc is not installed"):
        machine.check(Cores(0, 1))
    assert short.run(Cores(0, 1), tmp_path, record=False) == 0


def test_nothing_of_a_program_is_left_over() -> None:
    stubborn = ["sh", "-c", "(trap '' TERM; exec sleep 60) & echo $!; wait"]
    with machine.running(stubborn, core(), log=subprocess.PIPE) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert child in machine.tree(process.pid) and machine.rss_kb([child]) > 0
    assert machine.rss_kb([child]) == 0


def core() -> int:
    return min(machine.os.sched_getaffinity(0))
