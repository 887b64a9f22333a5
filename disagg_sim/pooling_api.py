"""/v1/embeddings of an engine whose model has it. The forward pass runs, with all that the connector does in it: an
engine with P2pNcclConnector dies of it, as of every request whose id names no peer.

A model that only generates has no such route (vLLM 0.32 answers 404).
"""

from __future__ import annotations

import uuid
from typing import Any

from aiohttp import web

from disagg_sim.api_error import InvalidBody
from disagg_sim.exchange import Exchange
from disagg_sim.frontend import collect, make_requests
from disagg_sim.sampling_rules import sampling_of
from disagg_sim.text import seed_of
from disagg_sim.vocabulary import encode


def embedding(text: str) -> list[float]:
    """The vector of a text."""
    return [byte / 255 for byte in seed_of(encode(text))]


async def embeddings(exchange: Exchange) -> web.StreamResponse:
    """The route."""
    body = exchange.json()
    exchange.check_model(body)
    inputs = body.get("input")
    texts: list[Any] = inputs if isinstance(inputs, list) else [inputs]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InvalidBody("[{'loc': ('body', 'input'), 'msg': 'Input should be a valid string'}]", param="input")
    prompts = [encode(text) for text in texts]
    name = f"embd-{uuid.uuid4().hex}"
    sampling = sampling_of({"min_tokens": 0}, max_tokens=1, logprobs=None, prompt_logprobs=None, guide=None)
    await collect(
        exchange.loop,
        [r for i, ids in enumerate(prompts) for r in make_requests(f"{name}-{i}", ids, sampling, prompt_index=i)],
    )
    tokens = sum(map(len, prompts))
    data: list[dict[str, Any]] = [
        {"index": index, "object": "embedding", "embedding": embedding(text)} for index, text in enumerate(texts)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
    answer = {"id": name, "object": "list", "model": exchange.config.models[0], "data": data, "usage": usage}
    return await exchange.reply_json(answer)
