"""What an engine asks of its KV connector, one object per engine (compare vLLM's ``KVConnectorBase_V1``).

The step loop calls it between steps, as vLLM's scheduler does its half of a connector (:meth:`KvConnector.begin`,
:meth:`KvConnector.finished`), and inside a step, as the worker does the other half (:meth:`KvConnector.load`,
:meth:`KvConnector.save`). Whether KV is waited for inside a step or outside decides how an engine fails.
"""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from disagg_sim.request import EngineRequest, ReceivedKv

Loaded = Callable[[EngineRequest, ReceivedKv | None, bool], None]
"""Called once for a request whose load has ended: the request, its KV (None: compute the prompt), and whether this
request loaded it; False when it shares what another request loaded."""


class KvConnector(ABC):
    """KV transfer of one engine.

    Attributes:
        loaded: set by the step loop; ends a load that :meth:`begin` started.
        stalled_on: id of the request whose KV the current step waits for (decode) or sends (prefill), else None.
        unique_ids: whether two requests with the same id end the engine.
    """

    loaded: Loaded
    stalled_on: str | None = None
    unique_ids = False

    @abstractmethod
    async def start(self, sock: socket.socket) -> None:
        """Listen on the bound KV port."""

    @abstractmethod
    async def stop(self) -> None:
        """End all transfers at once. Safe to call twice."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """The connector's part of :meth:`disagg_sim.engine.SimEngine.state`."""

    def announcement(self) -> dict[str, Any] | None:
        """Fields of the engine's pings besides role and addresses; None when such an engine does not ping."""
        return {}

    def announced(self, fields: Mapping[str, Any]) -> None:  # noqa: B027
        """Take the fields of the pings, before the first one is sent."""

    def outcomes(self) -> Mapping[str, Any] | None:
        """Totals for /metrics, as ``disagg_kv/outcomes.py`` names them; None for a connector without such metrics."""
        return None

    @property
    def held_blocks(self) -> int:
        """Blocks of finished requests that stay in the KV cache until decode has fetched them."""
        return 0

    # Between steps.

    def check_batch(self, running: Sequence[EngineRequest]) -> None:  # noqa: B027
        """Check the requests that are in the batch before new ones join it.

        Raises:
            WorkerError: the engine ends.
        """

    def begin(self, request: EngineRequest) -> bool:
        """Called when a request is first scheduled: whether it waits for KV outside the batch, until ``loaded``.

        Raises:
            WorkerError: the engine ends.
        """
        return False

    @abstractmethod
    def finished(self, request: EngineRequest, *, aborted: bool) -> None:
        """Called when a request has ended, with its last token or by an abort."""

    # Inside a step.

    async def load(self, fresh: Sequence[EngineRequest]) -> None:  # noqa: B027
        """Load, before the forward pass, KV of the requests that are new in the batch.

        Raises:
            WorkerError: the engine ends.
        """

    @abstractmethod
    async def save(self, computed: Sequence[EngineRequest]) -> None:
        """Send, after the forward pass, KV of the requests whose prompt this step has computed, or a chunk of it.

        Raises:
            WorkerError: the engine ends.
        """
