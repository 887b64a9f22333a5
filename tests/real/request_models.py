"""Reads bodies as vLLM's API server does, without an engine: run by the Python of an environment with vLLM, which has
nothing of this project's.

Standard input: one JSON list of ``[dialect, body]``, each body as text. The last line of standard output:
``{"errors": [...], "fields": {...}}``: for each body why vLLM refuses it, null where it does not, and the fields of
each dialect's request model.
"""

import inspect
import json
import sys
from typing import Any

from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

MODELS = {
    "completions": CompletionRequest,
    "chat": ChatCompletionRequest,
    "messages": AnthropicMessagesRequest,
    "responses": ResponsesRequest,
}
LIMIT = 100
"""Output tokens where the request does not limit them."""


def refused(dialect: str, body: str) -> str | None:
    """What the request model, or the sampling parameters made of it, say against the body."""
    try:
        request = MODELS[dialect].model_validate(json.loads(body))
        sampling = getattr(request, "to_sampling_params", None)
        if sampling is not None:
            names = ("max_completion_tokens", "max_tokens", "max_output_tokens")
            limit = next((found for name in names if (found := getattr(request, name, None))), LIMIT)
            # The second is the name on /v1/responses.
            given: dict[str, Any] = {"max_tokens": limit, "default_max_tokens": LIMIT, "default_sampling_params": {}}
            needed = inspect.signature(sampling).parameters.items()
            sampling(**{n: given.get(n) for n, p in needed if n in given or p.default is inspect.Parameter.empty})
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    return None


if __name__ == "__main__":
    errors = [refused(dialect, body) for dialect, body in json.load(sys.stdin)]
    fields = {dialect: sorted(model.model_fields) for dialect, model in MODELS.items()}
    print("\n" + json.dumps({"errors": errors, "fields": fields}))
