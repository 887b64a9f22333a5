"""Routes that one engine answers alone, routes that go to every engine, and those that no pair can serve."""

from __future__ import annotations

import asyncio

from quart import Blueprint, Response, request

from disagg_proxy.cluster.instance import Instance
from disagg_proxy.cluster.lease import Visit
from disagg_proxy.errors import EngineFailed, EngineUnreachable, NotFound, NotServed, UnknownModel
from disagg_proxy.http.asked import read_body, sent_headers
from disagg_proxy.http.respond import json_response, passed_on
from disagg_proxy.protocol.headers import request_lines
from disagg_proxy.protocol.prepare import model_of, parse_object
from disagg_proxy.services import Services
from disagg_proxy.upstream import WholeAnswer

ONE_ENGINE = ("/tokenize", "/detokenize", "/v1/messages/count_tokens")
PROFILING = ("/start_profile", "/stop_profile")

_POOLING = "it computes no tokens to decode, so a prefill/decode pair cannot serve it; ask an undivided vLLM"
NOT_SERVED = {
    "/v1/responses": "vLLM takes the engine's request id of this route from the body, which would stop a prefill "
    "instance; use /v1/chat/completions",
    "/v1/embeddings": _POOLING,
    "/v2/embed": _POOLING,
    "/pooling": _POOLING,
    "/classify": _POOLING,
    "/score": _POOLING,
    "/v1/score": _POOLING,
    "/rerank": _POOLING,
    "/v1/rerank": _POOLING,
    "/v2/rerank": _POOLING,
    "/v1/audio/transcriptions": "audio is not handed from prefill to decode; ask an undivided vLLM",
    "/v1/audio/translations": "audio is not handed from prefill to decode; ask an undivided vLLM",
    "/v1/audio/speech": "audio is not handed from prefill to decode; ask an undivided vLLM",
}


def single_routes(services: Services) -> Blueprint:
    """Everything but generation and the proxy's own state."""
    blueprint = Blueprint("single", __name__)

    async def ask(instance: Instance, method: str, path: str, body: bytes) -> WholeAnswer:
        with Visit(services.registry, instance):
            answer = await services.upstream.request(
                method,
                instance,
                path,
                headers=request_lines(sent_headers(), services.config.engine_api_key),
                body=body,
                silence=services.config.decode_timeout,
                leg=instance.role.value,
            )
            return await answer.whole()

    async def ask_any(model: str | None, method: str, body: bytes) -> Response:
        """The first engine that can be reached; these routes change nothing, so asking again is safe."""
        while True:
            instance = services.pairing.choose_one(model)
            try:
                answer = await ask(instance, method, request.path, body)
            except EngineUnreachable as error:
                if not error.refused:
                    raise
                services.registry.lost_contact(instance, "its HTTP port refuses connections")
                continue
            if answer.status >= 500:
                raise EngineFailed(f"The engine failed with status {answer.status}.")
            return passed_on(answer)

    async def one_engine() -> Response:
        body = await read_body()
        return await ask_any(model_of(parse_object(body)), "POST", body)

    async def version() -> Response:
        return await ask_any(None, "GET", b"")

    async def every_engine() -> Response:
        if not services.config.enable_profiling:
            raise NotFound("Profiling is off; start the proxy with ENABLE_PROFILING=1.")
        body = await read_body()
        instances = [i for i in services.registry.instances() if i.state.value == "ready"]
        answers = await asyncio.gather(*(ask(i, "POST", request.path, body) for i in instances), return_exceptions=True)
        results = [
            {"role": i.role.value, "status": a.status if isinstance(a, WholeAnswer) else 502}
            for i, a in zip(instances, answers, strict=True)
        ]
        worst = max((result["status"] for result in results), default=503, key=int)
        return json_response({"instances": results}, 200 if worst == 200 else 502)

    async def models() -> Response:
        return json_response({"object": "list", "data": list(services.registry.models().values())})

    async def model(name: str) -> Response:
        known = services.registry.models()
        if name not in known:
            raise UnknownModel(name, sorted(known))
        return json_response(known[name])

    async def not_served(**_: str) -> Response:
        path = "/v1/responses" if request.path.startswith("/v1/responses") else request.path
        raise NotServed(f"{path} is not served: {NOT_SERVED[path]}.")

    for path in ONE_ENGINE:
        blueprint.add_url_rule(path, path.strip("/").replace("/", "_"), one_engine, methods=["POST"])
    for path in PROFILING:
        blueprint.add_url_rule(path, path.strip("/"), every_engine, methods=["POST"])
    for path in NOT_SERVED:
        name = "not_" + path.strip("/").replace("/", "_")
        blueprint.add_url_rule(path, name, not_served, methods=["GET", "POST", "DELETE"])
    blueprint.add_url_rule("/v1/responses/<path:_rest>", "not_responses", not_served, methods=["GET", "POST", "DELETE"])
    blueprint.add_url_rule("/version", "version", version, methods=["GET"])
    blueprint.add_url_rule("/v1/models", "models", models, methods=["GET"])
    blueprint.add_url_rule("/v1/models/<path:name>", "model", model, methods=["GET"])
    return blueprint
