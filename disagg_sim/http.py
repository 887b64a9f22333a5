"""The HTTP side of one engine: routes, keys, records of what arrived, and which connections live.

Routing is a table of our own, so that 404 and 405 are vLLM's JSON and every request passes one place.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import socket
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from disagg_sim.api_error import ApiError, Dead, HttpError, InvalidBody
from disagg_sim.chat_api import ChatRun, chat_completions
from disagg_sim.completions_api import completions
from disagg_sim.config import SimConfig
from disagg_sim.exchange import Exchange, RecordedRequest, StreamCutError
from disagg_sim.faults import Faults, Injected
from disagg_sim.kv_wire import close_server, reset, stop_listening
from disagg_sim.messages_api import count_tokens, messages
from disagg_sim.pooling_api import embeddings
from disagg_sim.request import EngineDeadError
from disagg_sim.responses_api import responses
from disagg_sim.step_loop import StepLoop
from disagg_sim.vocabulary import VOCAB_SIZE, decode, encode

logger = logging.getLogger(__name__)
Handler = Callable[[Exchange], Awaitable[web.StreamResponse]]


class _Server(web.Server):
    """As uvicorn, and unlike aiohttp, without an idle timer before a connection's first request."""

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        asyncio.get_running_loop().call_soon(handler.keep_alive, True)


class HttpSide:
    """Serves one engine.

    Args:
        state: what GET /sim/state shows. ``metrics`` gives the text of /metrics.
        changed: called when a request has arrived.

    Attributes:
        requests: every request that arrived, oldest first.
    """

    def __init__(
        self,
        config: SimConfig,
        loop: StepLoop,
        faults: Faults,
        *,
        state: Callable[[], dict[str, Any]],
        metrics: Callable[[], str],
        changed: Callable[[], None],
    ) -> None:
        self._config = config
        self._loop = loop
        self._faults = faults
        self._state = state
        self._metrics = metrics
        self._changed = changed
        self._poisoned: weakref.WeakSet[asyncio.BaseTransport] = weakref.WeakSet()
        self._runner: web.ServerRunner | None = None
        self._listener: asyncio.Server | None = None
        self._refusing: list[asyncio.Server] = []
        self.profiling = False
        self.requests: list[RecordedRequest] = []
        self.requests_total = 0
        self._routes: dict[str, dict[str, Handler]] = {
            "/v1/completions": {"POST": completions},
            "/v1/chat/completions": {"POST": chat_completions},
            "/v1/messages": {"POST": messages},
            "/v1/messages/count_tokens": {"POST": count_tokens},
            "/v1/responses": {"POST": responses},
            "/v1/models": {"GET": self._models},
            "/tokenize": {"POST": self._tokenize},
            "/detokenize": {"POST": self._detokenize},
            "/health": {"GET": self._health},
            "/ping": {"GET": self._health, "POST": self._health},
            "/version": {"GET": self._version},
            "/metrics": {"GET": self._metrics_text},
            "/sim/state": {"GET": self._show_state},
        }
        if config.pooling:
            self._routes["/v1/embeddings"] = {"POST": embeddings}
        if config.enable_profiler:
            self._routes["/start_profile"] = {"POST": self._start_profile}
            self._routes["/stop_profile"] = {"POST": self._stop_profile}

    # Life.

    async def start(self, sock: socket.socket) -> None:
        """Serve on a bound socket."""
        server = _Server(
            self._serve,
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=self._config.keepalive_seconds,
            max_line_size=65536,
            max_field_size=65536,
        )
        self._runner = web.ServerRunner(server, handle_signals=False)
        await self._runner.setup()
        await self.listen(sock)

    @property
    def listening(self) -> bool:
        """True while new connections are taken."""
        return self._listener is not None

    async def listen(self, sock: socket.socket) -> None:
        """Take new connections on a bound socket."""
        server = self._runner.server if self._runner is not None else None
        if server is None or self._listener is not None:
            sock.close()
            return
        self._listener = await asyncio.get_running_loop().create_server(server, sock=sock, backlog=1024)
        self._changed()

    def close_connections(self) -> None:
        """Reset every open connection."""
        for connection in list(self._connections()):
            if connection.transport is not None:
                reset(connection.transport)

    def _connections(self) -> list[Any]:
        server = self._runner.server if self._runner is not None else None
        return server.connections if server is not None else []

    async def stop(self) -> None:
        """Stop listening and end every connection. Safe to call twice."""
        self.refuse()
        await self.settle()
        if self._runner is not None:
            runner, self._runner = self._runner, None
            server = runner.server
            if server is not None:
                await server.shutdown(0.05)
            await runner.cleanup()

    def refuse(self) -> None:
        """Refuse new connections; open ones stay. To be followed by :meth:`settle`."""
        if self._listener is not None:
            stop_listening(self._listener)
            self._refusing.append(self._listener)
            self._listener = None
            self._changed()

    async def settle(self) -> None:
        """Return when all that was accepted before :meth:`refuse` is among the open connections."""
        while self._refusing:
            await close_server(self._refusing.pop())

    # One request.

    async def _serve(self, raw: web.BaseRequest) -> web.StreamResponse:
        transport = raw.transport
        if transport is not None and transport in self._poisoned:
            reset(transport)
            return web.Response()
        try:
            body = await raw.content.read()
        except (ConnectionError, web.RequestPayloadError):
            return web.Response()
        path = raw.path
        request_id = raw.headers.get("X-Request-Id")
        exchange = Exchange(raw, body, self._config, self._loop, self._faults, request_id)
        self._record(raw, body)
        injected = self._faults.injected_for(path)
        if injected is not None:
            return await self._play(exchange, injected)
        try:
            return await self._dispatch(exchange, raw.method, path)
        except StreamCutError:
            return web.Response()

    async def _dispatch(self, exchange: Exchange, method: str, path: str) -> web.StreamResponse:
        if path.startswith("/v1") and not self._may(exchange.raw):
            return await exchange.reply_json({"error": "Unauthorized"}, 401)
        anthropic = path.startswith("/v1/messages")
        error: ApiError
        try:
            route = self._routes.get(path)
            if route is None:
                raise HttpError(404)
            if method not in route:
                raise HttpError(405)
            return await route[method](exchange)
        except ApiError as refused:
            error = refused
        except EngineDeadError as dead:
            error = Dead(str(dead))
        except (ConnectionError, StreamCutError):
            raise StreamCutError from None
        except Exception as unexpected:
            # vLLM answers 400 to a ValueError of its own code and 500 to anything else, and closes either way.
            logger.debug("A handler raised", exc_info=True)
            error = Dead(f"{type(unexpected).__name__}: {unexpected}")
            error.closes = True
        return await self._refuse(exchange, error, anthropic)

    async def _refuse(self, exchange: Exchange, error: ApiError, anthropic: bool) -> web.StreamResponse:
        closes = error.closes and not anthropic
        mode = self._config.close_after_400
        if closes and mode == "reset" and exchange.raw.transport is not None:
            self._poisoned.add(exchange.raw.transport)
        return await exchange.refuse(error, anthropic=anthropic, closes=closes and mode == "close")

    async def _play(self, exchange: Exchange, injected: Injected) -> web.StreamResponse:
        transport = exchange.raw.transport
        if injected.trick == "hang":
            await asyncio.Event().wait()
        if injected.trick == "answer":
            return await exchange.reply(injected.status, injected.body, headers=injected.headers)
        if transport is not None:
            if injected.trick == "reset":
                reset(transport)
            else:
                transport.close()
        return web.Response()

    def _record(self, raw: web.BaseRequest, body: bytes) -> None:
        self.requests_total += 1
        if self._config.record_requests:
            try:
                parsed = json.loads(body) if body else None
            except (ValueError, RecursionError):
                parsed = None
            peer = raw.transport.get_extra_info("peername") if raw.transport is not None else None
            self.requests.append(
                RecordedRequest(raw.method, raw.path, raw.headers, body, parsed, peer[:2] if peer else None)
            )
        self._changed()

    def _may(self, raw: web.BaseRequest) -> bool:
        if self._config.api_key is None:
            return True
        scheme, _, key = raw.headers.get("Authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(key.encode(), self._config.api_key.encode())

    # Small routes.

    async def _health(self, exchange: Exchange) -> web.StreamResponse:
        status = self._faults.health_status or (200 if self._loop.death is None else 503)
        return await exchange.reply(status, b"", content_type="text/plain")

    async def _version(self, exchange: Exchange) -> web.StreamResponse:
        return await exchange.reply_json({"version": self._config.vllm_version})

    async def _models(self, exchange: Exchange) -> web.StreamResponse:
        cards: list[dict[str, Any]] = [
            {
                "id": name,
                "object": "model",
                "created": 1_700_000_000,
                # "vllm" in vLLM's own list: the proxy marks these engines as simulated by it.
                "owned_by": "disagg_sim",
                "root": self._config.models[0],
                "parent": None,
                "max_model_len": self._config.max_model_len,
                "permission": [],
            }
            for name in self._config.models
        ]
        return await exchange.reply_json({"object": "list", "data": cards})

    async def _tokenize(self, exchange: Exchange) -> web.StreamResponse:
        body = exchange.json()
        exchange.check_model(body)
        if isinstance(body.get("prompt"), str):
            ids = encode(body["prompt"])
        elif isinstance(body.get("messages"), list):
            ids = ChatRun(exchange, {**body, "max_tokens": 1}).prompt_ids
        else:
            raise InvalidBody("[{'loc': ('body', 'prompt'), 'msg': 'Field required'}]", param="prompt")
        strings = [decode([number]) for number in ids] if body.get("return_token_strs") else None
        return await exchange.reply_json(
            {"count": len(ids), "max_model_len": self._config.max_model_len, "tokens": ids, "token_strs": strings}
        )

    async def _detokenize(self, exchange: Exchange) -> web.StreamResponse:
        body = exchange.json()
        ids = body.get("tokens")
        if not isinstance(ids, list) or not all(type(n) is int and 0 <= n < VOCAB_SIZE for n in ids):
            raise InvalidBody("[{'loc': ('body', 'tokens'), 'msg': 'Input should be a valid list'}]", param="tokens")
        exchange.check_model(body)
        return await exchange.reply_json({"prompt": decode(ids)})

    async def _metrics_text(self, exchange: Exchange) -> web.StreamResponse:
        content_type = "text/plain; version=0.0.4; charset=utf-8"
        return await exchange.reply(200, self._metrics().encode(), content_type=content_type)

    async def _show_state(self, exchange: Exchange) -> web.StreamResponse:
        return await exchange.reply_json(self._state())

    async def _start_profile(self, exchange: Exchange) -> web.StreamResponse:
        self.profiling = True
        return await exchange.reply(200, b"", content_type="text/plain")

    async def _stop_profile(self, exchange: Exchange) -> web.StreamResponse:
        self.profiling = False
        return await exchange.reply(200, b"", content_type="text/plain")
