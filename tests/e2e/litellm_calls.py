"""Run with the Python that has LiteLLM: makes the call of each line of JSON that it reads, and writes its result.

A line is ``{"call": NAME, ...arguments}``, NAME that of a function of ``litellm``, with arguments of its own, or
"Router": ``acompletion`` through a Router, as LiteLLM's own proxy sends it.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
from operator import attrgetter
from typing import Any

# Otherwise the import loads a table of prices from GitHub.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm


async def result_of(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    if name == "Router":
        deployment = {key: arguments.pop(key) for key in ("model", "api_base", "api_key")}
        router = litellm.Router(
            [{"model_name": "routed", "litellm_params": deployment}], num_retries=arguments.pop("num_retries")
        )
        function, arguments["model"] = router.acompletion, "routed"
    else:
        function = attrgetter(name)(litellm)
    try:
        answer = function(**arguments)
        awaited = inspect.isawaitable(answer)
        if awaited:
            answer = await answer
        if not arguments.get("stream"):
            return {"answer": plain(answer), "headers": headers_of(answer)}
        chunks: list[Any] = []
        try:
            if awaited:
                async for chunk in answer:
                    chunks.append(plain(chunk))
            else:
                for chunk in answer:
                    chunks.append(plain(chunk))
        except Exception as error:
            return {"chunks": chunks, **failure(error)}
        return {"chunks": chunks, "headers": headers_of(answer)}
    except Exception as error:
        return failure(error)


def plain(answer: Any) -> Any:
    if isinstance(answer, bytes):
        return answer.decode()
    return answer.model_dump(mode="json") if hasattr(answer, "model_dump") else answer


def headers_of(answer: Any) -> dict[str, str]:
    hidden = getattr(answer, "_hidden_params", None) or {}
    return {name: str(value) for name, value in (hidden.get("additional_headers") or {}).items()}


def failure(error: Exception) -> dict[str, Any]:
    response = getattr(error, "response", None)
    headers = getattr(error, "litellm_response_headers", None) or getattr(response, "headers", None) or {}
    return {
        "error": type(error).__name__,
        "status": getattr(error, "status_code", None),
        "message": str(error),
        "headers": {name.lower(): value for name, value in headers.items()},
    }


async def main() -> None:
    litellm.suppress_debug_info = True
    litellm.telemetry = False
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints
    print("ready", file=results, flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        arguments = json.loads(line)
        name = arguments.pop("call")
        print(json.dumps(await result_of(name, arguments)), file=results, flush=True)


if __name__ == "__main__":
    asyncio.run(main())
