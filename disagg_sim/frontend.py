"""Between HTTP and the step loop: sequences become text, stop strings end them, a client that leaves aborts them.

Mirrors vLLM 0.21 ``v1/engine/async_llm.py`` (abort on cancellation), ``v1/engine/detokenizer.py`` (stop strings
and what is held back for them) and ``openai/engine/serving.py`` (beam search).
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from disagg_sim.request import EngineDeadError, EngineRequest, LogprobEntry, Sampling, Token, engine_ids
from disagg_sim.step_loop import StepLoop
from disagg_sim.vocabulary import EOS_ID, StreamDecoder


@dataclass
class Delta:
    """What one step adds to one choice."""

    choice: Choice
    text: str
    token: Token
    last: bool


@dataclass(eq=False)
class Choice:
    """One sequence as the client sees it."""

    request: EngineRequest
    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[LogprobEntry | None] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    _shown: int = 0
    _decoder: StreamDecoder = field(default_factory=StreamDecoder)

    @property
    def ended(self) -> bool:
        """True after the last token, or after a stop string."""
        return self.finish_reason is not None

    def feed(self, token: Token) -> Delta:
        """Take one token in; the delta's text leaves out what could still become a stop string."""
        sampling = self.request.sampling
        ended = token.finish_reason is not None
        shown = token.id if token.stop_reason is None else EOS_ID
        before = len(self.text)
        self.text += self._decoder.feed(shown, final=ended)
        self.ids.append(token.id)
        self.logprobs.append(token.logprobs)
        self.finish_reason, self.stop_reason = token.finish_reason, token.stop_reason
        if len(self.ids) > sampling.min_tokens:
            self._stop(sampling, before)
        held = 0 if self.finish_reason or sampling.include_stop else max((len(s) for s in sampling.stop), default=1) - 1
        end = max(self._shown, len(self.text) - held)
        delta = Delta(self, self.text[self._shown : end], token, self.ended)
        self._shown = end
        return delta

    def _stop(self, sampling: Sampling, before: int) -> None:
        for stop in sampling.stop:
            at = self.text.find(stop, max(0, before - len(stop) + 1))
            if at >= 0:
                self.text = self.text[: at + len(stop) if sampling.include_stop else at]
                self.finish_reason, self.stop_reason = "stop", stop
                return


def make_requests(
    request_id: str, prompt_ids: list[int], sampling: Sampling, *, prompt_index: int = 0, randomize: bool = False
) -> list[EngineRequest]:
    """The engine's requests for one prompt: one, or n children. Each has a queue of its own; see :func:`generate`."""
    return [
        EngineRequest(child, prompt_ids, sampling, asyncio.Queue(), prompt_index, index)
        for index, child in enumerate(engine_ids(request_id, sampling.n, randomize=randomize))
    ]


async def generate(loop: StepLoop, requests: Sequence[EngineRequest]) -> AsyncGenerator[Delta, None]:
    """Run sequences together and yield every step's addition. Leaving early aborts what still runs.

    Raises:
        EngineDeadError: when the engine is dead or dies.
    """
    queue: asyncio.Queue[tuple[EngineRequest, Token | EngineDeadError]] = asyncio.Queue()
    choices = {request: Choice(request) for request in requests}
    for request in requests:
        request.outputs = queue
    try:
        for request in requests:
            loop.add(request)
        left = len(choices)
        while left:
            request, token = await queue.get()
            if isinstance(token, EngineDeadError):
                raise token
            choice = choices[request]
            if choice.ended:
                continue
            delta = choice.feed(token)
            if delta.last:
                left -= 1
                loop.abort(request)
            yield delta
    finally:
        for request in requests:
            loop.abort(request)


async def collect(loop: StepLoop, requests: Sequence[EngineRequest]) -> list[Choice]:
    """The finished choices, in the order of ``requests``."""
    choices: dict[EngineRequest, Choice] = {}
    async with aclosing(generate(loop, requests)) as deltas:
        async for delta in deltas:
            choices[delta.choice.request] = delta.choice
    return [choices[request] for request in requests]


async def beam_search(loop: StepLoop, request_id: str, prompt_ids: list[int], sampling: Sampling) -> list[Choice]:
    """``n`` beams, each step a request of one token under an id with a fresh random part, as in vLLM.

    The random part makes P and D use different ids for the same work.
    """
    single = replace(sampling, n=1, max_tokens=1, min_tokens=0, stop=(), beam_search=False, kv_transfer=None)
    template = EngineRequest(request_id, prompt_ids, replace(sampling, stop=()), asyncio.Queue())
    beams = [Choice(template) for _ in range(sampling.n)]
    for step in range(sampling.max_tokens):
        batch = f"{request_id}-{uuid.uuid4().hex}"
        width = 1 if step == 0 else len(beams)
        requests = [
            EngineRequest(f"{batch}-beam-{i}", prompt_ids + beams[i].ids, single, asyncio.Queue(), index=i)
            for i in range(width)
        ]
        results = await collect(loop, requests)
        for i, beam in enumerate(beams):
            ended = "length" if step + 1 == sampling.max_tokens else None
            beam.feed(Token(results[i % width].ids[0], finish_reason=ended))
    return beams
