"""The live HTTP side: mutated requests over several raw connections at once, in chunks, some closed in the middle.

Holds: what comes back is a sequence of whole, well-framed answers of 200, 4xx, 501 or 505; every connection is closed
within the time limits; and all of :mod:`fuzz.live`.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter

from fuzz.live import Live, Pace, judge, running
from fuzz.mutate import mutants
from fuzz.pure import Report
from fuzz.requests import SEEDS, WORDS
from fuzz.source import Source
from fuzz.wire import answers

AT_ONCE = 120
CHECK_EVERY = 8
"""Rounds between two checks of the engines."""

_LIMIT = 0.4
"""Seconds for a head, for a body, and for a kept connection."""

_SETTINGS = {
    "header_timeout": _LIMIT,
    "body_timeout": _LIMIT,
    "send_timeout": _LIMIT,
    "max_body_bytes": 4096,
    "instance_expiry": 60.0,
}
_LATEST = 20 * _LIMIT
"""Seconds after which a connection counts as kept for nothing; several limits may follow each other."""

_EXPECTED = {200, *range(400, 500), 501, 505}


async def run(seed: int, *, seconds: float = 0.0, rounds: int = 0) -> Report:
    """Rounds of connections until the time or their number is over; the first finding ends it."""
    report = Report("http_side", "seeded", seed)
    rng = random.Random(seed)
    inputs = mutants(seed, SEEDS, WORDS)
    async with running(_SETTINGS) as live:
        live.machine.server.config.timeout_keep_alive = _LIMIT  # type: ignore[assignment]
        pace = Pace(report, seconds, rounds)
        for number in itertools.count(1):
            if not pace.goes_on() or report.findings:
                break
            raws = list(itertools.islice(inputs, AT_ONCE))
            decisions = [rng.randbytes(40) for _ in raws]

            visits = (_visit(live, *both, report.labels) for both in zip(raws, decisions, strict=True))
            outcomes = await asyncio.gather(*visits, return_exceptions=True)
            for raw, cuts, outcome in zip(raws, decisions, outcomes, strict=True):
                if isinstance(outcome, BaseException):
                    report.findings.append(f"{type(outcome).__name__}: {outcome}; on {raw!r} with {cuts!r}")
            report.executions += len(raws)
            if number % CHECK_EVERY == 0:
                await judge(report, f"round {number} with {raws!r}", live.check)
        if not report.findings:
            await judge(report, "the last round", live.check)
        pace.end()
    return report


async def _visit(live: Live, raw: bytes, decisions: bytes, labels: Counter[str]) -> None:
    """One connection: send in chunks, then read to the end, close one direction, or disconnect."""
    source = Source(decisions)
    manner = source.pick(("read", "read", "read", "read", "half-close", "leave", "leave later"))
    reader, writer = await asyncio.open_connection(*live.address)
    said = b""
    try:
        for piece in source.pieces(raw)[:200]:
            writer.write(piece)
            await asyncio.sleep(0)
        if manner == "leave":
            labels["left"] += 1
            return
        if manner == "half-close":
            writer.write_eof()
        if manner == "leave later":
            await asyncio.wait_for(reader.read(1 + source.byte()), _LATEST)
            labels["left"] += 1
            return
        said = await asyncio.wait_for(reader.read(), _LATEST)
    except asyncio.TimeoutError:
        raise
    except OSError:
        labels["reset"] += 1
        return
    finally:
        writer.transport.abort()
    _judge(raw, manner, said, labels)


def _judge(raw: bytes, manner: str, said: bytes, labels: Counter[str]) -> None:
    if b"HEAD" in raw or manner == "half-close":
        # uvicorn takes a half-closed connection for a closed one and may end in mid-answer. HEAD's answers have a
        # length and no body, which no reader can tell without knowing the request.
        statuses = [int(line[:3]) for line in said.split(b"HTTP/1.1 ")[1:] if line[:3] != b"100"]
    else:
        statuses = [status for status, _ in answers(said)]
    for status in statuses:
        assert status in _EXPECTED, f"{status} to {raw!r}: {said!r}"
        labels[str(status)] += 1
    if not statuses:
        labels[f"no answer ({manner})"] += 1
