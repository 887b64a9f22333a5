"""The contract of a KV connector: how its engines announce themselves, and ``run()``, which serves one attempt."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from disagg_proxy.address import Address, parse_address
from disagg_proxy.admission.queue import Demand
from disagg_proxy.admission.token_estimate import PromptSizes
from disagg_proxy.cluster.instance import Instance
from disagg_proxy.cluster.kv_kind import KvKind
from disagg_proxy.cluster.lease import Placement
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.config import Config
from disagg_proxy.connectors.kv_release import KvReleaser
from disagg_proxy.downstream.reply import Reply
from disagg_proxy.errors import EngineDeadline, EngineError
from disagg_proxy.openai.fields import Route
from disagg_proxy.openai.prepare import Prepared
from disagg_proxy.runtime.background import Background
from disagg_proxy.telemetry.request_record import RequestRecord
from disagg_proxy.upstream import Upstream
from disagg_proxy.upstream.kv_control import KvControl

CLIENT_GIVEN_UP = "The request was given up."


@dataclass(slots=True, eq=False)
class Request:
    """One generation request, read and checked.

    Attributes:
        headers: the client's header lines for the instances, without X-Request-Id.
        tokens: estimated length of all its prompts together.
        demand: what it needs of the instances.
        others: whether another attempt can be made; set before the first one.
    """

    route: Route
    headers: bytes
    prepared: Prepared
    record: RequestRecord
    tokens: int
    demand: Demand
    others: OtherInstances | None = None


class OtherInstances(Protocol):
    """Knows whether another attempt can be made."""

    def possible(self, failed: Instance) -> bool:
        """Whether an attempt is left, and instances other than ``failed`` could serve the request."""


class Failure(NamedTuple):
    """An attempt that failed before decode can have received the request, so that another one may serve it.

    Attributes:
        error: the client's answer when there is no further attempt.
        instance: the one that failed, excluded from further attempts.
        suspect: an instance that may be the cause, excluded too where there is another.
        prefill: ``instance`` failed as prefill.
    """

    error: EngineError | EngineDeadline
    instance: Instance
    suspect: Instance | None = None
    prefill: bool = False


class Connector(Protocol):
    """Serves requests on engines with one KV transfer protocol."""

    def run(self, request: Request, placement: Placement, reply: Reply) -> Coroutine[Any, Any, Failure | None]:
        """Serve ``request`` on ``placement`` and deliver the outcome to ``reply``. All leases are given back.

        Returns:
            None when an answer was delivered or the client has left; otherwise why another attempt may be made.

        Raises:
            ProxyError: the request cannot be served, and another attempt must not be made.
        """


@dataclass(slots=True, eq=False)
class Engines:
    """What a connector works with.

    Attributes:
        upstream: returns the client pool, which exists while the proxy runs.
        config: replaced by a reload, so it is read where it is used.
        sizes: learns from prefill's counts of prompt tokens.
        kv_releaser: releases KV that no decode fetches (P2pNcclConnector).
        kv_control: sends control messages to KV ports (this project's connector).
    """

    upstream: Callable[[], Upstream]
    registry: Registry
    config: Config
    background: Background
    sizes: PromptSizes
    kv_releaser: KvReleaser
    kv_control: KvControl


Fields = Mapping[object, object]
"""An announcement as a map (msgpack)."""


class Announced(NamedTuple):
    """What an announcement says of an engine's KV.

    Attributes:
        kv: its KV address. The text is what the other side's engine needs.
        boot: differs for every process of an engine; empty where the protocol does not announce it.
        links: on decode, transport of each open connection to a prefill, by its KV address, where it is announced.
        provable: a handshake at the KV address can prove that the engine sends this announcement.
    """

    kind: KvKind
    kv: Address
    boot: str = ""
    links: tuple[tuple[str, str], ...] = ()
    provable: bool = False


def never_announced(fields: Fields) -> Announced | None:
    """:attr:`KvProtocol.read` of a protocol whose engines are only named in the configuration."""
    return None


class KvProtocol(NamedTuple):
    """One KV transfer protocol, as ``connectors/table.py`` lists it.

    Attributes:
        kind: of an engine that has announced nothing: what holds for every engine of the protocol.
        connector: makes the connector that serves requests.
        read: reads an announcement; None when it is of another protocol. Role and HTTP address are read before.
            Raises ValueError, naming the field, where it is of this protocol but wrong.
    """

    kind: KvKind
    connector: Callable[[Engines], Connector]
    read: Callable[[Fields], Announced | None] = never_announced


def text_field(fields: Fields, name: str, default: str | None = None) -> str:
    """A text of an announcement.

    Raises:
        ValueError: it is missing without a ``default``, or is no text.
    """
    text = fields.get(name, default)
    if not isinstance(text, str):
        raise ValueError(f"{name} is not text")
    return text


def address_field(fields: Fields, name: str) -> Address:
    """A "host:port" of an announcement.

    Raises:
        ValueError: it is missing, or is no address.
    """
    text = text_field(fields, name)
    try:
        return parse_address(text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
