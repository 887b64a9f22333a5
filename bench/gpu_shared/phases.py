"""What is measured and checked, one function each. Each yields findings as they come; see ``__main__``."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from bench.gpu_shared.engines import Answer, Client, Engine
from bench.gpu_shared.stages import durations, medians, moments, read_events

Finding = dict[str, Any]
Findings = AsyncIterator[Finding]
BLOCK = 16
"""Tokens of a block on a GPU."""


@dataclass
class Bench:
    """One run.

    Attributes:
        decode: behind the proxy.
        other: a second decode, not announced, that uses IPC.
        tcp: a third one that uses TCP.
    """

    client: Client
    proxy_port: int
    prefill: Engine
    decode: Engine
    other: Engine
    tcp: Engine
    plain: Engine
    lengths: tuple[int, ...] = (1000, 4000, 8000)
    rounds: int = 30
    deadline: float = 0.0
    random: random.Random = field(default_factory=lambda: random.Random(1))

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def prompt(self, length: int) -> list[int]:
        return [self.random.randrange(5, 8000) for _ in range(length)]

    @property
    def decodes(self) -> tuple[Engine, ...]:
        return (self.decode, self.other, self.tcp)


async def answers(bench: Bench) -> Findings:
    """All prompt lengths modulo the block size, 16 tokens each, beside the plain engine.

    The plain engine is asked twice: the second time it has all complete blocks in its cache and computes 1 to 16 tokens
    of the prompt. Only with one (length 1 modulo 16) it computes exactly as decode does, so that every logprob must be
    equal; the others differ by rounding where two tokens are about equally likely. That the KV itself is right is shown
    by ``verify``, which compares all bytes of both caches after each read.
    """
    bench.decode.aids.write_text("verify")
    before = (await bench.client.metrics(bench.decode))["loaded"]
    rows, wanted = [], 0
    for length in [*range(10 * BLOCK + 1, 11 * BLOCK + 1), *range(100 * BLOCK + 1, 101 * BLOCK + 1)]:
        if bench.left < 30:
            break
        ids = bench.prompt(length)
        wanted += length
        got = await bench.client.complete(bench.proxy_port, ids, 16)
        await bench.client.complete(bench.plain.port, ids, 1)
        warm = await bench.client.complete(bench.plain.port, ids, 16)
        rows.append((length, got, warm))
        if got.status != 200 or (length % BLOCK == 1 and got.logprobs != warm.logprobs):
            yield {"length": length, "status": got.status, "logprobs": got.logprobs[:3], "plain": warm.logprobs[:3]}
    bench.decode.aids.write_text("")
    one = [row for row in rows if row[0] % BLOCK == 1]
    checks = [json.loads(line) for path in [bench.decode.aids.with_suffix(".verified")] if path.exists()
              for line in path.read_text().splitlines()]  # fmt: skip
    yield {
        "prompts": len(rows),
        "answered": sum(got.status == 200 for _, got, _ in rows),
        "tokens_loaded": (await bench.client.metrics(bench.decode))["loaded"] - before,
        "tokens_wanted": wanted,
        "length_1_modulo_16_all_16_logprobs_equal": f"{sum(g.logprobs == w.logprobs for _, g, w in one)} of {len(one)}",
        "texts_equal": f"{sum(got.text == warm.text for _, got, warm in rows)} of {len(rows)}",
        "first_tokens_logprob_largest_difference": max(
            (abs(g.logprobs[0] - w.logprobs[0]) for _, g, w in rows if g.logprobs and w.logprobs), default=None),
        "reads_verified": len(checks),
        "rows_that_differ": sum(check["rows_that_differ"] for check in checks),
    }  # fmt: skip


async def first_tokens(bench: Bench) -> Findings:
    """TTFT on each way, one request at a time, the ways in turn; then where it goes, by the traces.

    Ways: the plain engine, the proxy with prefill and decode, both legs sent by the client to the decode with IPC, and
    to the one with TCP.
    """
    ways = {
        "plain": lambda ids: bench.client.complete(bench.plain.port, ids, 2),
        "proxy": lambda ids: bench.client.complete(bench.proxy_port, ids, 2),
        "direct": lambda ids: bench.client.pair(bench.prefill, bench.other, ids, 2),
        "direct tcp": lambda ids: bench.client.pair(bench.prefill, bench.tcp, ids, 2),
    }
    decode_of = {"proxy": bench.decode, "direct": bench.other, "direct tcp": bench.tcp}
    for name, way in ways.items():
        yield {"first_request_ms": name, "ms": round((await way(bench.prompt(500))).ttft * 1000, 1)}
    for length in bench.lengths:
        seen: dict[str, list[Answer]] = {name: [] for name in ways}
        for _ in range(bench.rounds):
            if bench.left < 100:
                break
            for name, way in ways.items():
                answer = await way(bench.prompt(length))
                if answer.status == 200:
                    seen[name].append(answer)
        plain = [one.ttft for one in seen["plain"]]
        if not plain:
            return
        for name, found in seen.items():
            times = sorted(one.ttft * 1000 for one in found)
            if times:
                yield {"ttft_ms": name, "tokens": length, "n": len(times), "p50": round(statistics.median(times), 2),
                       "p90": round(times[len(times) * 9 // 10], 2), "least": round(times[0], 2),
                       "times_plain": round(statistics.median(times) / statistics.median(plain) / 1000, 3)}  # fmt: skip
        prefill_events = read_events(bench.prefill.trace)
        for name, engine in decode_of.items():
            events = [*prefill_events, *read_events(engine.trace)]
            stages = medians([durations(moments(events, one.start, one.first)) for one in seen[name]])
            yield {"stages_ms": name, "tokens": length, **stages}


async def transfers(bench: Bench) -> Findings:
    """Bytes per second of each decode's reads of more than 100 MB, and how long its transport took to open."""
    for engine in bench.decodes:
        events = read_events(engine.trace)
        rates, start = [], 0.0
        for event in events:
            if event["event"] == "receive":
                start = event["time"]
            elif event["event"] == "received" and start and event["bytes"] > 100e6:
                rates.append(event["bytes"] / (event["time"] - start) / 1e9)
        yield {
            "transfers_of": engine.name,
            "n": len(rates),
            "gb_per_s_p50": round(statistics.median(rates), 1) if rates else None,
            "gb_per_s_best": round(max(rates), 1) if rates else None,
            "opened": [(event["transport"], event["seconds"]) for event in events if event["event"] == "opened"],
        }
    stats = await bench.client.get(bench.proxy_port, "/stats")
    for instance in stats.get("instances", ()):
        yield {"role": instance["role"], "kv_transports": instance["kv_transports"]}


async def _until_zero(bench: Bench, engine: Engine, seconds: float = 20) -> bool:
    """Whether an engine's KV cache is free again. It writes its figures at the end of a step, so it gets some."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        await bench.client.complete(engine.port, bench.prompt(8), 1)
        if (await bench.client.metrics(engine))["usage"] == 0:
            return True
        await asyncio.sleep(0.3)
    return False


async def memory(bench: Bench) -> Findings:
    """No engine that lives holds a block."""
    for engine in (bench.prefill, *bench.decodes, bench.plain):
        if engine.process.alive:
            yield {"free_again": engine.name, "ok": await _until_zero(bench, engine)}


async def _until_event(engine: Engine, event: str, since: float, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if any(one["event"] == event and one["time"] > since for one in read_events(engine.trace)):
            return True
        await asyncio.sleep(0.02)
    return False


async def decode_killed(bench: Bench) -> Findings:
    """Kill decode during a copy: prefill keeps serving others, and its blocks are freed."""
    bench.decode.aids.write_text("long")
    since = time.time()
    asked = [asyncio.create_task(bench.client.complete(bench.proxy_port, bench.prompt(6000), 16)) for _ in range(4)]
    reading = await _until_event(bench.decode, "receive", since, 20)
    await asyncio.sleep(0.3)
    bench.decode.process.kill()
    done = await asyncio.gather(*asked)
    bench.decode.aids.write_text("")
    yield {"decode_killed_while_it_read": reading, "statuses": [one.status for one in done]}
    before = (await bench.client.metrics(bench.other))["loaded"]
    after = await bench.client.pair(bench.prefill, bench.other, bench.prompt(3000), 8)
    loaded = (await bench.client.metrics(bench.other))["loaded"] - before
    yield {"prefill_alive": bench.prefill.process.alive, "other_decode": after.status, "tokens_loaded": loaded}
    yield {"free_again": "prefill", "ok": await _until_zero(bench, bench.prefill)}


async def prefill_killed(bench: Bench) -> Findings:
    """Prefill dies while decode reads its memory: decode survives, uses nothing of it, and answers right."""
    ids = [bench.prompt(6001 + 16 * number) for number in range(4)]
    wanted = [await bench.client.complete(bench.plain.port, one, 16) for one in ids]
    bench.other.aids.write_text("long")
    before, since = (await bench.client.metrics(bench.other))["loaded"], time.time()
    asked = [asyncio.create_task(bench.client.pair(bench.prefill, bench.other, one, 16)) for one in ids]
    reading = await _until_event(bench.other, "receive", since, 20)
    await asyncio.sleep(0.3)
    bench.prefill.process.kill()
    start = time.monotonic()
    done = await asyncio.gather(*asked)
    bench.other.aids.write_text("")
    yield {
        "prefill_killed_while_it_was_read": reading,
        "statuses": [one.status for one in done],
        "seconds": round(time.monotonic() - start, 2),
        "decode_alive": bench.other.process.alive,
        "texts_equal": sum(one.text == other.text for one, other in zip(done, wanted, strict=True)),
        "tokens_loaded": (await bench.client.metrics(bench.other))["loaded"] - before,
    }
    again = await bench.client.complete(bench.other.port, bench.prompt(500), 16)
    yield {"decode_after_that": again.status, "ok": await _until_zero(bench, bench.other)}


async def prefill_back(bench: Bench) -> Findings:
    """A new prefill process on the same ports: its memory is mapped anew. Skipped where time is short."""
    if bench.left < 150:
        yield {"prefill_back": "skipped", "seconds_left": round(bench.left)}
        return
    bench.prefill.process.start()
    ready = await bench.client.ready(bench.prefill.port, bench.deadline - 15, bench.prefill.process)
    before = (await bench.client.metrics(bench.other))["loaded"]
    after = await bench.client.pair(bench.prefill, bench.other, bench.prompt(3000), 8) if ready else None
    loaded = (await bench.client.metrics(bench.other))["loaded"] - before
    yield {"prefill_back": ready, "status": after and after.status, "tokens_loaded": loaded}
