"""This project's KV connector (docs/connector.md): either leg may come first, and decode never depends on prefill."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from disagg_kv.outcomes import Outcomes, add
from disagg_sim.config import SimConfig
from disagg_sim.connectors.disagg_kv_decode import Loads
from disagg_sim.connectors.disagg_kv_prefill import Offers
from disagg_sim.connectors.disagg_kv_server import KvServer
from disagg_sim.connectors.disagg_kv_wire import announcement, identity
from disagg_sim.connectors.kv_port import KvPort
from disagg_sim.connectors.transfer_params import TransferParamsConnector
from disagg_sim.faults import Faults
from disagg_sim.request import EngineRequest


class DisaggKv(TransferParamsConnector):
    """Prefill pushes the blocks that decode asks for. Each instance has its own ``boot_id``. With ``kv_both`` a request
    that names an address fetches its KV, and another one is offered."""

    def __init__(self, config: SimConfig, faults: Faults, kv_address: str, changed: Callable[[], None]) -> None:
        self._boot = uuid.uuid4().hex
        me = identity(config, self._boot)
        self._outcomes = Outcomes()
        self._totals: dict[str, Any] = {}
        offers = Offers(config, faults, changed, self._outcomes)
        self._loads = None if config.is_producer else Loads(config, me, self._rows_loaded, changed, self._outcomes)
        serving = replace(me, role="prefill") if config.kv_both else me
        self._server = KvServer(config, serving, faults, offers, self._loads)
        super().__init__(config, KvPort(self._server.serve), offers, self._loads)

    def announcement(self) -> dict[str, Any]:
        found = announcement(self._config, self._boot)
        links = self._loads.links() if self._loads is not None else []
        return {**found, "kv_links": dict.fromkeys(links, "tcp")} if links else found

    def announced(self, fields: Mapping[str, Any]) -> None:
        self._server.announcement = fields

    def outcomes(self) -> dict[str, Any]:
        add(self._totals, self._outcomes.take())
        return self._totals

    def begin(self, request: EngineRequest) -> bool:
        if self._config.kv_both and "from" not in (request.sampling.kv_transfer or {}):
            self._prefill.begin(request)
            return False
        return super().begin(request)

    def finished(self, request: EngineRequest, *, aborted: bool) -> None:
        super().finished(request, aborted=aborted)
        if self._config.kv_both:
            self._prefill.finished(request, aborted=aborted)

    async def save(self, computed: Sequence[EngineRequest]) -> None:
        await super().save(computed)
        if self._config.kv_both:
            for request in computed:
                self._prefill.progress(request)

    def state(self) -> dict[str, Any]:
        offered = self._prefill.state() if self._config.kv_both else {}
        held = {"kv_held": offered.pop("kv_waiting")} if offered else {}
        return {"boot_id": self._boot, **offered, **held, **super().state()}
