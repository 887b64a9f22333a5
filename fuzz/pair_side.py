"""Plausible but odd requests through the complete proxy to both engines, several at once, with clients that disconnect.

Holds: every answer is 200, 4xx or 501; a 200 is whole, names no internal id, and has as many choices as were asked for;
and all of :mod:`fuzz.live`: the simulated engines die or hang as vLLM's do, when they are asked wrongly.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
from hypothesis import strategies as st

from disagg_proxy.openai.fields import MESSAGES, lax_int
from disagg_proxy.request_id import MARKERS
from fuzz.bodies import Odd, drawn, requests
from fuzz.live import Live, Pace, judge, running
from fuzz.pure import Report

CHECK_EVERY = 10
EXAMPLES = 50
"""Batches for one seed of hypothesis."""

_SETTINGS = {"instance_expiry": 60.0}
_ANSWER = aiohttp.ClientTimeout(total=30.0)

_VISITS = st.lists(
    st.tuples(requests(), st.sampled_from(["read"] * 5 + ["leave at once", "leave"])), min_size=1, max_size=8
)


async def run(seed: int, *, seconds: float = 0.0, rounds: int = 0) -> Report:
    """Batches until the time or their number is over; the first finding ends it."""
    report = Report("pair_side", "hypothesis", seed)
    async with running(_SETTINGS, enable_prompt_tokens_details=True) as live:
        pace = Pace(report, seconds, rounds)
        number = 0
        while not report.findings and pace.goes_on():
            if number % EXAMPLES == 0:
                batches = drawn(_VISITS, seed * 1000 + number // EXAMPLES, EXAMPLES)
            number += 1
            visits = batches.pop()
            outcomes = await asyncio.gather(*(_visit(live, report, *visit) for visit in visits), return_exceptions=True)
            for visit, outcome in zip(visits, outcomes, strict=True):
                if isinstance(outcome, BaseException):
                    report.findings.append(f"{type(outcome).__name__}: {outcome}; on {visit}")
            report.executions += len(visits)
            if number % CHECK_EVERY == 0:
                await judge(report, f"batch {number}: {visits}", live.check)
        if not report.findings:
            await judge(report, "the last batch", live.check)
        pace.end()
    return report


async def _visit(live: Live, report: Report, odd: Odd, manner: str) -> None:
    url, head = live.machine.url + odd.route.path, {"Content-Type": "application/json"}
    if manner == "leave at once":
        asking = asyncio.ensure_future(live.session.post(url, data=odd.raw, headers=head))
        await asyncio.sleep(0.001)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        report.labels["left"] += 1
        return
    async with live.session.post(url, data=odd.raw, headers=head, timeout=_ANSWER) as answer:
        if manner == "leave":
            await answer.content.readany()
            answer.close()
            report.labels["left"] += 1
            return
        said = await answer.read()
    if answer.status == 502 and b"failed with status 500" in said:
        # vLLM's word for some mistakes of clients; whether its engine lives is looked at all the same.
        report.labels["502 for an engine's 500"] += 1
        kinds = report.more.setdefault("engine_500s", {})
        kinds.setdefault(json.loads(said)["error"]["message"][:160], odd.raw.decode("latin-1")[:400])
        return
    report.labels[f"{answer.status}"] += 1
    _judge(odd, answer, said)


def _judge(odd: Odd, answer: aiohttp.ClientResponse, said: bytes) -> None:
    assert answer.status == 200 or 400 <= answer.status < 500 or answer.status == 501, (answer.status, said[:500])
    for text in (said, repr(answer.headers).encode()):
        assert not any(marker.encode() in text for marker in MARKERS), "an internal id comes out"
    if answer.status != 200:
        assert "error" in json.loads(said) or json.loads(said).get("object") == "error", said
        return
    body = json.loads(odd.raw)
    if not answer.headers["Content-Type"].startswith("text/event-stream"):
        _count(odd, body, json.loads(said))
        return
    data = [line[6:] for line in said.splitlines() if line.startswith(b"data: ")]
    assert data and (data[-1] == b"[DONE]" or b'"message_stop"' in data[-1] or b'"error"' in data[-1]), data[-3:]


def _count(odd: Odd, body: dict[str, Any], answer: dict[str, Any]) -> None:
    if odd.route is MESSAGES or "error" in answer:
        return
    prompts = body.get("prompt") if "prompt" in body else 1
    many = len(prompts) if isinstance(prompts, list) and prompts and not isinstance(prompts[0], int) else 1
    n = 1 if body.get("n") is None else lax_int(body["n"])
    if odd.route.dialect == "chat":
        many = 1
    assert len(answer["choices"]) == many * (n or 1), answer
