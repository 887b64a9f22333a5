"""From a prepared request to the flight that carries it: who may serve it, and by which protocol.

p2p_nccl    prefill, then decode (flight/flight.py)
disagg_kv   both at once, or decode alone: for requests that no pair can serve, for short prompts, and while there
            is no prefill (flight/together.py)
nixl        prefill, then decode, or decode alone as above (flight/together.py too)
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Coroutine
from typing import Any, Protocol, TypeVar, cast

from disagg_proxy.admission.gate import Admitted, Gate, Held
from disagg_proxy.admission.size import TokenGuess
from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.kv_kind import NIXL
from disagg_proxy.cluster.pairing import Alone, Pair, Pairing, Wish
from disagg_proxy.cluster.policies import Traits
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.config import Config
from disagg_proxy.deadlines import Deadlines
from disagg_proxy.flight.attempts import Attempts
from disagg_proxy.flight.background import Background
from disagg_proxy.flight.client import Told
from disagg_proxy.flight.drains import Drainer
from disagg_proxy.flight.flight import Flight
from disagg_proxy.flight.legs import Legs
from disagg_proxy.flight.together import TogetherFlight
from disagg_proxy.flight.together_legs import Release, TogetherLegs
from disagg_proxy.observe.record import Record
from disagg_proxy.protocol.disagg_kv import DisaggKvHandover
from disagg_proxy.protocol.fields import Route
from disagg_proxy.protocol.handover import Handover
from disagg_proxy.protocol.nixl import NixlHandover
from disagg_proxy.protocol.prefill_answer import prompt_tokens
from disagg_proxy.protocol.prefix import Wanted, session_name
from disagg_proxy.protocol.prepare import Prepared
from disagg_proxy.stats import Stats
from disagg_proxy.upstream import Upstream

L = TypeVar("L", Legs, TogetherLegs)


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


class Carrier(Protocol):
    """A request on its way, whatever the protocol."""

    @property
    def public_id(self) -> str: ...

    def start(self, told: Told) -> None: ...

    def leave(self) -> None: ...


class Launcher:
    """Starts flights.

    Args:
        upstream: the client pool, once it is there.
        release: ends waits for KV on engines of this project's own connector.

    Attributes:
        wanted: what :func:`disagg_proxy.protocol.prepare.prepare` shall look for.
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
        self.wanted = Wanted(pairing.wants_prefix, pairing.wants_session)

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
        tokens = self.token_guess.tokens(prepared.model, *prepared.prompt)
        kv_bytes = tokens * self._config.kv_bytes_per_token
        wish = self._wish(prepared, tokens)
        traits = self._traits(session, prepared, tokens, kv_bytes)

        def one_by_one(found: Pair | Alone) -> Legs:
            if isinstance(found, Alone):
                raise TypeError("an instance that cannot work alone was chosen to do so")
            return Legs(
                self._upstream(), self._registry, self._config, found, route, headers, prepared,
                tokens=tokens, kv_bytes=kv_bytes, trace=record.trace,
            )  # fmt: skip

        def together(found: Pair | Alone) -> TogetherLegs:
            return TogetherLegs(
                self._upstream(), self._registry, self._config, self._release, found, handover(found), route, headers,
                prepared, record.client_id or secrets.token_hex(16), tokens=tokens,
                trace=record.trace,
            )  # fmt: skip

        def legs(found: Pair | Alone) -> Legs | TogetherLegs:
            return together(found) if found.decode.kind.computes else one_by_one(found)

        def admit(without: Collection[Instance] = ()) -> Admitted:
            return self._gate.admit(prepared.model, wish, kv_bytes, legs, without, traits)

        def fly(first: Held) -> Carrier:
            record.admit()
            return self._flight(first, prepared, record, wish, admit)

        async def fly_later(waiting: Coroutine[Any, Any, Held]) -> Carrier:
            record.waited = True
            return fly(await waiting)

        first = admit()
        return fly_later(first) if isinstance(first, Coroutine) else fly(first)

    def _flight(
        self,
        first: Held,
        prepared: Prepared,
        record: Record,
        wish: Wish,
        admit: Callable[[Collection[Instance]], Admitted],
    ) -> Carrier:
        def learn(body: bytes) -> None:
            self._learn(prepared, body)

        own_key = bool(self._config.engine_api_key)
        if isinstance(first, TogetherLegs):
            return TogetherFlight(
                self._attempts(first, prepared.model, wish, admit), self._background, self._stats, record,
                own_key=own_key, prefilled=learn,
            )  # fmt: skip
        assert isinstance(first, Legs)
        return Flight(
            self._attempts(first, prepared.model, wish, admit), self._background, self._drainer, self._stats, record,
            prefill_deadlines=self._prefill_deadlines, loads=self._loads, own_key=own_key, prefilled=learn,
        )  # fmt: skip

    def _traits(self, session: bytes, prepared: Prepared, tokens: int, kv_bytes: int) -> Traits:
        shared = prepared.affinity
        name = shared.user
        if self.wanted.session and session:
            name = session_name(session.decode("latin-1"))
        return Traits(tokens, kv_bytes, shared.prefix, shared.size, shared.home, name)

    def _attempts(
        self,
        first: L,
        model: str | None,
        wish: Wish,
        admit: Callable[[Collection[Instance]], Admitted],
    ) -> Attempts[L]:
        """Further tries, on instances of the same protocol."""

        async def again(without: Collection[Instance]) -> L:
            found = admit(self._and_strangers(first, without))
            return cast(L, await found if isinstance(found, Coroutine) else found)

        def check(without: Collection[Instance]) -> None:
            self._pairing.check(model, wish, self._and_strangers(first, without))

        return Attempts(first, check, again, self._config.max_tries)

    def _and_strangers(self, legs: Legs | TogetherLegs, without: Collection[Instance]) -> set[Instance]:
        """``without``, and all instances that need another flight than the legs'."""
        together = isinstance(legs, TogetherLegs)
        return {*without, *(i for i in self._registry.instances() if i.kind.computes is not together)}

    def _wish(self, prepared: Prepared, tokens: int) -> Wish:
        if prepared.refusal is not None:
            # Where only such a decode is down, the same request may succeed later.
            if not any(i.kind.computes and i.role is Role.DECODE for i in self._registry.instances()):
                raise prepared.refusal
            return Wish.ALONE
        if tokens < self._config.decode_alone_below:
            return Wish.RATHER_ALONE
        return Wish.EITHER if self._config.decode_alone else Wish.PAIR

    def _learn(self, prepared: Prepared, prefill_body: bytes) -> None:
        """Follow how many bytes of text a token takes, where that is asked for."""
        token_ids, text_bytes = prepared.prompt
        wanted = self._config.kv_bytes_per_token or self._config.decode_alone_below
        if wanted and not token_ids and prepared.choices == 1:
            self.token_guess.learn(prepared.model, text_bytes, prompt_tokens(prefill_body))
