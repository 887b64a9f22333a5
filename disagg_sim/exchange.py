"""One HTTP request and its response: bodies as vLLM's server writes them, and faults that tests inject.

Header values are those of uvicorn. Generated bodies pass :meth:`Exchange.reply` or :class:`EventStream`, the two
places where writes can be split, cut, or followed by a silent close.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from disagg_sim.api_error import ApiError, HttpError, InvalidBody, UnknownModel, dump
from disagg_sim.config import SimConfig
from disagg_sim.faults import Faults
from disagg_sim.kv_wire import reset
from disagg_sim.step_loop import StepLoop


class StreamCutError(Exception):
    """A test cuts this connection here."""


@dataclass(frozen=True)
class RecordedRequest:
    """One HTTP request as it arrived."""

    method: str
    path: str
    headers: CIMultiDictProxy[str]
    body: bytes
    json: Any
    """The parsed body, None when it is no JSON."""
    peer: tuple[str, int] | None
    """The client's address; the same on every request of one connection."""


class Exchange:
    """What a route works with."""

    def __init__(
        self,
        raw: web.BaseRequest,
        body: bytes,
        config: SimConfig,
        loop: StepLoop,
        faults: Faults,
        request_id: str | None,
    ) -> None:
        self.raw = raw
        self.body = body
        self.config = config
        self.loop = loop
        self.faults = faults
        self.request_id = request_id
        """The X-Request-Id header."""

    def headers(self, content_type: str) -> CIMultiDict[str]:
        """Response headers; with X-Request-Id where ``enable_request_id_headers`` is on."""
        headers = CIMultiDict({"server": "uvicorn", "content-type": content_type})
        if self.config.enable_request_id_headers and self.request_id is not None:
            headers["X-Request-Id"] = self.request_id
        return headers

    def json(self) -> dict[str, Any]:
        """The body as a JSON object.

        Raises:
            InvalidBody: as FastAPI refuses content type, syntax or shape.
        """
        media_type = self.raw.headers.get("Content-Type", "").split(";", 1)[0].strip().lower()
        if media_type != "application/json":
            raise InvalidBody("['Unsupported Media Type: Only 'application/json' is allowed']")
        try:
            value = json.loads(self.body)
        except UnicodeDecodeError:
            raise HttpError(400, "There was an error parsing the body") from None
        except (ValueError, RecursionError) as error:
            raise InvalidBody(f"[{{'type': 'json_invalid', 'loc': ('body',), 'msg': '{error}'}}]") from None
        if not isinstance(value, dict):
            raise InvalidBody("[{'loc': ('body',), 'msg': 'Input should be a valid dictionary'}]")
        return value

    def check_model(self, body: Mapping[str, Any]) -> None:
        """Raises:
        UnknownModel: when the body names another model.
        """
        model = body.get("model")
        if model and model not in self.config.models:
            raise UnknownModel(model)

    async def reply(
        self,
        status: int,
        body: bytes,
        *,
        content_type: str = "application/json",
        headers: Mapping[str, str] | None = None,
        closes: bool = False,
    ) -> web.StreamResponse:
        """Answer at once; with ``closes`` the connection goes afterwards although the answer kept it."""
        all_headers = self.headers(content_type)
        all_headers.update(headers or {})
        if not (self.faults.split or closes):
            return web.Response(status=status, body=body, headers=all_headers)
        response = web.StreamResponse(status=status, headers=all_headers)
        response.content_length = len(body)
        await response.prepare(self.raw)
        for chunk in self.faults.chunks(body):
            await response.write(chunk)
        await response.write_eof()
        if closes and self.raw.transport is not None:
            self.raw.transport.close()
        return response

    async def reply_json(self, value: Any, status: int = 200) -> web.StreamResponse:
        """Answer with JSON."""
        return await self.reply(status, dump(value))

    async def refuse(self, error: ApiError, *, anthropic: bool, closes: bool) -> web.StreamResponse:
        """Answer with an error in the route's shape."""
        status, value = error.anthropic() if anthropic else (error.status, error.info())
        return await self.reply(status, dump(value), closes=closes)

    async def open_stream(self) -> EventStream:
        """Send the headers of an event stream, before anything is known of its content, as Starlette does."""
        stream = EventStream(self)
        await stream.open()
        return stream


class EventStream:
    """Server-sent events on one response."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._cut = exchange.faults.take_cut()
        self.response = web.StreamResponse(headers=exchange.headers("text/event-stream; charset=utf-8"))

    async def open(self) -> None:
        self.response.enable_chunked_encoding()
        await self.response.prepare(self._exchange.raw)
        self._count(0)

    def _count(self, tokens: int) -> None:
        if self._cut is None:
            return
        self._cut -= tokens
        if self._cut <= 0:
            transport = self._exchange.raw.transport
            if transport is not None:
                reset(transport)
            raise StreamCutError

    async def data(self, value: Any, *, event: str | None = None, tokens: int = 0) -> None:
        """Write one event. ``tokens``: how many generated tokens it carries."""
        head = f"event: {event}\n".encode() if event else b""
        await self._write(head + b"data: " + dump(value) + b"\n\n")
        self._count(tokens)

    async def done(self) -> web.StreamResponse:
        """OpenAI's last line, and the end."""
        await self._write(b"data: [DONE]\n\n")
        return await self.end()

    async def end(self) -> web.StreamResponse:
        """The end of the body."""
        await self.response.write_eof()
        return self.response

    async def _write(self, data: bytes) -> None:
        for chunk in self._exchange.faults.chunks(data):
            await self.response.write(chunk)
