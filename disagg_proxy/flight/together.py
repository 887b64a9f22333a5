"""One request whose decode computes by itself what it gets no KV for: decode's answer is the answer. Both legs run at
once, or decode's begins when prefill's is over, by the protocol (:mod:`disagg_proxy.protocol.handover`).

    prefill refused or failed      decode computes by itself; the client notices nothing
    decode refused (4xx)           the client gets that answer
    decode failed (5xx, broken, cannot be reached, stands still) before the first byte    another decode, bounded tries
    decode breaks in mid-answer    the client's connection is cut
    client leaves                  both legs are aborted at once; vLLM and the connector free everything themselves

The shape is that of :mod:`disagg_proxy.flight.flight`: the legs run in tasks of their own, the client is an observer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from disagg_proxy.background import Background
from disagg_proxy.errors import EngineDeadline, EngineError, ProxyError, Unavailable
from disagg_proxy.flight.attempts import Attempts
from disagg_proxy.flight.client import Client, Told
from disagg_proxy.flight.outcome import Outcome, refusal
from disagg_proxy.flight.relay import Relay
from disagg_proxy.flight.together_legs import TogetherLegs
from disagg_proxy.observe.record import Record
from disagg_proxy.protocol.headers import answer_headers, is_stream
from disagg_proxy.protocol.prefill_answer import prompt_tokens
from disagg_proxy.protocol.redact import NoHiding
from disagg_proxy.protocol.usage import UsageRepair, cache_use, output_tokens, repair_usage, tells_cache_use
from disagg_proxy.stats import Stats
from disagg_proxy.upstream import Answer, Enough, WholeAnswer

_USAGE_WAIT = 1.0
"""Seconds that a whole answer waits for prefill's figure of cached tokens."""


class TogetherFlight:
    """One request, from its first pair to its last byte. Arguments as for the other flight."""

    def __init__(
        self,
        attempts: Attempts[TogetherLegs],
        background: Background,
        stats: Stats,
        record: Record,
        *,
        own_key: bool,
        prefilled: Callable[[int], int],
    ) -> None:
        self._attempts = attempts
        self._background = background
        self._stats = stats
        self._own_key = own_key
        self._prefilled = prefilled
        self._client = Client(record)
        self._record = record
        self._relay: Relay | None = None
        self._task: asyncio.Task[None] | None = None
        self._prefill: asyncio.Task[None] | None = None
        self._repair = UsageRepair(attempts.legs.route, None)

    @property
    def _legs(self) -> TogetherLegs:
        return self._attempts.legs

    @property
    def public_id(self) -> str:
        """The id that clients see in the body."""
        return self._legs.id.public

    def start(self, told: Told) -> None:
        """Run the legs until there is something to say to the client, and say it."""
        self._client.listen(told)
        self._task = self._background.spawn(self._run(), "request")

    def leave(self) -> None:
        """The client's HTTP exchange is over. Only the first call counts."""
        if not self._client.leave():
            return
        self._stop_prefill()
        if self._relay is not None:
            self._relay.close()
        elif self._task is None:
            self._legs.give_back()
        else:
            # Not before its first step, or nothing in it could give anything back.
            asyncio.get_running_loop().call_soon(self._task.cancel)
        self._record.end()

    async def _run(self) -> None:
        try:
            outcome = await self._fly()
        except ProxyError as error:
            self._end(error)
        except BaseException:
            self._end(Unavailable("The request was given up.", retry_after=1))
            raise
        else:
            if not self._client.tell(outcome) and self._relay is not None:
                self._relay.close()

    def _end(self, error: ProxyError) -> None:
        self._give_back(self._legs)
        self._client.fail(error)

    def _give_back(self, legs: TogetherLegs) -> None:
        """A try has ended without an answer."""
        self._stop_prefill()
        if legs.unfetched:
            self._background.spawn(legs.forget(), "release")
        legs.give_back()

    async def _fly(self) -> Outcome:
        while True:
            legs = self._legs
            self._record.put_on(legs.prefill, legs.decode, legs.id.public)
            self._ask_prefill(legs)
            try:
                answer = await legs.ask_decode(self._record.ask_decode)
                if answer.status == 200:
                    return await self._relayed(legs, answer)
                refused = await answer.whole()
                legs.end_refused(refused.status)
                self._give_back(legs)
                return self._refused(legs, refused)
            except (EngineError, EngineDeadline) as error:
                legs.decode_lease.end(failed=True)
                self._give_back(legs)
                lost = error
            if not self._client.waits or not await self._attempts.another(legs.decode, self._waits):
                raise lost
            self._stats.failovers += 1

    def _waits(self) -> bool:
        return self._client.waits

    def _refused(self, legs: TogetherLegs, answer: WholeAnswer) -> Outcome:
        outcome = refusal(answer, "decode", legs.id, self._own_key)
        self._record.refused(answer.status)
        return outcome

    # -- prefill's part

    def _ask_prefill(self, legs: TogetherLegs) -> None:
        self._repair.use = None
        if legs.prefill is not None:
            self._record.ask_prefill()
            self._prefill = self._background.spawn(self._follow_prefill(legs), "prefill")

    async def _follow_prefill(self, legs: TogetherLegs) -> None:
        answer = await legs.ask_prefill()
        if answer is not None and legs is self._legs:
            self._record.answer_prefill()
            tokens = prompt_tokens(answer.body)
            self._prefilled(tokens)
            self._record.prompt_tokens = tokens or None
            self._repair.use = use = cache_use(legs.route, answer.body)
            self._record.cached_tokens = use.cached

    def _stop_prefill(self) -> None:
        """Nobody needs its KV any more."""
        if self._prefill is not None:
            self._prefill.cancel()
            self._prefill = None

    # -- the answer's body

    async def _relayed(self, legs: TogetherLegs, answer: Answer) -> Outcome:
        headers = answer_headers(answer.headers, None)
        if not is_stream(answer.headers):
            whole = await answer.whole()
            legs.decoding.heard()
            if tells_cache_use(legs.route, whole.body) and self._prefill is not None:
                # Prefill's own answer may come a moment later than decode's.
                await asyncio.wait((self._prefill,), timeout=_USAGE_WAIT)
            self._first_byte(legs, streamed=False)
            self._record.output_tokens = output_tokens(whole.body)
            if self._record.prompt_tokens is None:
                self._record.prompt_tokens = prompt_tokens(whole.body) or None
            self._ended(complete=True)
            return Outcome(200, headers, repair_usage(legs.route, whole.body, self._repair.use))
        try:
            await answer.until(Enough.BEGUN)
        except BaseException:
            answer.close()
            raise
        vigil = legs.decoding
        vigil.heard()
        relay = Relay(answer, NoHiding(), self._repair, vigil, self._ended, self._record)
        self._first_byte(legs, streamed=True)
        vigil.give_up = lambda error: relay.cut()
        self._relay = relay
        return Outcome(200, headers, relay)

    def _first_byte(self, legs: TogetherLegs, streamed: bool) -> None:
        legs.loaded()
        legs.prepared.forget_bodies()
        self._record.begin_answer(streamed)

    def _ended(self, complete: bool) -> None:
        if complete:
            self._record.complete()
        elif not self._client.gone:
            self._record.cut()
        self._stop_prefill()
        self._legs.end_decode(failed=False if complete else None if self._client.gone else True)
