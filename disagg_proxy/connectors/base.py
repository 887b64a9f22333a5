"""What every KV connector of the proxy has in common: one ``run()`` for one attempt, and how an attempt may fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from disagg_proxy.admission.prompt_sizes import PromptSizes
from disagg_proxy.admission.queue import Demand
from disagg_proxy.cluster.instance import Instance
from disagg_proxy.cluster.placement import Placement
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.config import Config
from disagg_proxy.downstream.reply import Reply
from disagg_proxy.errors import EngineDeadline, EngineError
from disagg_proxy.openai.fields import Route
from disagg_proxy.openai.prepare import Prepared
from disagg_proxy.runtime.background import Background
from disagg_proxy.telemetry.request_record import RequestRecord
from disagg_proxy.upstream import Upstream

CLIENT_GIVEN_UP = "The request was given up."


@dataclass(slots=True, eq=False)
class Request:
    """One generation request that was read and checked.

    Attributes:
        headers: the client's, as lines for the instances, without X-Request-Id.
        tokens: estimated length of all its prompts together.
        demand: what it asks of the instances.
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
    """Tells whether another attempt can be made."""

    def possible(self, failed: Instance) -> bool:
        """Whether an attempt is left, and others than ``failed`` could serve the request."""


class Failure(NamedTuple):
    """An attempt that failed before decode can have received the request, so that another one may serve it.

    Attributes:
        error: the client's answer when there is no further attempt.
        instance: the one that failed, left out of further attempts.
        suspect: an instance that may be the cause, left out too where there is another.
    """

    error: EngineError | EngineDeadline
    instance: Instance
    suspect: Instance | None = None


class Connector(Protocol):
    """The legs of a request for engines with one KV transfer protocol."""

    async def run(self, request: Request, placement: Placement, reply: Reply) -> Failure | None:
        """Serve ``request`` on ``placement`` and deliver the outcome to ``reply``. Every place is given back.

        Returns:
            None when an answer was delivered or the client has left; else why another attempt may be made.

        Raises:
            ProxyError: it cannot be served, and another attempt must not be made.
        """


class Engines(NamedTuple):
    """What a connector sends its legs with.

    Attributes:
        upstream: returns the client pool, which exists while the proxy runs.
        sizes: gets prefill's counts of prompt tokens.
    """

    upstream: Callable[[], Upstream]
    registry: Registry
    config: Config
    background: Background
    sizes: PromptSizes
