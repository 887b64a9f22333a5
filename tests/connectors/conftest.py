"""Attempts on two instances, with an upstream that fails as the test says."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from disagg_proxy.admission.queue import Demand
from disagg_proxy.admission.token_estimate import PromptSizes
from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.kv_kind import KvKind
from disagg_proxy.cluster.lease import Placement
from disagg_proxy.cluster.selection import Pair, PlacementPreference, SingleEngine
from disagg_proxy.config import Config
from disagg_proxy.connectors.base import Engines, Request
from disagg_proxy.connectors.kv_release import KvReleaser
from disagg_proxy.connectors.p2p_nccl import KIND as P2P
from disagg_proxy.connectors.p2p_nccl_legs import P2pAttempt
from disagg_proxy.errors import ProxyError
from disagg_proxy.openai.fields import COMPLETIONS
from disagg_proxy.openai.prepare import prepare
from disagg_proxy.runtime.background import Background
from disagg_proxy.telemetry.request_recorder import RequestRecorder
from disagg_proxy.telemetry.stats import KvReleases
from disagg_proxy.upstream import CompleteResponse
from tests.cluster.conftest import World


class Upstream:
    """Ends each request with the next of ``outcomes``: an error, or an answer with that status."""

    def __init__(self) -> None:
        self.outcomes: list[ProxyError | int] = []
        self.sent: list[SimpleNamespace] = []

    async def request(self, method: str, instance: Any, path: str, **options: Any) -> Any:
        self.sent.append(SimpleNamespace(instance=instance, path=path, **options))
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, ProxyError):
            raise outcome
        whole = CompleteResponse(outcome, [], b'{"usage": {"prompt_tokens": 7}}')

        async def read() -> CompleteResponse:
            return whole

        return SimpleNamespace(status=outcome, beginning=whole.body, read_all=read, read=lambda: whole)


class KvPorts:
    """The RELEASE messages that KV ports get: (address, transfer id)."""

    def __init__(self) -> None:
        self.released: list[tuple[str, str]] = []

    async def release(self, instance: Instance, transfer: str) -> None:
        assert instance.kv is not None
        self.released.append((instance.kv.text, transfer))


class Bench:
    """Two instances, and attempts on them."""

    def __init__(self, kind: KvKind = P2P) -> None:
        self.world, self.upstream, self.background = World(), Upstream(), Background()
        self.prefill, self.decode = (
            self.world.ready(role, port, kind=kind) for role, port in ((Role.PREFILL, 1), (Role.DECODE, 2))
        )
        self.world.probes.clear()
        sizes = PromptSizes(learns=False, trusts=False)
        self.kv_control = KvPorts()
        self.engines = Engines(
            lambda: self.upstream, self.world.registry, Config(), self.background, sizes,  # type: ignore[arg-type,return-value]
            KvReleaser(KvReleases()), self.kv_control,  # type: ignore[arg-type]
        )  # fmt: skip

    def request(self, **fields: Any) -> Request:
        body = json.dumps({"model": "m", "prompt": "x", "max_tokens": 9, **fields}).encode()
        record = RequestRecorder.standalone().open(COMPLETIONS.path, None)
        demand = Demand("m", PlacementPreference.PAIR)
        prepared = prepare(COMPLETIONS, body)
        return Request(COMPLETIONS, b"x-custom: 1\r\n", prepared, record, 3, demand)

    def placement(self, alone: bool = False) -> Placement:
        found = SingleEngine(self.decode) if alone else Pair(self.prefill, self.decode)
        return Placement(self.world.registry, found)

    def attempt(self, **fields: Any) -> P2pAttempt:
        """One more attempt over P2pNcclConnector."""
        return P2pAttempt(self.engines, self.request(**fields), self.placement())

    def counts(self) -> list[int]:
        return [self.prefill.in_flight, self.decode.in_flight, self.prefill.kv_waiting, self.decode.kv_waiting]


@pytest.fixture
def bench() -> Bench:
    return Bench()
