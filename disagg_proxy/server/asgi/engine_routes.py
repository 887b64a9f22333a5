"""Routes that one engine serves, routes that go to every engine, and routes that a pair cannot serve.

Pooling (embeddings, scores, classification) runs a forward pass. An engine with P2pNcclConnector crashes on a request
whose id names no peer, so these requests go only to engines that need none (:attr:`KvKind.computes`).
"""

from __future__ import annotations

import asyncio
import secrets

from quart import Blueprint, Response, request

from disagg_proxy.cluster.instance import Instance
from disagg_proxy.cluster.lease import EngineUse
from disagg_proxy.downstream.refusal import BUSY_STATUSES, engine_busy
from disagg_proxy.errors import EngineBusy, EngineFailed, EngineUnreachable, NotFound, NotServed, UnknownModel
from disagg_proxy.http1.headers import client_request_id, forwarded_request_lines, without_key
from disagg_proxy.openai.fields import MESSAGES, RESPONSES, strip
from disagg_proxy.openai.prefill_answer import prompt_tokens
from disagg_proxy.openai.prepare import PromptSize, encode, model_of, parse_object
from disagg_proxy.server.asgi.auth import client_key, show_rate_limit
from disagg_proxy.server.asgi.error_responses import forwarded, json_response
from disagg_proxy.server.asgi.request import read_body, request_headers, request_id
from disagg_proxy.services import Services
from disagg_proxy.upstream import CompleteResponse, ReadUntil, Resend

ONE_ENGINE = ("/tokenize", "/detokenize", "/v1/messages/count_tokens")
PROFILING = ("/start_profile", "/stop_profile")

POOLING = (
    "/v1/embeddings", "/v2/embed", "/pooling", "/classify", "/score", "/v1/score", "/rerank", "/v1/rerank",
    "/v2/rerank",
)  # fmt: skip
_NO_POOLING = (
    "it computes no tokens to decode, so a pair of P2pNcclConnector engines cannot serve it; use engines of this "
    "project's connector (docs/connector.md), or ask an undivided vLLM"
)
NOT_SERVED = {
    "/v1/audio/transcriptions": "audio is not handed from prefill to decode; ask an undivided vLLM",
    "/v1/audio/translations": "audio is not handed from prefill to decode; ask an undivided vLLM",
    "/v1/audio/speech": "audio is not handed from prefill to decode; ask an undivided vLLM",
}


NO_STORE = (
    "a stored response lies on one engine and is not found again through a proxy; send the whole conversation, or use "
    "/v1/chat/completions"
)


def engine_routes(services: Services) -> Blueprint:
    """All routes except generation, state, page and admin."""
    blueprint = Blueprint("single", __name__)

    async def send(
        instance: Instance, method: str, path: str, body: bytes, engine_id: str | None = None
    ) -> CompleteResponse:
        key, headers = client_key(), request_headers()
        if key is not None and key.from_file:
            headers = without_key(headers)
        lines = forwarded_request_lines(headers, services.config.engine_api_key)
        if engine_id is not None:
            lines += b"x-request-id: %b\r\n" % engine_id.encode()
        with EngineUse(services.registry, instance):
            answer = await services.upstream.request(
                method,
                instance,
                path,
                headers=lines,
                body=body,
                idle_timeout=services.config.decode_timeout,
                leg=instance.role.value,
                until=ReadUntil.COMPLETE,
                resend=Resend.REUSED,
            )
            return answer.read()

    async def charged(model: str | None, body: bytes, *, computes: bool = False) -> Response:
        """:func:`send_to_any`, charged to the client's key: one request, and what it computes in tokens."""
        key = client_key()
        if key is None:
            return await send_to_any(model, "POST", body, computes=computes)
        key.check_model(model, services.registry)
        tokens = services.sizes.estimator.tokens(model, PromptSize(text=len(body))) if computes else 0
        anthropic = request.path.startswith(MESSAGES.path)
        refusal = key.admit(tokens, services.stats, anthropic)
        show_rate_limit(key.headers(services.stats.clock(), anthropic))
        if refusal is not None:
            raise refusal
        used = 0
        try:
            answer = await send_to_any(model, "POST", body, computes=computes)
            used = (prompt_tokens(await answer.get_data(as_text=False)) or tokens) if computes else 0
            return answer
        except UnknownModel as error:
            raise key.visible(error, services.registry) from None
        finally:
            key.settle(used - tokens, services.stats.clock())

    async def send_to_any(model: str | None, method: str, body: bytes, *, computes: bool = False) -> Response:
        """Send to the first engine that is reachable and not busy. These requests change nothing, so they may be sent
        twice."""
        if model is not None:
            await refresh_unless_known(model)
        engine_id = _engine_id(client_request_id(request_headers()), request_id())
        busy: dict[Instance, EngineBusy] = {}
        while True:
            instance = services.selection.choose_single(model, computes=computes, avoided=busy)
            if instance in busy:
                raise busy[instance]
            try:
                answer = await send(instance, method, request.path, body, engine_id)
            except EngineUnreachable as error:
                if not error.refused:
                    raise
                services.registry.connection_refused(instance, "its HTTP port refuses connections")
                continue
            if answer.status in BUSY_STATUSES:
                busy[instance] = engine_busy(answer, instance.role.value)
                continue
            # 501: the model does not support it.
            if answer.status >= 500 and answer.status != 501:
                raise EngineFailed(f"The engine failed with status {answer.status}.")
            return forwarded(answer)

    async def refresh_unless_known(model: str) -> None:
        """An engine may have loaded an adapter since its last probe."""
        if not services.registry.has_model(model):
            await services.registry.refresh_models()

    async def one_engine() -> Response:
        body = await read_body()
        return await charged(model_of(parse_object(body)), body)

    async def pooling() -> Response:
        body = await read_body()
        fields = parse_object(body)
        model = model_of(fields)
        if not any(i.kind.computes for i in services.registry.instances()) and services.registry.instances():
            raise NotServed(f"{request.path} is not served: {_NO_POOLING}.")
        return await charged(model, encode(fields) if strip(fields) else body, computes=True)

    async def stored_response(**_: str) -> Response:
        raise NotServed(f"{RESPONSES.path}/ID is not served: {NO_STORE}.")

    async def version() -> Response:
        return await send_to_any(None, "GET", b"")

    async def every_engine() -> Response:
        if not services.config.enable_profiling:
            raise NotFound("Profiling is off; start the proxy with ENABLE_PROFILING=1.")
        body = await read_body()
        instances = [i for i in services.registry.instances() if i.state.value == "ready"]
        answers = await asyncio.gather(
            *(send(i, "POST", request.path, body) for i in instances), return_exceptions=True
        )
        results = [
            {"role": i.role.value, "status": a.status if isinstance(a, CompleteResponse) else 502}
            for i, a in zip(instances, answers, strict=True)
        ]
        worst = max((result["status"] for result in results), default=503, key=int)
        return json_response({"instances": results}, 200 if worst == 200 else 502)

    async def models() -> Response:
        known, key = services.registry.models(), client_key()
        shown = [card for name, card in known.items() if key is None or not key.models or name in key.models]
        return json_response({"object": "list", "data": shown})

    async def model(name: str) -> Response:
        await refresh_unless_known(name)
        known, key = services.registry.models(), client_key()
        if key is not None:
            key.check_model(name, services.registry)
        if name not in known:
            error = UnknownModel(name, sorted(known))
            raise error if key is None else key.visible(error, services.registry)
        return json_response(known[name])

    async def not_served(**_: str) -> Response:
        raise NotServed(f"{request.path} is not served: {NOT_SERVED[request.path]}.")

    for path in ONE_ENGINE:
        blueprint.add_url_rule(path, path.strip("/").replace("/", "_"), one_engine, methods=["POST"])
    for path in POOLING:
        blueprint.add_url_rule(path, path.strip("/").replace("/", "_"), pooling, methods=["POST"])
    for path in PROFILING:
        blueprint.add_url_rule(path, path.strip("/"), every_engine, methods=["POST"])
    for path in NOT_SERVED:
        name = "not_" + path.strip("/").replace("/", "_")
        blueprint.add_url_rule(path, name, not_served, methods=["GET", "POST", "DELETE"])
    stored = f"{RESPONSES.path}/<path:_rest>"
    blueprint.add_url_rule(stored, "stored_response", stored_response, methods=["GET", "POST", "DELETE"])
    blueprint.add_url_rule("/version", "version", version, methods=["GET"])
    blueprint.add_url_rule("/v1/models", "models", models, methods=["GET"])
    blueprint.add_url_rule("/v1/models/<path:name>", "model", model, methods=["GET"])
    return blueprint


def _engine_id(client_id: str | None, request_id: str) -> str:
    """The X-Request-Id for the engine, by which its log can be searched.

    Two requests may have the same id of a client, and vLLM's engine ends at the second one with
    VLLM_DISABLE_REQUEST_ID_RANDOMIZATION=1 (0.21; pooling passes the header on to it). Hence a unique end.
    """
    return request_id if client_id is None else f"{client_id}-{secrets.token_hex(4)}"
