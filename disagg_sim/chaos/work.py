"""The requests of a chaos run and their right answers."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from disagg_sim import expected_chat_text, expected_text
from disagg_sim.vocabulary import WORDS

MODEL = "sim-model"
MAX_MODEL_LEN = 16384
COMPLETIONS, CHAT, MESSAGES = "/v1/completions", "/v1/chat/completions", "/v1/messages"
REFUSED_BY_DECODE = "chaos-refused-by-decode"
"""The ``user`` of requests that only decode can refuse: their id arrives there twice, the second time as a release."""


@dataclass(frozen=True)
class Work:
    """A request, and the expected response: one text per choice, or the status of the refusal."""

    path: str
    body: dict[str, Any]
    choices: tuple[str, ...]
    status: int = 200

    @property
    def stream(self) -> bool:
        """Whether the response is streamed."""
        return bool(self.body.get("stream"))


def make_work(dice: random.Random, number: int) -> Work:
    """Make a random request: route, stream, n, prompt lists, lengths, and sometimes an invalid request."""
    path = dice.choices((COMPLETIONS, CHAT, MESSAGES), (5, 3, 2))[0]
    limit = dice.choices((1, dice.randrange(2, 12), dice.randrange(12, 60), dice.randrange(60, 150)), (1, 5, 5, 1))[0]
    body: dict[str, Any] = {"model": MODEL, "max_tokens": limit}
    if dice.random() < 0.6:
        body["stream"] = True
    if dice.random() < 0.04:
        return _invalid_request(dice, body, number)
    if path == COMPLETIONS:
        return _completion(dice, body, number)
    messages = [{"role": "user", "content": _words(dice, number)}]
    body["messages"] = messages
    n = 2 if path == CHAT and dice.random() < 0.15 else 1
    if n > 1:
        body["n"] = n
    return Work(path, body, tuple(expected_chat_text(messages, limit, index=index) for index in range(n)))


def _completion(dice: random.Random, body: dict[str, Any], number: int) -> Work:
    limit = body["max_tokens"]
    many = dice.randrange(2, 4) if dice.random() < 0.15 else 1
    prompts = [f"{place} {_words(dice, number)}" for place in range(many)]
    body["prompt"] = prompts if many > 1 else prompts[0]
    n = 2 if dice.random() < 0.15 else 1
    if n > 1:
        body["n"] = n
    right = tuple(expected_text(prompt, limit, index=index) for prompt in prompts for index in range(n))
    return Work(COMPLETIONS, body, right)


def _invalid_request(dice: random.Random, body: dict[str, Any], number: int) -> Work:
    body.pop("stream", None)
    body["prompt"] = _words(dice, number)
    if dice.random() < 0.5:
        return Work(COMPLETIONS, {**body, "temperature": -1}, (), 400)
    # Valid on prefill, which gets max_tokens 1; on decode prompt and max_tokens exceed max_model_len.
    return Work(COMPLETIONS, {**body, "max_tokens": MAX_MODEL_LEN, "user": REFUSED_BY_DECODE}, (), 400)


def _words(dice: random.Random, number: int) -> str:
    """Make a unique prompt of 5 to 4000 tokens; most are short."""
    kind: Callable[[], int] = dice.choices(
        (lambda: dice.randrange(5, 60), lambda: dice.randrange(60, 600), lambda: dice.randrange(600, 4000)), (8, 3, 1)
    )[0]
    return f"Request {number}:" + "".join(dice.choices(WORDS, k=kind()))
