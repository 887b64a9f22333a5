"""Decides for each request where it is prefilled, by what is learnt of the engines: docs/elastic.md.

    decide    the pair that the policies chose, or one engine alone, or to wait    goals.py: what each would cost
    learn     from the first token and the end of every answer                     pace.py: the pace of each engine
    trust     whether the predictions were right; without it everything is split   trust.py

Until the pool of all engines is learnt, and while predictions are wrong, each request goes to the pair.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from disagg_proxy.cluster.choice import Forecast, NoCapacity, Pair, SingleEngine, Way, Wish, WouldBeLate
from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.policies import Traits
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.placement.goals import Goals, Outlook, cost, missed
from disagg_proxy.placement.pace import Pace, View
from disagg_proxy.placement.trust import Trust
from disagg_proxy.telemetry.request_record import RequestRecord

log = logging.getLogger(__name__)

_ADMITTED: Final = 0.8
"""Share of the SLO's time to first token up to which a request is predicted to meet it. What is admitted at the limit
waits behind others, so it has their errors of prediction on top of its own."""

_UNLOADED: Final = 1.5
"""A prompt that takes longer than the SLO alone counts as in time up to this multiple of what it takes."""

_SPARE: Final = 0.1
"""Share of the SLO's time to first token that an engine's prompts may take where a late request is added to them."""

_GAP_TOKENS: Final = 8.0
_GAP_SECONDS: Final = 0.1
"""Bound on the prompts that a decode computes itself at one time, beyond a single one: what they take, in multiples of
the SLO's time between two tokens; without it in seconds."""

_STAY: Final = 0.003
_STAY_SECONDS: Final = 0.002
"""How much better another way than that of the last request must be: in requests that miss the SLO, or without one in
seconds."""

_MIN_OUTPUT: Final = 8
"""Shorter answers say little of the time between two tokens."""

_MAX_ENGINES: Final = 4096


class Elastic:
    """The decision of :class:`disagg_proxy.cluster.choice.Chooser`, and what it learns from.

    Attributes:
        goals: the SLO.
        trust: the error of recent predictions.
        waits: how often a request was not admitted, by the reason.
    """

    def __init__(self, registry: Registry, goals: Goals) -> None:
        self._registry = registry
        self.goals = goals
        self.trust = Trust()
        self.waits: Counter[str] = Counter()
        self._pool: Pace = Pace()
        self._paces: dict[Instance, Pace] = {}
        self._last = Way.SPLIT

    # -- the decision

    def decide(
        self, pair: Pair | None, engines: Sequence[Instance], uncached: Sequence[int], traits: Traits, wish: Wish
    ) -> Pair | SingleEngine:
        """See :class:`disagg_proxy.cluster.choice.Chooser`."""
        now = self._registry.now()
        if not (self._pool.learnt and self.trust.given):
            if pair is None:
                raise NoCapacity
            return self._take(now, pair, self._outlook_of_pair(now, pair, wish) if self._pool.learnt else None)
        waited = now - wish.arrived if wish.arrived else 0.0
        found: Pair | SingleEngine | None = None
        best: Outlook | None = None
        lowest = rates = 0.0
        views = []
        for engine in engines:
            view = self._view(now, engine)
            rates += view.rate
            views.append(view)
        mean = rates / len(views) if views else 0.0
        goals, last = self.goals, self._last
        stay = _STAY if goals.ttft or goals.tpot else _STAY_SECONDS
        if pair is not None:
            found, best = pair, self._outlook_of_pair(now, pair, wish, views)
            lowest = cost(goals, best, waited) - (stay if last is Way.SPLIT else 0.0)
        for index, view in enumerate(views):
            engine, tokens, way = view.instance, uncached[index], Way.DECODE_ALONE
            if engine.present_role is Role.PREFILL:
                way = Way.PREFILL_ALONE
                if not engine.kv_fits(wish.kv):
                    continue
            elif pair is not None and self._gap_too_long(view, tokens):
                continue
            outlook = _outlook_alone(view, tokens, wish.output, mean if way is Way.PREFILL_ALONE else -1.0)
            price = cost(goals, outlook, waited) - (stay if last is way else 0.0)
            if best is None or price < lowest:
                found, best, lowest = SingleEngine(engine, traits.tokens, tokens), outlook, price
        if found is None or best is None:
            raise NoCapacity
        if self.goals.ttft or self.goals.tpot:
            self._check(found, best, waited, wish)
        return self._take(now, found, best)

    def _gap_too_long(self, decode: View, tokens: int) -> bool:
        """Whether another prompt would hold up the answers of ``decode`` for too long at one time."""
        waiting = decode.instance.computing_tokens
        if not waiting or not decode.running:
            return False
        return decode.per_token * (waiting + tokens) > (_GAP_TOKENS * self.goals.tpot or _GAP_SECONDS)

    def _view(self, now: float, instance: Instance) -> View:
        return View(instance, self.pace(instance), now, backlog(instance), running(instance))

    def _outlook_of_pair(self, now: float, pair: Pair, wish: Wish, views: Sequence[View] = ()) -> Outlook:
        first = second = None
        for view in views:
            if view.instance is pair.prefill:
                first = view
            if view.instance is pair.decode:
                second = view
        first, second = first or self._view(now, pair.prefill), second or self._view(now, pair.decode)
        tokens, output = pair.prefill_tokens, wish.output
        sharing, joining = first.running, second.running
        takes = first.per_token * tokens
        prefilled = first.prefill_seconds(tokens)
        joined = second.token_seconds(joining + 1)
        before = first.token_seconds(sharing) if sharing else 0.0
        return Outlook(
            prefilled + second.pace.handover,
            joined,
            second.spread(joined, tokens, output),
            0.0,
            output,
            (sharing + first.prompts(tokens, prefilled)) * takes + joining * output * second.per_request,
            sharing,
            before,
            before + takes / first.output if sharing else 0.0,
            joining,
            second.token_seconds(joining) if joining else 0.0,
            joined if joining else 0.0,
        )

    def _check(self, found: Pair | SingleEngine, outlook: Outlook, waited: float, wish: Wish) -> None:
        """Whether the request can be admitted now.

        Raises:
            NoCapacity, WouldBeLate: it has to wait.
        """
        goals = self.goals
        alone = isinstance(found, SingleEngine)
        computes, answers = (found.engine, found.engine) if isinstance(found, SingleEngine) else (
            found.prefill, found.decode)  # fmt: skip
        tokens = found.computes if isinstance(found, SingleEngine) else found.prefill_tokens
        pace = self.pace(computes)
        # Where even a single answer would be too slow, waiting does not help.
        if (
            (outlook.sharing or outlook.joining)
            and missed(outlook.tpot, goals.tpot) >= 0.5
            and missed(self.pace(answers).step_seconds(1), goals.tpot) < 0.5
        ):
            self.waits["tpot"] += 1
            raise NoCapacity
        if not goals.ttft:
            return
        if wish.late:
            if pace.compute_seconds(backlog(computes)) > _SPARE * goals.ttft:
                self.waits["late"] += 1
                raise NoCapacity
            return
        unloaded = pace.prefill_seconds(tokens, 0) + (0.0 if alone else self.pace(answers).handover)
        if waited + outlook.ttft > max(_ADMITTED * goals.ttft, _UNLOADED * unloaded):
            self.waits["ttft"] += 1
            raise WouldBeLate

    def _take(self, now: float, found: Pair | SingleEngine, outlook: Outlook | None) -> Pair | SingleEngine:
        if isinstance(found, Pair):
            way, computes, answers, tokens = Way.SPLIT, found.prefill, found.decode, found.prefill_tokens
        else:
            computes = answers = found.engine
            way = Way.PREFILL_ALONE if computes.present_role is Role.PREFILL else Way.DECODE_ALONE
            tokens = found.computes
        self._last = way
        found.forecast = Forecast(way, computes, answers, tokens, backlog(computes))
        if outlook is not None:
            found.forecast.ttft, found.forecast.tpot = outlook.ttft, outlook.tpot
        self.pace(computes).assign(now, tokens)
        return found

    # -- what is learnt

    def pace(self, instance: Instance) -> Pace:
        """What is learnt of ``instance``."""
        pace = self._paces.get(instance)
        if pace is None:
            if len(self._paces) >= _MAX_ENGINES:
                self._paces = {i: p for i, p in self._paces.items() if self._registry.knows(i)}
            pace = self._paces[instance] = Pace(self._pool)
        return pace

    def learn_first_token(self, record: RequestRecord) -> None:
        """The first byte of a streamed answer is here."""
        forecast, now = record.forecast, record.first_byte
        sent = record.prefill_sent if record.prefill is not None else record.decode_sent
        if forecast is None or now is None or sent is None:
            return
        computes, answers = self.pace(forecast.computes), self.pace(forecast.answers)
        done = now
        if forecast.way is Way.SPLIT and record.prefill_done is not None:
            # Prefill's own answer may come a moment after decode's first token.
            done = record.prefill_done
            answers.add_handover(now - done)
        computes.add_prefill(done - sent, forecast.tokens, forecast.backlog)
        computes.computed += forecast.tokens
        forecast.prefilled, forecast.sequences = answers.computed, running(forecast.answers)
        if forecast.ttft and record.admitted is not None and self.trust.add(forecast.ttft, now - record.admitted):
            self._log_trust()

    def learn_end(self, record: RequestRecord) -> None:
        """The answer is complete."""
        forecast = record.forecast
        tokens = record.output_tokens or record.pieces
        if forecast is None or record.outcome != "ok" or record.ended is None or tokens < _MIN_OUTPUT:
            return
        pace, now = self.pace(forecast.answers), max(1, running(forecast.answers))
        if record.streamed and record.first_byte is not None:
            if not record.paused:
                seconds = (record.ended - record.first_byte) / (tokens - 1)
                computed = (pace.computed - forecast.prefilled) / (tokens - 1)
                pace.add_step(seconds, (forecast.sequences + now) / 2, computed)
        elif forecast.way is Way.SPLIT and record.prefill_done is not None and record.prefill_sent is not None:
            computes = self.pace(forecast.computes)
            computes.add_prefill(record.prefill_done - record.prefill_sent, forecast.tokens, forecast.backlog)
            computes.computed += forecast.tokens
            pace.add_step((record.ended - record.prefill_done) / tokens, now, 0.0)

    def prefill_wait(self, instance: Instance) -> float | None:
        """Predicted seconds until ``instance`` could compute another prompt; None while nothing is predicted."""
        if not (self._pool.learnt and self.trust.given):
            return None
        return self.pace(instance).compute_seconds(backlog(instance))

    def _log_trust(self) -> None:
        trust = self.trust
        if trust.given:
            log.warning(
                "Predicted times are right again (mean error %.0f %%): PLACEMENT=elastic decides", 100 * trust.error
            )
        else:
            log.warning(
                "Predicted times to first token are wrong (mean error %.0f %%): requests are split as with "
                "PLACEMENT=split until they are right again", trust.error * 100,
            )  # fmt: skip

    # -- reports

    @property
    def state(self) -> str:
        """learning, elastic, or fallback."""
        if not self._pool.learnt:
            return "learning"
        return "elastic" if self.trust.given else "fallback"

    def report(self) -> dict[str, Any]:
        """For /stats."""
        now = self._registry.now()
        return {
            "state": self.state,
            "prediction_error": round(self.trust.error, 3),
            "waits": dict(self.waits),
            "engines": {
                instance.http.text: {
                    **pace.report(),
                    "prompt_tokens_per_second": round(pace.rate(now) * 1000),
                    "computing_tokens": instance.computing_tokens,
                    "decoding": instance.decoding,
                    "kv_committed_tokens": instance.kv_committed,
                    "kv_capacity_tokens": instance.engine_load and instance.engine_load.kv_capacity_tokens,
                }
                for instance, pace in self._paces.items()
                if self._registry.knows(instance)
            },
        }


def _outlook_alone(view: View, tokens: int, output: int, mean: float) -> Outlook:
    """What is predicted where one engine serves alone.

    Args:
        mean: on a prefill the mean rate of prompts of all engines, else -1.
    """
    sharing = view.running
    takes = view.per_token * tokens
    prefilled = view.prefill_seconds(tokens)
    joined = view.token_seconds(sharing + 1)
    shared = 0.0
    if mean >= 0.0:
        shared = view.token_seconds(sharing + 1, mean) if mean > view.rate else joined
    return Outlook(
        prefilled,
        joined,
        view.spread(joined, tokens, output),
        shared,
        output,
        (sharing + view.prompts(tokens, prefilled)) * takes + sharing * output * view.per_request,
        sharing,
        view.token_seconds(sharing) if sharing else 0.0,
        joined + takes / view.output if sharing else 0.0,
    )


def backlog(instance: Instance) -> int:
    """Prompt tokens that it has to compute, those of other workers taken to be like this one's."""
    own = instance.in_flight - instance.peer_counts[0]
    return instance.computing_tokens if own <= 0 else instance.computing_tokens * instance.in_flight // own


def running(instance: Instance) -> int:
    """Requests that it generates answers for, those of other workers taken to be like this one's."""
    own = instance.answering - instance.peer_counts[4]
    return instance.decoding if own <= 0 else instance.decoding * instance.answering // own
