"""The beginning of a streamed answer to /v1/responses.

vLLM sends ``response.created`` and ``response.in_progress`` before it waits for its engine, so they do not show that
the engine has begun (0.19 - 0.33, ``entrypoints/openai/responses/serving.py``, ``responses_stream_generator``). Errors
come after them: vLLM then breaks off the stream, since its error is no event of this API.
"""

from __future__ import annotations

import re
from typing import Final

_OTHER_EVENT: Final = re.compile(
    rb"^(?:event: (?!response\.(?:created|queued|in_progress)\r?\n)[^\n]*\n|data: \{\"error\")", re.MULTILINE
)


def has_output(beginning: bytes) -> bool:
    """Whether the beginning of a stream holds more than the events that precede the engine's output."""
    return _OTHER_EVENT.search(beginning) is not None
