"""The ways a request is refused, each with the status, the JSON and the connection's fate that vLLM 0.21 gives it.

Three origins differ on the wire (``entrypoints/openai/server_utils.py``, ``api_server.py``): a failed validation of
the body, an ErrorResponse that the handler returns, and an exception that leaves the handler. The last one is
answered with JSON too, but then raised on through Starlette's outermost layer, and uvicorn closes the connection
("Exception in ASGI application") although the answer had promised to keep it.
"""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any


def dump(value: Any) -> bytes:
    """JSON as vLLM's responses are encoded: compact, UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


class ApiError(Exception):
    """A refusal. ``closes``: the connection is closed after the answer, without ``Connection: close`` in it."""

    status = 400
    type = "BadRequestError"
    closes = False

    def __init__(self, message: str, *, param: str | None = None, status: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if status is not None:
            self.status = status

    def info(self) -> dict[str, Any]:
        """The OpenAI-style error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.status}}

    def anthropic(self) -> tuple[int, dict[str, Any]]:
        """Status and body on /v1/messages, where an exception of the handler becomes a 500."""
        return self.status, {"type": "error", "error": {"type": self.type, "message": self.message}}


class InvalidBody(ApiError):
    """The body does not fit the request model (RequestValidationError)."""

    type = HTTPStatus.BAD_REQUEST.phrase

    def anthropic(self) -> tuple[int, dict[str, Any]]:
        return self.status, self.info()


class Refused(ApiError):
    """An ErrorResponse that the handler returned."""


class UnknownModel(Refused):
    """The model is not served here."""

    status = 404
    type = "NotFoundError"

    def __init__(self, model: object) -> None:
        super().__init__(f"The model `{model}` does not exist.", param="model")


class Raised(ApiError):
    """A ValueError or VLLMValidationError that left the handler."""

    closes = True

    def anthropic(self) -> tuple[int, dict[str, Any]]:
        return 500, {"type": "error", "error": {"type": "internal_error", "message": self.message}}


class Dead(ApiError):
    """The engine is dead."""

    status = 500
    type = "InternalServerError"

    def anthropic(self) -> tuple[int, dict[str, Any]]:
        return 500, {"type": "error", "error": {"type": "internal_error", "message": self.message}}


class HttpError(ApiError):
    """What the web framework itself answers: 404, 405, an unreadable body."""

    def __init__(self, status: int, message: str | None = None) -> None:
        phrase = HTTPStatus(status).phrase
        super().__init__(message or phrase, status=status)
        self.type = phrase

    def anthropic(self) -> tuple[int, dict[str, Any]]:
        return self.status, self.info()
