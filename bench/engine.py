"""A stand-in for an engine that costs next to nothing: right answers in form, no tokenizer, no batch, no KV.

For measurements of the proxy only; what an engine does when it is asked wrongly is :mod:`disagg_sim`'s affair.
What a request asks for beyond its route stands in its ``user`` field, as ``key=value`` separated by spaces:
``prefill=S`` (seconds), ``pause=S`` (between tokens), ``refuse`` (400 from prefill).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import httptools
import msgpack
import zmq
import zmq.asyncio

MODEL = "bench-model"
_PING = 1.0
_JSON = b"application/json"
_EVENTS = b"text/event-stream; charset=utf-8"
_DETAILS = {"cached_tokens": 3}


class Engine:
    """One prefill or decode instance on a port of the kernel's choice, pinging proxies.

    Args:
        role: "P" or "D".
    """

    def __init__(self, role: str) -> None:
        self.role = role
        self.served = 0
        self._server: asyncio.Server | None = None
        self._pings: asyncio.Task[None] | None = None

    async def start(self, *proxies: str) -> None:
        """Listen, and register at each of ``proxies`` ("host:port")."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", 0, backlog=2048)
        port = self._server.sockets[0].getsockname()[1]
        self._pings = asyncio.create_task(self._ping(proxies, port))

    async def stop(self) -> None:
        """Stop listening and pinging."""
        if self._pings is not None:
            self._pings.cancel()
            await asyncio.gather(self._pings, return_exceptions=True)
        if self._server is not None:
            self._server.close()

    async def _ping(self, proxies: Sequence[str], port: int) -> None:
        # Nothing listens at the KV address, and no peer connects to it: there is no KV.
        kv = f"127.0.0.2:{port}"
        message = msgpack.packb({"type": self.role, "http_address": f"127.0.0.1:{port}", "zmq_address": kv})
        context = zmq.asyncio.Context()
        try:
            sockets = [context.socket(zmq.DEALER) for _ in proxies]
            for socket, proxy in zip(sockets, proxies, strict=True):
                socket.setsockopt_string(zmq.IDENTITY, kv)
                socket.connect(f"tcp://{proxy}")
            while True:
                for socket in sockets:
                    await socket.send(message)
                await asyncio.sleep(_PING)
        finally:
            context.destroy(linger=0)


class _Connection(asyncio.Protocol):
    """One connection of the proxy; one request after the other."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._parser = httptools.HttpRequestParser(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._url = self._body = self._id = b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"x-request-id":
            self._id = value

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._url == b"/health":
            self._say(b"")
        elif self._url == b"/v1/models":
            card = {"id": MODEL, "object": "model", "owned_by": "bench", "max_model_len": 32768}
            self._say(json.dumps({"object": "list", "data": [card]}).encode())
        elif not self._body:
            # /metrics, which the proxy reads where an engine has it.
            self._say(b"", b"404 Not Found")
        else:
            self._generate(json.loads(self._body))

    def _generate(self, body: dict[str, Any]) -> None:
        self._engine.served += 1
        wishes = dict(word.partition("=")[::2] for word in str(body.get("user", "")).split())
        if "refuse" in wishes and self._engine.role == "P":
            error = {"message": "refused", "type": "BadRequestError", "param": None, "code": 400}
            self._say(json.dumps({"object": "error", "error": error}).encode(), b"400 Bad Request")
            return
        if body.get("stream"):
            self._write(b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n\r\n" % _EVENTS)
            self._token(body["max_tokens"], float(wishes.get("pause", 0)))
            return
        answer = json.dumps(self._whole(body["max_tokens"])).encode()
        wait = float(wishes.get("prefill", 0)) if self._engine.role == "P" else 0.0
        if wait:
            self._timer = asyncio.get_running_loop().call_later(wait, self._say, answer)
        else:
            self._say(answer)

    def _whole(self, tokens: int) -> dict[str, Any]:
        name, text = self._id.decode(), " word" * tokens
        usage = {"prompt_tokens": 9, "completion_tokens": tokens, "prompt_tokens_details": _DETAILS}
        if self._url == b"/v1/messages":
            content = [{"type": "text", "text": text}]
            return {"id": name, "type": "message", "role": "assistant", "content": content, "usage": usage}
        choice = {
            "index": 0,
            "text": text,
            "message": {"role": "assistant", "content": text},
            "finish_reason": "length",
        }
        return {"id": f"cmpl-{name}-0", "object": "x", "model": MODEL, "choices": [choice], "usage": usage}

    def _token(self, left: int, pause: float) -> None:
        """One event; then the next one, or the end."""
        if self._transport is None:
            return
        if left:
            choice = {"index": 0, "text": " word", "delta": {"content": " word"}, "finish_reason": None}
            event = {"id": f"cmpl-{self._id.decode()}-0", "object": "x", "model": MODEL, "choices": [choice]}
            self._event(json.dumps(event).encode())
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(pause, self._token, left - 1, pause)
        elif self._url == b"/v1/messages":
            self._event(b'{"type":"message_stop"}', last=True)
        else:
            self._event(b"[DONE]", last=True)

    def _event(self, data: bytes, last: bool = False) -> None:
        event = b"data: " + data + b"\n\n"
        self._write(b"%x\r\n%b\r\n%b" % (len(event), event, b"0\r\n\r\n" if last else b""))

    def _say(self, body: bytes, status: bytes = b"200 OK") -> None:
        self._write(
            b"HTTP/1.1 %b\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n%b" % (status, _JSON, len(body), body)
        )

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)
