"""The latency benchmark: its figures by hand, its client against bytes, and a short run on simulated engines."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from bench.gpu_latency import __main__ as command
from bench.gpu_latency import load, plan, record
from bench.gpu_latency.arms import Arm, DirectOwn, DirectP2p, KvCapacity, Shot, fire
from bench.gpu_latency.figures import Resampled, Sample, compare, figures
from bench.gpu_latency.load import ARMS, Block, balanced_order
from bench.gpu_latency.plan import Phase, seconds_for
from bench.gpu_latency.processes import Machine, Stack
from bench.gpu_latency.prompts import Prompts
from disagg_report.figures import quantile
from disagg_report.load_client import Broken, LoadClient, Response
from disagg_sim import SimConfig, SimEngine
from tests.conftest import soon

# -- figures


def test_quantiles_are_values_of_the_sample() -> None:
    assert quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 2 and quantile([5.0], 0.99) == 5
    assert quantile(list(map(float, range(1, 101))), 0.99) == 99


def test_resampled_quantiles_are_those_of_the_repeated_values() -> None:
    samples = [Sample(0, (1.0, 9.0)), Sample(1, (5.0,)), Sample(2, (7.0, 2.0, 3.0))]
    drawn = sorted([1.0, 9.0] * 2 + [7.0, 2.0, 3.0])
    assert Resampled(samples).at({0: 2, 2: 1}) == [quantile(drawn, 0.5), quantile(drawn, 0.99)]


def test_a_constant_difference_within_pairs_is_certain_only_when_paired() -> None:
    direct = [Sample(i, (float(i * 10),)) for i in range(20)]
    proxy = [Sample(i, (float(i * 10 + 3),)) for i in range(20)]
    paired, unpaired = compare(direct, proxy, paired=True)["p50"], compare(direct, proxy, paired=False)["p50"]
    assert paired["difference"] == 3 and paired["interval"] == [3, 3]
    assert unpaired["interval"][0] < 0 < unpaired["interval"][1]


def shot(arm: str, place: int, sent: float, *arrivals: float, error: str = "") -> Shot:
    made = Shot(arm, 10, place)
    made.sent, made.arrivals, made.error = sent, list(arrivals), error
    return made


def test_low_rates_count_whole_pairs_only() -> None:
    shots = [
        shot("direct", 0, 0.0, 0.1, 0.12), shot("proxy", 0, 1.0, 1.104, 1.125),
        shot("direct", 1, 2.0, 2.5, 2.6), shot("proxy", 1, 3.0, error="Broken: it ended"),
    ]  # fmt: skip
    found = figures(shots)
    assert found["ttft_ms"]["p50"]["direct"] == pytest.approx(100) and found["errors"] == {"direct": 0, "proxy": 1}
    assert found["paired_ttft_ms"] == {"median": 4.0, "interval": [4.0, 4.0], "pairs": 1}
    assert found["itl_ms"]["p99"]["difference"] == pytest.approx(1.0)


def test_saturating_load_counts_what_lies_within_its_blocks() -> None:
    blocks = [Block("direct", 10.0, 20.0), Block("proxy", 30.0, 40.0)]
    shots = [
        shot("direct", 0, 9.0, 9.5, 11.0), shot("direct", 0, 12.0, 12.2, 12.3, 21.0),
        shot("proxy", 1, 31.0, 31.3, 31.5), shot("proxy", 1, 39.9, 41.0, 41.1),
    ]  # fmt: skip
    found = figures(shots, blocks)
    assert found["requests"] == {"direct": 1, "proxy": 2}
    assert found["tokens_per_s"] == {"direct": 0.3, "proxy": 0.2}
    assert found["itl_ms"]["p99"] == {"direct": 100, "proxy": 200, "difference": 100, "interval": [100, 100]}


def test_what_is_written_can_be_read_again(tmp_path: Path) -> None:
    written = record.Measured(
        "x",
        [shot("direct", 0, 5.0, 5.25, 5.5), shot("proxy", 1, 7.0, error="e")],
        [Block("direct", 5.5, 6.0)],
        {"a": 1},
    )
    record.append(tmp_path, written)
    (read,) = record.load(tmp_path)
    assert [one.arrivals for one in read.shots] == [[0.25, 0.5], []] and read.shots[1].error == "e"
    assert read.blocks == [Block("direct", 0.5, 1.0)] and (read.name, read.beside) == ("x", {"a": 1})


# -- plan


def test_each_arm_comes_first_in_half_of_the_pairs() -> None:
    assert Counter(order[0] for order in balanced_order(20, seed=1)) == {"direct": 10, "proxy": 10}


@pytest.mark.parametrize(
    ("left", "first"),
    [(5, 0), (12, 12), (25, 12.5), (40, 20), (1000, 60)],
    ids=["too little", "only the first", "two, the last gives way", "even", "no more than its most"],
)
def test_time_is_shared_and_the_last_phases_give_way(left: float, first: float) -> None:
    phases = [Phase("low", 10, 1.0, 10, 60), Phase("low", 20, 1.0, 12, 60), Phase("low", 30, 1.0, 30, 60)]
    if left == 40:
        phases.pop()
    assert seconds_for(phases, left) == first


# -- client and arms


@asynccontextmanager
async def served(*pieces: bytes, cut: bool = False) -> AsyncIterator[LoadClient]:
    """A client of a server that answers with ``pieces``, each sent by itself, and may then cut the connection."""
    ended = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.01)
            if not cut:
                await reader.read()
        except ConnectionError:
            pass
        finally:
            writer.close()
            ended.set()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    client = LoadClient("http://{}:{}".format(*server.sockets[0].getsockname()))
    async with server:
        try:
            yield client
        finally:
            client.close()
            await ended.wait()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


async def test_events_are_told_apart_wherever_they_are_cut() -> None:
    event = b'data: {"choices":[{"text":"a"}]}\n\n'
    usage = b'data: {"choices":[],"usage":{"completion_tokens":2}}\n\ndata: [DONE]\n\n'
    chunks = b"%x\r\n%b\r\n" % (len(event), event), b"%x\r\n%b\r\n" % (len(event + usage), event + usage), b"0\r\n\r\n"
    whole = b"".join(chunks)
    first: list[int] = []
    async with served(HEAD + whole[:20], whole[20:45], whole[45:]) as client:
        answer = await client.post("/x", b"{}", Response(stream=True, on_first=lambda: first.append(1)))
    assert (answer.status, len(answer.arrivals), answer.completion_tokens, answer.done) == (200, 2, 2, True)
    assert answer.arrivals[1] >= answer.arrivals[0] and first == [1]


async def test_a_cut_answer_is_broken() -> None:
    async with served(HEAD + b"5\r\nda", cut=True) as client:
        with pytest.raises(Broken, match="closed by the other side"):
            await client.post("/x", b"{}", Response(stream=True))


async def test_room_for_kv_goes_to_who_came_first() -> None:
    room = KvCapacity(10)
    await room.take(6)
    tasks = [asyncio.create_task(room.take(size)) for size in (7, 2)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in tasks), "the small one does not overtake"
    room.give(6)
    await asyncio.gather(*tasks)
    await soon(asyncio.gather(asyncio.create_task(room.take(50)), _give(room, 9)))


async def _give(room: KvCapacity, size: int) -> None:
    room.give(size)


@pytest.mark.parametrize("connector", ["p2p_nccl", "disagg_kv"])
async def test_direct_asks_both_engines_as_they_want_it(connector: str) -> None:
    engines = [SimEngine(SimConfig(role=role, connector=connector)) for role in ("prefill", "decode")]  # type: ignore[arg-type]
    for engine in engines:
        await engine.start()
    prefill, decode = engines
    clients = [LoadClient(f"http://{engine.http_address}") for engine in engines]
    arm: Arm = DirectOwn(*clients, prefill.kv_address)
    if connector == "p2p_nccl":
        arm = DirectP2p(*clients, (prefill.kv_address, decode.kv_address), KvCapacity(10**9), 1000)
    try:
        prompts = Prompts("sim-model", seed=1)
        made = [await fire(arm, prompts.body(100, 5), Shot("direct", 100, i)) for i in range(3)]
        assert [one.error for one in made] == [""] * 3 and all(len(one.arrivals) == 5 for one in made)
        assert all(one.prefill > 0 for one in made)
        asked = [[one.json for one in engine.requests if one.method == "POST"] for engine in engines]
        assert [body["prompt"] for body in asked[0]] == [body["prompt"] for body in asked[1]]
        assert len({tuple(body["prompt"][:16]) for body in asked[0]}) == 3, "no block is in a prefix cache"
        answer = await clients[1].get("/metrics")
        loaded = [line for line in answer.body.decode().splitlines() if 'source="external_kv_transfer"' in line]
        assert float(loaded[0].rsplit(" ", 1)[1]) >= 3 * 96
    finally:
        for client in clients:
            client.close()
        for engine in engines:
            await engine.stop()


async def test_an_answer_that_is_too_short_is_an_error() -> None:
    class Short:
        name = "proxy"

        async def ask(self, body: object, shot: Shot) -> Response:
            answer = Response()
            answer.status, answer.done, answer.usage = 200, True, {"completion_tokens": 3}
            return answer

    made = await fire(Short(), Prompts("m", 1).body(10, 4), Shot("proxy", 10, 0))
    assert made.error == "Refused: 3 tokens of 4, [DONE]: True"


# -- processes


def machine(tmp_path: Path, **more: object) -> Machine:
    return Machine(**{"model": "/m", "connector": "p2p_nccl", "engines": "vllm", "python": "python3",
                      "out": tmp_path, "per_token": 10, **more})  # type: ignore[arg-type]  # fmt: skip


@pytest.mark.parametrize(("connector", "eager", "expected"), [
    ("p2p_nccl", "auto", (True, True)), ("own", "auto", (False, False)), ("p2p_nccl", "prefill", (True, False)),
    ("own", "1", (True, True)),
])  # fmt: skip
def test_engines_get_the_flags_of_the_script(
    connector: str, eager: str, expected: tuple[bool, bool], tmp_path: Path
) -> None:
    stack = Stack(machine(tmp_path, connector=connector, eager=eager))
    engines = (stack.prefill, stack.decode)
    assert tuple("--enforce-eager" in one.command for one in engines) == expected
    configs = [json.loads(one.command[one.command.index("--kv-transfer-config") + 1]) for one in engines]
    assert [one["kv_role"] for one in configs] == ["kv_producer", "kv_consumer"]
    assert [one.environment["CUDA_VISIBLE_DEVICES"] for one in engines] == ["0", "1"]
    p2p = connector == "p2p_nccl"
    assert ("--no-enable-prefix-caching" in stack.decode.command) is p2p
    assert ("--kv-buffer-bytes" in stack.proxy.command) is p2p
    assert configs[1].get("kv_load_failure_policy") == (None if p2p else "recompute")


@pytest.mark.parametrize("connector", ["p2p_nccl", "own"])
def test_a_short_run_on_simulated_engines(connector: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (plan, load):
        monkeypatch.setattr(module, "RAMP", 0.1)
    monkeypatch.setattr(plan, "DRAIN", 0.2)
    arguments = [
        "--engines", "sim", "--connector", connector, "--out", str(tmp_path),
        "--limit", "50", "--least", "0.8", "--most", "4",
        "--tokens", "300", "--answer", "4", "--rates", "20", "--clients", "4",
        "--engine-argument=--time-per-output-token", "--engine-argument=0.002",
    ]  # fmt: skip
    assert command.main(arguments) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(result["phases"]) == ["low 300", "saturating 300"] and "error" not in result
    for phase in result["phases"].values():
        # How many fit into a phase is the machine's speed.
        assert all(phase["requests"][arm] for arm in ARMS)
        assert phase["errors"] == dict.fromkeys(ARMS, 0)
        assert phase["prompt_tokens_from_prefill"] >= 0.9 * phase["prompt_tokens"]
    assert [one["arm"] for one in result["phases"]["saturating 300"]["blocks"]] == [ARMS[0], ARMS[1], ARMS[1], ARMS[0]]
    assert (tmp_path / "table.md").read_text().count("| TTFT p50, ms |") == 2
    assert command.main(["--report", "--out", str(tmp_path)]) == 0
    again = json.loads((tmp_path / "result.json").read_text())
    for name, phase in result["phases"].items():
        for share, row in phase["ttft_ms"].items():
            assert again["phases"][name]["ttft_ms"][share]["proxy"] == pytest.approx(row["proxy"], abs=0.01)


def test_an_engine_that_does_not_start_is_said_and_nothing_is_left(tmp_path: Path) -> None:
    arguments = ["--engines", "sim", "--limit", "30", "--out", str(tmp_path), "--engine-argument=--no-such-flag"]
    assert command.main(arguments) == 1
    error = json.loads((tmp_path / "result.json").read_text())["error"]
    assert error.startswith("start: NotReady: ") and "--no-such-flag" in error
