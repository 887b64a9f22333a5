"""From a prepared request to the flight that carries it: who may serve it, and by which protocol.

p2p_nccl    prefill, then decode (flight/flight.py)
disagg_kv   both at once, or decode alone: for requests that no pair can serve, for short prompts, and while there
            is no prefill (flight/together.py)
nixl        prefill, then decode, or decode alone as above (flight/together.py too)
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Coroutine
from typing import Any, Final, cast

from disagg_proxy.admission.gate import Gate
from disagg_proxy.admission.size import TokenGuess, in_blocks
from disagg_proxy.background import Background
from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.kv_kind import NIXL
from disagg_proxy.cluster.pairing import Alone, Pair, Pairing, Wish
from disagg_proxy.cluster.policies import Traits
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.config import Config
from disagg_proxy.deadlines import Deadlines
from disagg_proxy.flight.attempts import Attempts
from disagg_proxy.flight.drains import Drainer
from disagg_proxy.flight.flight import Flight
from disagg_proxy.flight.legs import Legs
from disagg_proxy.flight.together import TogetherFlight
from disagg_proxy.flight.together_legs import Release, TogetherLegs
from disagg_proxy.observe.record import Record
from disagg_proxy.protocol.disagg_kv import DisaggKvHandover
from disagg_proxy.protocol.fields import COMPLETIONS, Route
from disagg_proxy.protocol.handover import Handover
from disagg_proxy.protocol.nixl import NixlHandover
from disagg_proxy.protocol.prefix import Wanted, session_name
from disagg_proxy.protocol.prepare import Prepared
from disagg_proxy.stats import Stats
from disagg_proxy.upstream import Upstream


def handover(found: Pair | Alone) -> Handover | None:
    """How the KV of one try goes from prefill to decode; None where decode computes."""
    if isinstance(found, Alone):
        return None
    if found.decode.kind.protocol == NIXL:
        return NixlHandover()
    if found.prefill.kv is None:
        raise ValueError("an instance without a KV address cannot be in a pair")
    return DisaggKvHandover(found.prefill.kv.text)


_LOADED_AFTER = 0.5
"""Seconds after which decode is taken to have loaded the KV of a request that is not streamed."""


Carrier = Flight | TogetherFlight
"""A request on its way, whatever the protocol."""

CARRIERS: Final = (Flight, TogetherFlight)
"""What tells it from something that is awaited for it: to ask for a Coroutine, an abstract class, costs far more."""

AnyLegs = Legs | TogetherLegs
"""The same of its legs, which :class:`_Order` has the gate make."""


class Launcher:
    """Starts flights.

    Args:
        upstream: the client pool, once it is there.
        release: ends waits for KV on engines of this project's own connector.
    """

    def __init__(
        self,
        config: Config,
        registry: Registry,
        pairing: Pairing,
        gate: Gate,
        background: Background,
        drainer: Drainer,
        stats: Stats,
        upstream: Callable[[], Upstream],
        release: Release,
    ) -> None:
        self._config = config
        self._registry = registry
        self._pairing = pairing
        self._gate = gate
        self._background = background
        self._drainer = drainer
        self._stats = stats
        self._upstream = upstream
        self._release = release
        self.token_guess = TokenGuess()
        self._prefill_deadlines = Deadlines(config.prefill_timeout)
        self._loads = Deadlines(_LOADED_AFTER)
        self._own_key = bool(config.engine_api_key)
        self._learns = bool(config.kv_bytes_per_token or config.decode_alone_below)
        self._wanted = Wanted(pairing.wants_prefix, pairing.wants_session)
        self._wanted_of_one = Wanted(False, pairing.wants_session)

    @property
    def wanted(self) -> Wanted:
        """What :func:`disagg_proxy.protocol.prepare.prepare` shall look for: a single prefill is not chosen."""
        return self._wanted if len(self._registry.ready(Role.PREFILL)) > 1 else self._wanted_of_one

    def launch(
        self, route: Route, headers: bytes, prepared: Prepared, record: Record, session: bytes = b""
    ) -> Carrier | Coroutine[Any, Any, Carrier]:
        """A flight of ``prepared`` on instances that have room now, or what to await until there are such instances.
        The caller must call the flight's ``leave`` in the end.

        Args:
            headers: the client's, as lines for the instances.
            record: opened for it; the flight ends it.
            session: what its SESSION_HEADER says.

        Raises:
            ProxyError: nobody can serve it, an unknown model, or too many requests. So does what is awaited.
        """
        record.asks(prepared.model)
        order = _Order(self, route, headers, prepared, record, session)
        first = order.admit()
        if isinstance(first, (Legs, TogetherLegs)):
            return self._flight(order, first)
        return self._later(order, first)

    async def _later(self, order: _Order, waiting: Coroutine[Any, Any, AnyLegs]) -> Carrier:
        order.record.waited = True
        return self._flight(order, await waiting)

    def _flight(self, order: _Order, first: AnyLegs) -> Carrier:
        order.record.admit()
        if isinstance(first, Legs):
            return Flight(
                Attempts(first, order, self._config.max_tries), self._background, self._drainer, self._stats,
                order.record, prefill_deadlines=self._prefill_deadlines, loads=self._loads, own_key=self._own_key,
                prefilled=order.learn,
            )  # fmt: skip
        return TogetherFlight(
            Attempts(first, order, self._config.max_tries), self._background, self._stats, order.record,
            own_key=self._own_key, prefilled=order.learn,
        )  # fmt: skip

    def _one_by_one(self, order: _Order, found: Pair | Alone) -> Legs:
        if isinstance(found, Alone):
            raise TypeError("an instance that cannot work alone was chosen to do so")
        return Legs(
            self._upstream(), self._registry, self._config, found, order.route, order.headers, order.prepared,
            order.tokens, order.kv_bytes, trace=order.record.trace,
        )  # fmt: skip

    def _together(self, order: _Order, found: Pair | Alone) -> TogetherLegs:
        return TogetherLegs(
            self._upstream(), self._registry, self._config, self._release, found, handover(found), order.route,
            order.headers, order.prepared, order.record.client_id or secrets.token_hex(16), tokens=order.tokens,
            trace=order.record.trace,
        )  # fmt: skip

    def _strangers(self, together: bool) -> set[Instance]:
        """All instances that need the other kind of flight."""
        return {i for i in self._registry.instances() if i.kind.computes is not together}

    def _wish(self, prepared: Prepared, tokens: int) -> Wish:
        if prepared.refusal is not None:
            # Where only such a decode is down, the same request may succeed later.
            if not any(i.kind.computes and i.role is Role.DECODE for i in self._registry.instances()):
                raise prepared.refusal
            return Wish.ALONE
        if tokens < self._config.decode_alone_below:
            return Wish.RATHER_ALONE
        return Wish.EITHER if self._config.decode_alone else Wish.PAIR


class _Order:
    """One request that asks for instances, maybe several times, and makes its legs there."""

    __slots__ = (
        "_launcher", "_sequences", "_templated", "_together", "headers", "kv_bytes", "prepared", "record", "route",
        "tokens", "traits", "wish",
    )  # fmt: skip

    def __init__(
        self, launcher: Launcher, route: Route, headers: bytes, prepared: Prepared, record: Record, session: bytes
    ) -> None:
        self._launcher = launcher
        self._together = False
        self.route = route
        self.headers = headers
        self.prepared = prepared
        self.record = record
        self.tokens = launcher.token_guess.tokens(prepared.model, *prepared.prompt)
        per_token = launcher._config.kv_bytes_per_token
        self.kv_bytes = 0
        self._templated = route is not COMPLETIONS
        self._sequences = prepared.choices * prepared.prompts
        if per_token:
            most = launcher.token_guess.at_most(prepared.model, *prepared.prompt, self._sequences, self._templated)
            self.kv_bytes = per_token * most
        self.wish = launcher._wish(prepared, self.tokens)
        shared = prepared.affinity
        name = shared.user
        if session and launcher.wanted.session:
            name = session_name(session.decode("latin-1"))
        self.traits = Traits(self.tokens, self.tokens * per_token, shared.prefix, shared.size, shared.home, name)

    def admit(self, without: Collection[Instance] = ()) -> AnyLegs | Coroutine[Any, Any, AnyLegs]:
        """Legs, or what to await for them."""
        gate = self._launcher._gate
        admitted = gate.admit(self.prepared.model, self.wish, self.kv_bytes, self.legs, without, self.traits)
        return cast("AnyLegs | Coroutine[Any, Any, AnyLegs]", admitted)

    def legs(self, found: Pair | Alone) -> AnyLegs:
        """Those of the protocol that what was found speaks."""
        self._together = found.decode.kind.computes
        launcher = self._launcher
        return launcher._together(self, found) if self._together else launcher._one_by_one(self, found)

    async def again(self, without: Collection[Instance]) -> AnyLegs:
        """Further legs, of the same protocol as those before."""
        found = self.admit(self._and_strangers(without))
        return found if isinstance(found, (Legs, TogetherLegs)) else await found

    def check(self, without: Collection[Instance]) -> None:
        """Raise what keeps everybody else from serving it."""
        self._launcher._pairing.check(self.prepared.model, self.wish, self._and_strangers(without))

    def _and_strangers(self, without: Collection[Instance]) -> set[Instance]:
        return {*without, *self._launcher._strangers(self._together)}

    def learn(self, tokens: int) -> int:
        """Take in the prompts' length as prefill counted it, 0 when it did not.

        Returns:
            the bytes of KV that they take on decode, from now on the request's own figure.
        """
        launcher, prepared = self._launcher, self.prepared
        token_ids, text_bytes = prepared.prompt
        if not tokens:
            return self.kv_bytes
        if launcher._learns and not token_ids and self._sequences == 1:
            launcher.token_guess.learn(prepared.model, text_bytes, tokens, self._templated)
        self.kv_bytes = launcher._config.kv_bytes_per_token * in_blocks(tokens * prepared.choices, self._sequences)
        return self.kv_bytes
