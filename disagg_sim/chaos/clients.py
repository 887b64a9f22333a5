"""Clients of a chaos run: each sends one planned request, checks the response, or disconnects early by the plan."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from disagg_report.load_client import Broken, LoadClient, Response
from disagg_sim.chaos.plan import PlannedRequest
from disagg_sim.chaos.work import MESSAGES, Work

RIGHT, WRONG, REFUSED, CUT, LEFT, LATE, DROPPED = "right", "wrong", "refused", "cut", "left", "late", "dropped"
"""Outcomes of a request. ``cut``: the response broke off after its 200; ``left``: the client disconnected by the plan;
``dropped``: the connection was closed without a response; ``late``: no complete response by the deadline."""


@dataclass(frozen=True)
class Result:
    """Outcome of one request. ``begun``: seconds since the run's start; ``seconds``: duration; ``cause``: details."""

    number: int
    outcome: str
    cause: str
    begun: float
    seconds: float


class _Texts(Response):
    """The texts of a response, streamed or not, by choice.

    Args:
        leave_after: disconnect after this many events of the stream.
    """

    def __init__(self, stream: bool, leave_after: int | None) -> None:
        super().__init__(stream=stream)
        self._events_left = leave_after
        self.choices: dict[int, str] = {}
        self.unreadable = ""

    def add(self, index: int, text: str | None) -> None:
        self.choices[index] = self.choices.get(index, "") + (text or "")

    def add_body(self, body: dict[str, Any]) -> None:
        if "content" in body:
            self.add(0, "".join(block["text"] for block in body["content"]))
        for choice in body.get("choices", ()):
            self.add(choice["index"], choice["text"] if "text" in choice else choice["message"]["content"])

    def event(self, event: bytes, arrived: float) -> bool:
        for line in event.split(b"\n"):
            if line.startswith(b"data: "):
                try:
                    self._data(line[6:].strip())
                except (ValueError, KeyError, TypeError) as error:
                    self.unreadable = repr(error)
        if self._events_left is not None:
            self._events_left -= 1
        return self._events_left is not None and self._events_left <= 0 and not self.done

    def _data(self, data: bytes) -> None:
        if data == b"[DONE]":
            self.done = True
            return
        event = json.loads(data)
        if "error" in event:
            self.error = str(event["error"])
        if event.get("type") == "message_stop":
            self.done = True
        if event.get("type") == "content_block_delta":
            self.add(0, event["delta"]["text"])
        for choice in event.get("choices", ()):
            self.add(choice["index"], choice["text"] if "text" in choice else choice["delta"].get("content"))

    def texts(self, path: str) -> tuple[str, ...]:
        if path == MESSAGES and not self.choices:
            return ("",)  # a response without visible tokens has no content block
        return tuple(self.choices[index] for index in sorted(self.choices))


class Clients:
    """All clients of one run.

    Args:
        deadline: seconds within which each request must have a response or an error.
    """

    def __init__(self, url: str, deadline: float) -> None:
        self._client = LoadClient(url)
        self._deadline = deadline
        self._started = asyncio.get_running_loop().time()
        self.results: list[Result] = []

    def close(self) -> None:
        """Close the idle connections."""
        self._client.close()

    def now(self) -> float:
        """Seconds since this object was made."""
        return asyncio.get_running_loop().time() - self._started

    async def visit(self, planned: PlannedRequest) -> Result:
        """Send one request and record its outcome."""
        begun, leave = self.now(), planned.leave
        limit = leave.amount if leave is not None and leave.when != "chunks" else self._deadline
        chunks = int(leave.amount) if leave is not None and leave.when == "chunks" else None
        half = leave is not None and leave.when == "body"
        sending = asyncio.ensure_future(self._send(planned.work, chunks, half))
        await asyncio.wait({sending}, timeout=limit)
        if sending.done():
            outcome, cause = sending.result()
        else:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            late = leave is None or leave.when == "chunks"
            outcome, cause = (LATE, f"no complete response within {limit:g} s") if late else (LEFT, "")
        result = Result(planned.number, outcome, cause, begun, self.now() - begun)
        self.results.append(result)
        return result

    async def _send(self, work: Work, leave_after: int | None, half: bool) -> tuple[str, str]:
        raw = json.dumps(work.body).encode()
        response = _Texts(work.stream, leave_after)
        try:
            await self._client.post(work.path, raw[: len(raw) // 2] if half else raw, response, content_length=len(raw))
        except Broken as error:
            return (CUT, str(error)) if response.status else (DROPPED, str(error))
        if response.status != 200:
            return _refusal(work, response.status, bytes(response.body))
        if response.left:
            return LEFT, "chunks"
        try:
            if not work.stream:
                response.add_body(response.json())
        except (ValueError, KeyError, TypeError) as error:
            response.unreadable = repr(error)
        return _judge(work, response)


def _refusal(work: Work, status: int, body: bytes) -> tuple[str, str]:
    try:
        code = json.loads(body)["error"].get("code")
    except (ValueError, KeyError, TypeError, AttributeError):
        return WRONG, f"{status} without an error object: {body[:200]!r}"
    if work.status == status:
        return RIGHT, f"refused with {status} as expected"
    if status < 500 and status != 429:
        return WRONG, f"a valid request was refused with {status}: {body[:200]!r}"
    return REFUSED, f"{status} {code}"


def _judge(work: Work, response: _Texts) -> tuple[str, str]:
    if work.status != 200:
        return WRONG, f"200, expected {work.status}"
    if response.unreadable:
        return WRONG, f"unreadable: {response.unreadable}"
    if response.error:
        return CUT, f"error event: {response.error[:120]}"
    if work.stream and not response.done:
        return WRONG, "the stream was complete but without its last event"
    got = response.texts(work.path)
    if got != work.choices:
        return WRONG, f"got {str(got)[:200]}, expected {str(work.choices)[:200]}"
    return RIGHT, "right"
