"""The legs of one request, with an upstream that fails as it is told to."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from disagg_proxy.cluster.instance import Role
from disagg_proxy.cluster.pairing import Pair
from disagg_proxy.config import Config
from disagg_proxy.errors import ProxyError
from disagg_proxy.flight.legs import Legs
from disagg_proxy.protocol.fields import COMPLETIONS
from disagg_proxy.protocol.prepare import prepare
from disagg_proxy.upstream import WholeAnswer
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
        whole = WholeAnswer(outcome, [], b'{"usage": {"prompt_tokens": 7}}')

        async def read() -> WholeAnswer:
            return whole

        return SimpleNamespace(status=outcome, whole=read, read=lambda: whole)

    @property
    def fresh(self) -> list[bool]:
        return [sent.fresh for sent in self.sent]


class Bench:
    """The legs of one request, and everything around them."""

    def __init__(self) -> None:
        self.world, self.upstream = World(), Upstream()
        self.prefill, self.decode = (
            self.world.ready(role, port) for role, port in ((Role.PREFILL, 1), (Role.DECODE, 2))
        )
        self.world.probes.clear()
        self.legs = self.legs_of()

    def legs_of(self, **fields: Any) -> Legs:
        """Legs of one more request."""
        body = json.dumps({"model": "m", "prompt": "x", "max_tokens": 9, **fields}).encode()
        pair, headers = Pair(self.prefill, self.decode), b"x-custom: 1\r\n"
        return Legs(
            self.upstream, self.world.registry, Config(), pair, COMPLETIONS, headers, prepare(COMPLETIONS, body)
        )


@pytest.fixture
def bench() -> Bench:
    return Bench()
