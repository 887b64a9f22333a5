"""The two arms: through the proxy, and directly to the engines. Both return when all their requests are answered.

``Direct`` does what the proxy does for these requests, in the same order, with the same fields: for P2pNcclConnector
one id with both KV addresses, prefill first and then decode (docs/request-id.md); for the project's own connector
``kv_transfer_params`` and both legs at once (docs/connector.md). A request that was sent is never cancelled here, and
decode is never asked when prefill did not answer 200: either stops engines with P2pNcclConnector.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from time import perf_counter
from typing import Protocol

from bench.gpu_latency.prompts import Body
from disagg_report.load_client import Broken, LoadClient, Response

PATH = "/v1/completions"


class Refused(Exception):
    """An engine or the proxy answered, but not 200 and in full."""


class Shot:
    """One request and what became of it.

    Attributes:
        sent: when it began (``perf_counter``), before any wait of the arm's own.
        arrivals: when each event with tokens came.
        prefill: seconds until prefill's leg was answered; 0 through the proxy.
        error: why it failed, empty when it did not.
        place: number of its pair at low rates, of its block at saturating ones.
    """

    __slots__ = ("arm", "arrivals", "error", "place", "prefill", "sent", "tokens")

    def __init__(self, arm: str, tokens: int, place: int) -> None:
        self.arm, self.tokens, self.place = arm, tokens, place
        self.sent = 0.0
        self.arrivals: list[float] = []
        self.prefill = 0.0
        self.error = ""


class Arm(Protocol):
    """One way to an answer."""

    name: str

    async def ask(self, body: Body, shot: Shot) -> Response: ...


async def fire(arm: Arm, body: Body, shot: Shot) -> Shot:
    """Send ``body`` by ``arm``; what goes wrong is noted in ``shot``."""
    shot.sent = perf_counter()
    try:
        answer = await arm.ask(body, shot)
        _check(answer, arm.name)
        shot.arrivals = answer.arrivals
        if not answer.done or answer.completion_tokens != body.answer:
            raise Refused(f"{answer.completion_tokens} tokens of {body.answer}, [DONE]: {answer.done}")
    except (Broken, Refused) as error:
        shot.error = f"{type(error).__name__}: {error}"
    return shot


def _check(answer: Response, who: str) -> None:
    if answer.status != 200:
        raise Refused(f"{who}: {answer.status} {bytes(answer.body[:300])!r}")


class Proxied:
    """One POST to the proxy."""

    name = "proxy"

    def __init__(self, proxy: LoadClient) -> None:
        self._proxy = proxy

    async def ask(self, body: Body, shot: Shot) -> Response:
        return await self._proxy.post(PATH, body.whole(), Response(stream=True))


class KvCapacity:
    """Limit of KV that may wait on decode, in bytes; requests above it wait in order. The proxy has the same limit.

    KV counts from the request to prefill until decode's first token, as in the proxy.
    """

    def __init__(self, capacity: int) -> None:
        self._free = capacity
        self._capacity = capacity
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, size: int) -> None:
        """Wait until ``size`` bytes are free, and take them; a larger request than the limit takes all of it."""
        size = min(size, self._capacity)
        if not self._queue and size <= self._free:
            self._free -= size
            return
        turn = asyncio.get_running_loop().create_future()
        self._queue.append((size, turn))
        await turn

    def give(self, size: int) -> None:
        """Release what ``take`` took."""
        self._free += min(size, self._capacity)
        while self._queue and self._queue[0][0] <= self._free:
            size, turn = self._queue.popleft()
            self._free -= size
            turn.set_result(None)


class DirectP2p:
    """Prefill, then decode, under one id with both KV addresses."""

    name = "direct"

    def __init__(
        self, prefill: LoadClient, decode: LoadClient, addresses: tuple[str, str], capacity: KvCapacity, per_token: int
    ):
        self._prefill, self._decode = prefill, decode
        self._head = f"___prefill_addr_{addresses[0]}___decode_addr_{addresses[1]}_"
        self._capacity, self._per_token = capacity, per_token

    async def ask(self, body: Body, shot: Shot) -> Response:
        size = body.tokens * self._per_token
        await self._capacity.take(size)
        held = [size]

        def release() -> None:
            if held:
                self._capacity.give(held.pop())

        try:
            name = self._head + secrets.token_hex(16)
            begun = perf_counter()
            _check(await self._prefill.post(PATH, body.prefill(), Response(), {"X-Request-Id": name}), "prefill")
            shot.prefill = perf_counter() - begun
            response = Response(stream=True, on_first=release)
            return await self._decode.post(PATH, body.whole(), response, {"X-Request-Id": name})
        finally:
            release()


class DirectOwn:
    """Both legs at once; decode fetches the KV from the address that prefill announces."""

    name = "direct"

    def __init__(self, prefill: LoadClient, decode: LoadClient, prefill_kv: str) -> None:
        self._prefill, self._decode, self._kv = prefill, decode, prefill_kv

    async def ask(self, body: Body, shot: Shot) -> Response:
        name = secrets.token_hex(16)
        offer = f'"kv_transfer_params":{{"transfer_id":"{name}"}}'
        fetch = f'"kv_transfer_params":{{"transfer_id":"{name}","from":"{self._kv}"}}'
        begun = perf_counter()

        async def compute() -> None:
            _check(await self._prefill.post(PATH, body.prefill(offer), Response()), "prefill")
            shot.prefill = perf_counter() - begun

        # If prefill fails, decode computes the prompt; that would not measure this path, so the error counts.
        leg = asyncio.ensure_future(compute())
        results = await asyncio.gather(
            self._decode.post(PATH, body.whole(fetch), Response(stream=True)), leg, return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result
        answer = results[0]
        assert isinstance(answer, Response)
        return answer
