"""A registry on a clock that the test moves."""

from dataclasses import dataclass, field

import pytest

from disagg_proxy.address import parse_address
from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.kv_kind import KvKind
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.connectors.p2p_nccl import KIND as P2P


@dataclass
class World:
    """A registry, its clock, and what its observers got."""

    time: float = 100.0
    changed: list[Instance] = field(default_factory=list)
    probes: list[Instance] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.registry = Registry(lambda: self.time, expiry=10.0)
        self.registry.watch(changed=self.changed.append, probe_wanted=self.probes.append)

    def ping(self, role: Role, port: int, kv_port: int | None = None, kind: KvKind = P2P, boot: str = "") -> str | None:
        kv = parse_address(f"127.0.0.1:{kv_port or port + 1000}")
        return self.registry.announce(role, parse_address(f"127.0.0.1:{port}"), kv, kind, boot)

    def instance(self, port: int) -> Instance:
        return next(i for i in self.registry.instances() if i.http.port == port)

    def ready(self, role: Role, port: int, *models: str, kind: KvKind = P2P, boot: str = "") -> Instance:
        assert self.ping(role, port, kind=kind, boot=boot) is None
        instance = self.instance(port)
        self.registry.admit(instance, {name: {"id": name} for name in models or ("m",)})
        return instance


@pytest.fixture
def world() -> World:
    return World()
