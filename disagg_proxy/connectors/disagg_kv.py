"""This project's connector (docs/connector.md): both legs at once, and decode fetches the KV from prefill.

``kv_transfer_params`` name the transfer on both legs; the request id says nothing of it.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Coroutine
from typing import Any

from disagg_proxy.cluster.instance import Instance, Role, State
from disagg_proxy.cluster.kv_kind import KvKind
from disagg_proxy.cluster.lease import Placement
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.connectors.base import (
    Announced,
    Engines,
    Failure,
    Fields,
    KvProtocol,
    Request,
    address_field,
    text_field,
)
from disagg_proxy.connectors.kv_transfer_params import with_params
from disagg_proxy.connectors.recomputing import RecomputingAttempt
from disagg_proxy.downstream.reply import Reply
from disagg_proxy.errors import EngineBusy
from disagg_proxy.openai.usage import tells_cache_use
from disagg_proxy.runtime.background import Background
from disagg_proxy.runtime.inline_coroutine import Event, InlineCoroutine
from disagg_proxy.upstream import CompleteResponse
from disagg_proxy.upstream.kv_control import KvControl

KIND: KvKind = KvKind("disagg_kv", either_alone=True)

REQUIRED = ("protocol_version", "tp", "layout", "dtype", "block_size", "block_bytes", "kv_model")
"""Fields of an announcement that must be equal on both sides. Every engine announces them."""

OPTIONAL = ("kv_digest", "kv_secret")
"""Fields that must be equal where both sides announce them. Engines of older releases do not, so that neither the
engines nor the proxies must be updated first."""

_PREFILL_WAIT = 1.0
"""Seconds for which decode's outcome waits for prefill's answer, where it depends on that."""


def read(fields: Fields) -> Announced | None:
    """Read an announcement (docs/connector.md, "Announcement")."""
    if fields.get("protocol") != KIND.protocol:
        return None
    traits: list[tuple[str, str | int]] = []
    for name in (*REQUIRED, *(name for name in OPTIONAL if name in fields)):
        value = fields.get(name)
        if not isinstance(value, (str, int)) or isinstance(value, bool):
            raise ValueError(f"{name} is neither text nor a number")
        traits.append((name, value))
    transports = fields.get("transports")
    if not isinstance(transports, list) or not all(isinstance(name, str) for name in transports):
        raise ValueError("transports is no list of texts")
    roles = fields.get("roles", [])
    if not isinstance(roles, list) or not all(isinstance(role, str) for role in roles):
        raise ValueError("roles is no list of texts")
    both = {role.value for role in Role} <= set(roles) and fields.get("type") == "D"
    kind = KvKind(KIND.protocol, tuple(traits), frozenset(transports), both_roles=both, either_alone=True)
    links = fields.get("kv_links", {})
    if not isinstance(links, dict) or not all(isinstance(text, str) for pair in links.items() for text in pair):
        raise ValueError("kv_links is no map of texts")
    return Announced(
        kind, address_field(fields, "zmq_address"), text_field(fields, "boot_id", ""), tuple(links.items()), True
    )


def new_transfer_id() -> str:
    """A transfer id; it must be hard to guess, since it opens the KV."""
    return secrets.token_hex(16)


def for_prefill(body: bytes, transfer_id: str) -> bytes:
    """Prefill's body: offer the KV under this id."""
    return with_params(body, {"transfer_id": transfer_id})


def for_decode(body: bytes, transfer_id: str, prefill_kv: str) -> bytes:
    """Decode's body: fetch the KV with this id from the KV address that prefill announced."""
    return with_params(body, {"transfer_id": transfer_id, "from": prefill_kv})


class DisaggKv:
    """Serves requests on pairs of disagg_kv engines, or on a decode alone."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines

    def run(self, request: Request, placement: Placement, reply: Reply) -> Coroutine[Any, Any, Failure | None]:
        """One attempt: see :class:`disagg_proxy.connectors.base.Connector`."""
        return DisaggKvAttempt(self._engines, request, placement).run(reply)


PROTOCOL: KvProtocol = KvProtocol(KIND, DisaggKv, read)


class DisaggKvAttempt(RecomputingAttempt):
    """The legs of one attempt, and its transfer. Each attempt has a transfer id of its own.

    Attributes:
        prefilled: prefill's leg has ended, or there is none, so that decode is expected to make progress.
    """

    def __init__(self, engines: Engines, request: Request, placement: Placement) -> None:
        super().__init__(engines, request, placement, fits=True)
        self._transfer_id = new_transfer_id()
        self._leg: InlineCoroutine | None = None
        self._leg_ended = Event()
        self.prefilled = placement.prefill is None

    async def serve(self, reply: Reply) -> None:
        """Both legs, and the answer."""
        # 1. Prefill, if there is one: offers its KV under the transfer id. Its answer is not awaited.
        self.start_prefill()

        # 2. Decode: fetches the KV from prefill, and computes what does not arrive.
        self.watch(waiting=self.prefilled)
        answer = await self.request_decode(self.decode_body())

        # 3. Answer.
        await self.answer(reply, answer)

    def decode_body(self) -> bytes:
        """Decode's body; it names prefill's KV address where there is a prefill."""
        prefill, body = self.placement.prefill, self.request.prepared.decode_body
        if prefill is None:
            return body
        if prefill.kv is None:
            raise ValueError("an instance without a KV address cannot be in a pair")
        return for_decode(body, self._transfer_id, prefill.kv.text)

    def start_prefill(self) -> None:
        """Send prefill's leg, if there is one, in a coroutine of its own."""
        if self.placement.prefill is not None:
            self._leg = self._engines.background.leg(self._prefill())
            self._leg.start()

    async def _prefill(self) -> None:
        answer = None
        try:
            answer = await self.prefill(for_prefill(self.request.prepared.prefill_body, self._transfer_id))
        except EngineBusy as busy:
            # Ends this attempt, and aborts decode's leg, unless decode has begun to answer. Prefill holds no KV: a
            # RELEASE would only make decode compute the prompt before the abort.
            if self._decoding is not None and not self._decoding.begun:
                self.placement.release_kv()
                self._decoding.fail(busy)
                return
        finally:
            self._leg = None
            self._prefill_ended()
        if answer is None:
            # Decode must not wait for KV that does not come.
            self._send_release(self.decode)

    def _prefill_ended(self) -> None:
        self.prefilled = True
        self._leg_ended.set()
        pending = self._decoding
        if pending is not None and not pending.begun:
            pending.since = self._engines.registry.now()
            pending.resume_wait()

    async def prompt_counted(self, whole: CompleteResponse) -> None:
        """Prefill's own answer may arrive a moment after decode's."""
        if tells_cache_use(self.request.route, whole.body):
            await self.prefill_settled()

    async def prefill_settled(self) -> None:
        if self._leg is not None:
            timer = asyncio.get_running_loop().call_later(_PREFILL_WAIT, self._leg_ended.set)
            try:
                await self._leg_ended
            finally:
                timer.cancel()

    def release(self) -> None:
        """End the attempt: abort prefill's leg, have prefill free KV that decode has not shown to have, and give back
        all leases."""
        leg, self._leg = self._leg, None
        if leg is not None:
            leg.cancel()
        prefill, kv = self.placement.prefill, self.placement.kv
        if prefill is not None and kv is not None and not kv.released:
            self._send_release(prefill)
        super().release()

    def _send_release(self, instance: Instance) -> None:
        """The transfer is over on ``instance``, which waits for it or holds its KV."""
        self._engines.background.spawn(self._engines.kv_control.release(instance, self._transfer_id), "RELEASE")


class ConnectionWarmer:
    """Connects every decode to every prefill as soon as both are ready, so that no request waits for a connection: a
    NCCL communicator takes about a second to create (measured on vLLM 0.21). Follows a registry from its creation on.
    """

    def __init__(self, registry: Registry, background: Background, control: KvControl) -> None:
        self._registry = registry
        self._background = background
        self._control = control
        registry.watch(changed=self._on_change)

    def _on_change(self, instance: Instance) -> None:
        if instance.state is not State.READY or instance.kind.protocol != KIND.protocol:
            return
        ready = self._registry.ready
        pairs = [(instance, decode) for decode in ready(Role.DECODE) if instance.serves(Role.PREFILL)]
        pairs += [(prefill, instance) for prefill in ready(Role.PREFILL) if instance.serves(Role.DECODE)]
        for prefill, decode in pairs:
            if prefill.kv and decode.kv and self._registry.kv_compatibility.compatible(prefill, decode):
                meeting = self._control.meet(decode, prefill)
                self._background.spawn(meeting, f"introduce {decode} to {prefill}")
