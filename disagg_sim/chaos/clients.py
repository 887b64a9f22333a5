"""The clients: each sends one request at its planned time, checks the answer, and leaves if the plan says so."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from disagg_sim.chaos.plan import PlannedRequest
from disagg_sim.chaos.work import MESSAGES, Work

RIGHT, WRONG, REFUSED, CUT, LEFT, LATE, DROPPED = "right", "wrong", "refused", "cut", "left", "late", "dropped"
"""How a request ends for its client. ``cut``: the answer broke off after its 200; ``dropped``: the connection was
closed without any answer; ``late``: nothing by the deadline."""

_HEADERS = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Result:
    """What became of one request; ``begun`` and ``seconds`` on the run's clock, ``cause`` says more in words."""

    number: int
    outcome: str
    cause: str
    begun: float
    seconds: float


class Broken(Exception):
    """The answer ended before its end."""


@dataclass
class _Answer:
    """The texts of a whole or streamed answer, choice by choice."""

    choices: dict[int, str] = field(default_factory=dict)
    ended: bool = False
    error: str = ""

    def add(self, index: int, text: str | None) -> None:
        self.choices[index] = self.choices.get(index, "") + (text or "")

    def whole(self, body: dict[str, Any]) -> None:
        if "content" in body:
            self.add(0, "".join(block["text"] for block in body["content"]))
        for choice in body.get("choices", ()):
            self.add(choice["index"], choice["text"] if "text" in choice else choice["message"]["content"])

    def line(self, line: bytes) -> None:
        if not line.startswith(b"data: "):
            return
        data = line[6:].strip()
        if data == b"[DONE]":
            self.ended = True
            return
        event = json.loads(data)
        if "error" in event:
            self.error = str(event["error"])
        if event.get("type") == "message_stop":
            self.ended = True
        if event.get("type") == "content_block_delta":
            self.add(0, event["delta"]["text"])
        for choice in event.get("choices", ()):
            self.add(choice["index"], choice["text"] if "text" in choice else choice["delta"].get("content"))

    def texts(self, path: str) -> tuple[str, ...]:
        if path == MESSAGES and not self.choices:
            return ("",)  # an answer of no visible token has no content block
        return tuple(self.choices[index] for index in sorted(self.choices))


class Clients:
    """All clients of one run.

    Args:
        deadline: seconds within which each request must have an answer or an error.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, deadline: float) -> None:
        self._session = session
        self._url = url
        self._deadline = deadline
        self._started = asyncio.get_running_loop().time()
        self.results: list[Result] = []

    def now(self) -> float:
        """Seconds since the clients' start."""
        return asyncio.get_running_loop().time() - self._started

    async def visit(self, planned: PlannedRequest) -> Result:
        """One request from its sending to its outcome."""
        begun, leave = self.now(), planned.leave
        limit = leave.amount if leave is not None and leave.when != "chunks" else self._deadline
        chunks = int(leave.amount) if leave is not None and leave.when == "chunks" else None
        half = leave is not None and leave.when == "body"
        asking = asyncio.ensure_future(self._ask(planned.work, chunks, half))
        await asyncio.wait({asking}, timeout=limit)
        if asking.done():
            outcome, cause = asking.result()
        else:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            late = leave is None or leave.when == "chunks"
            outcome, cause = (LATE, f"nothing within {limit:g} s") if late else (LEFT, "")
        result = Result(planned.number, outcome, cause, begun, self.now() - begun)
        self.results.append(result)
        return result

    async def _ask(self, work: Work, leave_after: int | None, half: bool) -> tuple[str, str]:
        raw = json.dumps(work.body).encode()
        answer = _Answer()
        status = 0
        try:
            data = _half(raw) if half else raw
            async with self._session.post(self._url + work.path, data=data, headers=_HEADERS) as response:
                status = response.status
                if status != 200:
                    return _refusal(work, status, await response.read())
                if not work.stream:
                    answer.whole(await response.json())
                elif not await _read(response, answer, leave_after):
                    response.close()
                    return LEFT, "chunks"
        except (aiohttp.ClientError, OSError) as error:
            return (CUT, type(error).__name__) if status else (DROPPED, f"{type(error).__name__}: {error}")
        except (ValueError, KeyError, TypeError) as error:
            return WRONG, f"unreadable: {error!r}"
        return _judge(work, answer)


async def _half(raw: bytes) -> AsyncIterator[bytes]:
    """The body of a client that leaves before its end."""
    yield raw[: len(raw) // 2]
    await asyncio.Event().wait()


async def _read(response: aiohttp.ClientResponse, answer: _Answer, leave_after: int | None) -> bool:
    """Take in a stream; False when the client has had enough of it."""
    pieces, rest = 0, b""
    async for piece in response.content.iter_any():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            answer.line(line)
        pieces += 1
        if leave_after is not None and pieces >= leave_after and not answer.ended:
            return False
    return True


def _refusal(work: Work, status: int, body: bytes) -> tuple[str, str]:
    try:
        code = json.loads(body)["error"].get("code")
    except (ValueError, KeyError, TypeError, AttributeError):
        return WRONG, f"{status} with no error in it: {body[:200]!r}"
    if work.status == status:
        return RIGHT, f"refused {status} as it should be"
    if status < 500 and status != 429:
        return WRONG, f"a good request was refused {status}: {body[:200]!r}"
    return REFUSED, f"{status} {code}"


def _judge(work: Work, answer: _Answer) -> tuple[str, str]:
    if work.status != 200:
        return WRONG, f"200 where {work.status} is right"
    if answer.error:
        return CUT, f"error event: {answer.error[:120]}"
    if work.stream and not answer.ended:
        return WRONG, "the stream ended orderly, but without its end mark"
    got = answer.texts(work.path)
    if got != work.choices:
        return WRONG, f"got {str(got)[:200]} where {str(work.choices)[:200]} is right"
    return RIGHT, "right"
