"""The order of the two legs of one request, and the chosen outcome for each moment at which it can end.

    prefill refused (4xx)          the client gets that answer; decode is not asked
    prefill failed (5xx, broken)   another pair; without one 502. Decode is not asked, nothing is left to free
    prefill too late               504 for the client; the leg runs on, then its KV is drained
    client leaves during prefill   the same, with nobody to answer: a prefill that was sent is never cancelled
    decode refused (4xx)           the client gets that answer; the KV is drained
    decode cannot be reached       another pair; without one 502. The KV is drained, unless its process has ended
    decode broken before the first byte    502, no drain: it may have been received, and a second decode of an id hangs
    prefill stands still           another pair; without one 504. The old leg runs on, then its KV is drained
    decode or prefill is lost during the prefill    another pair; without one the leg is waited for
    decode stands still            504 before the first byte of the answer, a cut afterwards
    client leaves before the first byte of the answer    decode is aborted once it surely has the request
    client leaves later            decode is aborted at once: vLLM frees everything itself
    decode breaks in mid-answer    the client's connection is cut

The legs run in a task of their own. The client is an observer: it is told what :meth:`Flight.start` was given for it,
reads the body, and whoever holds the flight calls :meth:`Flight.leave` when the client's HTTP exchange is over, however
it ended.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from enum import Enum

from disagg_proxy.background import Background
from disagg_proxy.cluster.instance import Instance
from disagg_proxy.deadlines import Deadlines
from disagg_proxy.errors import EngineDeadline, EngineError, EngineUnreachable, ProxyError, Unavailable
from disagg_proxy.flight.attempts import Attempts
from disagg_proxy.flight.client import Client, Told
from disagg_proxy.flight.drains import Drainer
from disagg_proxy.flight.legs import Legs, NotAsked, decode_went_away
from disagg_proxy.flight.outcome import Outcome, over_context, prefill_refusal, refusal, whole
from disagg_proxy.flight.relay import Relay
from disagg_proxy.flight.verdict import is_failure
from disagg_proxy.observe.record import Record
from disagg_proxy.protocol.headers import answer_headers, is_stream
from disagg_proxy.protocol.prefill_answer import prompt_tokens
from disagg_proxy.protocol.redact import IdHider, hide
from disagg_proxy.protocol.usage import CacheUse, UsageRepair, cache_use, output_tokens, repair_usage
from disagg_proxy.stats import Stats
from disagg_proxy.steps import Steps
from disagg_proxy.upstream import Answer, Enough, WholeAnswer

log = logging.getLogger(__name__)

ABORT_GRACE = 5.0
"""Seconds that decode gets to take in a request whose client left before the first byte. An abort that comes while
the API server still tokenises would leave the KV on the instance; one that comes later frees it."""


class _Phase(Enum):
    PREFILL = 1
    DECODE = 2
    """Until the first byte of the answer's body."""
    BODY = 3
    OVER = 4


class Flight:
    """One request, from its first pair to its last byte.

    Args:
        prefill_deadlines: when the client gets a 504 for a prefill that has not answered.
        loads: when decode is taken to have loaded the KV of a request that is not streamed, since its answer shows
            nothing before its end. A decode with a free place loads in its next step.
        own_key: whether the proxy's own key went to the instances, so that a 401 is not the client's doing.
        prefilled: told how many tokens a prefill that did its work has counted in the prompts; 0 when it does not say.
    """

    def __init__(
        self,
        attempts: Attempts[Legs],
        background: Background,
        drainer: Drainer,
        stats: Stats,
        record: Record,
        *,
        prefill_deadlines: Deadlines,
        loads: Deadlines,
        own_key: bool,
        prefilled: Callable[[int], int],
    ) -> None:
        self._attempts = attempts
        self._background = background
        self._drainer = drainer
        self._stats = stats
        self._prefill_deadlines = prefill_deadlines
        self._loads = loads
        self._deadline: int | None = None
        self._load: int | None = None
        self._own_key = own_key
        self._prefilled = prefilled
        self._client = Client(record)
        self._record = record
        self._phase = _Phase.PREFILL
        self._relay: Relay | None = None
        self._steps: Steps | None = None
        self._begun = False
        self._begin_try()

    @property
    def public_id(self) -> str:
        """The id that clients see in the body."""
        return self._legs.id.public

    # -- the client's side

    def start(self, told: Told) -> None:
        """Run the legs until there is something to say to the client, and say it."""
        self._client.listen(told)
        self._deadline = self._prefill_deadlines.add(self._prefill_late)
        self._begin()

    def leave(self) -> None:
        """The client's HTTP exchange is over. Only the first call counts."""
        if not self._client.leave():
            return
        self._prefill_deadlines.drop(self._deadline)
        if self._phase is _Phase.DECODE and self._steps is not None:
            # An abort that comes while the API server still tokenises would leave the KV on the instance.
            asyncio.get_running_loop().call_later(ABORT_GRACE, self._steps.cancel)
        elif self._relay is not None:
            self._relay.close()
        elif not self._begun:
            self._legs.give_back()
        self._record.end()

    def _begin(self) -> None:
        """Run the present legs. They may end in here."""
        self._begun = True
        self._steps = steps = self._background.request(self._run())
        steps.begin()

    def _prefill_late(self) -> None:
        if self._phase is _Phase.PREFILL:
            self._client.fail(
                EngineDeadline(f"The prefill did not finish within {self._prefill_deadlines.seconds:g} s.")
            )

    # -- the legs

    def _begin_try(self) -> None:
        self._legs = legs = self._attempts.legs
        self._record.put_on(legs.pair.prefill, legs.pair.decode, legs.id.public)

    async def _run(self) -> None:
        try:
            outcome = await self._fly()
        except ProxyError as error:
            self._fail(error)
        except BaseException:
            self._fail(self._legs.frozen or Unavailable("The request was given up.", retry_after=1))
            raise
        else:
            if outcome is not None and not self._client.tell(outcome) and self._relay is not None:
                self._relay.close()

    def _fail(self, error: ProxyError) -> None:
        self._phase = _Phase.OVER
        self._legs.give_back()
        self._client.fail(error)

    async def _fly(self) -> Outcome | None:
        """Both legs in order, on one pair after another; None when nobody waits for the answer any more."""
        while True:
            legs, lost = self._legs, None
            legs.when_prefill_stands = self._leave_behind
            try:
                self._record.ask_prefill()
                prefilled = await legs.prefill()
                if not legs.abandoned:
                    self._record.answer_prefill()
                if prefilled.status >= 500 and is_failure(legs.route, prefilled.status):
                    # One of its own; another prefill may do.
                    refusal(prefilled, "prefill", legs.id, self._own_key)
                refused = prefill_refusal(legs.route, prefilled, legs.prepared.choices)
            except ProxyError as error:
                if legs.abandoned:
                    legs.give_back()
                    return None
                if not isinstance(error, EngineError):
                    raise
                lost = error
            if lost is not None:
                await self._another_or_raise(legs.pair.prefill, lost)
                continue
            if refused is not None:
                legs.end_decode()
                return None if legs.abandoned else self._refused(refused, "prefill")
            tokens = prompt_tokens(prefilled.body)
            legs.kv.resize(self._prefilled(tokens))
            use = cache_use(legs.route, prefilled.body)
            self._record.cached_tokens = use.cached
            self._record.prompt_tokens = tokens or None
            if legs.abandoned and legs.decode_lease.process_ended:
                legs.give_back()
                return None
            if legs.abandoned or not self._client.waits:
                self._background.spawn(self._drain(legs), "drain")
                return None
            told = self._told_by_prefill(prefilled)
            if told is not None:
                self._drain_behind()
                self._phase = _Phase.OVER
                return told
            self._phase = _Phase.DECODE
            self._record.ask_decode()
            self._prefill_deadlines.drop(self._deadline)
            if not legs.prepared.streams:
                self._load = self._loads.add(legs.kv.release)
            try:
                answer = await legs.decode()
                if answer.status == 200:
                    return await self._relayed(answer, use)
            except NotAsked as failure:
                if not legs.decode_lease.process_ended:
                    self._drain_behind()
                lost = failure.error
            except ProxyError:
                self._end_decode(failed=True)
                raise
            if lost is None:
                return await self._refused_by_decode(answer)
            await self._another_or_raise(legs.pair.decode, lost)

    def _leave_behind(self, legs: Legs, error: ProxyError | None) -> None:
        """Continue the request on another pair while the prefill leg runs on.

        Args:
            error: prefill is frozen; the client gets this where there is no other pair. None: prefill or decode is
                lost, and the leg is left only for a pair that can serve.
        """
        if legs is not self._legs or legs.abandoned or not self._client.waits:
            return
        # A frozen prefill may be blocked by a decode that takes in no KV, and a lost decode blocks its prefill.
        failed, suspect = legs.pair.prefill, legs.pair.decode
        if error is None:
            if legs.decode_lease.lost:
                failed, suspect = suspect, failed
            if not self._attempts.possible(failed):
                return
        legs.abandoned = True
        legs.keep_for_release()
        self._steps = None
        self._background.spawn(self._go_on(failed, suspect, error or decode_went_away()), "request")

    async def _go_on(self, failed: Instance, suspect: Instance, error: ProxyError) -> None:
        if await self._attempts.another(failed, lambda: self._client.waits, suspect=suspect):
            self._stats.failovers += 1
            self._begin_try()
            self._begin()
        else:
            self._client.fail(error)

    async def _another_or_raise(self, failed: Instance, error: EngineError) -> None:
        """Go on with another pair, or end with what the last one said."""
        blame = True if isinstance(error, EngineUnreachable) and failed is self._legs.pair.decode else None
        self._legs.end_decode(failed=blame, received=False)
        self._legs.give_back()
        if not self._client.waits or not await self._attempts.another(failed, lambda: self._client.waits):
            raise error
        self._phase = _Phase.PREFILL
        self._stats.failovers += 1
        self._begin_try()

    async def _refused_by_decode(self, answer: Answer) -> Outcome:
        refused = await answer.whole()
        self._phase = _Phase.OVER
        if refused.status < 500:
            self._legs.decoding.end(received=False)
            # The API server turned it away before its engine knew of it, so the KV still waits there.
            self._drain_behind()
        else:
            self._legs.end_refused(refused.status)
        return self._refused(refused, "decode")

    def _refused(self, answer: WholeAnswer, leg: str) -> Outcome:
        outcome = refusal(answer, leg, self._legs.id, self._own_key)
        self._record.refused(answer.status)
        return outcome

    def _told_by_prefill(self, answer: WholeAnswer) -> Outcome | None:
        """What prefill's answer already settles, so that decode has nothing to do but to free the KV."""
        if self._legs.prepared.prefill_answers:
            self._first_byte(streamed=False)
            self._record.output_tokens = output_tokens(answer.body)
            self._record.complete()
            return whole(answer, self._legs.id)
        refused = over_context(self._legs, answer)
        if refused is not None:
            self._record.refused(refused.status)
        return refused

    def _drain_behind(self) -> None:
        """Drain the present try's KV while this request goes on."""
        self._legs.keep_for_release()
        self._background.spawn(self._drain(self._legs), "drain")

    async def _drain(self, legs: Legs) -> None:
        try:
            await self._drainer.drain(legs)
        finally:
            legs.give_back()
            if legs is self._legs:
                self._phase = _Phase.OVER

    def _end_decode(self, failed: bool | None = None) -> None:
        self._phase = _Phase.OVER
        self._legs.end_decode(failed=failed)

    # -- the answer's body

    async def _relayed(self, answer: Answer, use: CacheUse) -> Outcome:
        legs = self._legs
        headers = answer_headers(answer.headers, legs.id)
        vigil = legs.decoding
        if not is_stream(answer.headers):
            # The repair may change the length, which goes out before the body.
            whole = await answer.whole() if legs.prepared.streams else answer.read()
            vigil.heard()
            self._first_byte(streamed=False)
            self._record.output_tokens = output_tokens(whole.body)
            self._ended(complete=True)
            return Outcome(200, headers, repair_usage(legs.route, hide(legs.id, whole.body), use))
        try:
            # Until the first byte a failure can still be told by a status of its own.
            await answer.until(Enough.BEGUN)
        except BaseException:
            answer.close()
            raise
        vigil.heard()
        relay = Relay(answer, IdHider(legs.id), UsageRepair(legs.route, use), vigil, self._ended, self._record)
        self._first_byte(streamed=True)
        self._legs.prepared.forget_bodies()
        vigil.give_up = lambda error: relay.cut()
        self._phase = _Phase.BODY
        self._relay = relay
        return Outcome(200, headers, relay)

    def _first_byte(self, streamed: bool) -> None:
        self._loads.drop(self._load)
        self._legs.kv.release()
        self._record.begin_answer(streamed)

    def _ended(self, complete: bool) -> None:
        if complete:
            self._record.complete()
        elif not self._client.gone:
            self._record.cut()
        self._end_decode(failed=False if complete else None if self._client.gone else True)
