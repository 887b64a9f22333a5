"""The proxy's own parts without its sockets: registry, policies, selection and admission queues."""

from __future__ import annotations

import random
from collections.abc import Mapping

from bench.virtual.clock import VirtualLoop
from disagg_proxy.address import parse_address
from disagg_proxy.admission.queue import AdmissionQueue, Limits
from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.kv_kind import KvKind
from disagg_proxy.cluster.policies import DECODE_POLICIES, PREFILL_POLICIES
from disagg_proxy.cluster.policies.table import PrefixTable
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.cluster.selection import Selection
from disagg_proxy.openai.prefix_hash import ENDS
from disagg_proxy.telemetry.stats import Stats

MODEL = "m"
_FIRST_PORT = {Role.PREFILL: 20000, Role.DECODE: 30000}


class VirtualProxy:
    """Ready instances and what chooses among them.

    Args:
        counts: number of instances of each role. kind: their KV protocol.
        prefill, decode: names of the policies. bound: LOAD_BOUND.
        seeds: one for each worker; workers share the loads, and have queues and prefix tables of their own.

    Attributes:
        instances: of each role, in the order of their ports. queues: of the workers. selections: likewise.
    """

    def __init__(
        self, loop: VirtualLoop, counts: Mapping[Role, int], kind: KvKind, prefill: str, decode: str, *,
        bound: float = 2.0, limits: Limits, seeds: list[int], max_model_len: int = 0,
    ) -> None:  # fmt: skip
        self.stats = Stats(loop.time)
        self.registry = Registry(loop.time, expiry=1e9)
        self.instances: dict[Role, list[Instance]] = {role: [] for role in Role}
        for role, count in counts.items():
            for port in range(_FIRST_PORT[role], _FIRST_PORT[role] + count):
                http, kv = (parse_address(f"127.0.0.1:{number}") for number in (port, port + 1000))
                self.registry.announce(role, http, kv, kind)
        for instance in self.registry.instances():
            entry = {"max_model_len": max_model_len} if max_model_len else {}
            self.registry.admit(instance, {MODEL: entry})
            self.instances[instance.role].append(instance)
        self.selections = [
            Selection(
                self.registry, PREFILL_POLICIES[prefill], DECODE_POLICIES[decode], table=PrefixTable(ENDS), bound=bound,
                random=random.Random(seed).random,
            )
            for seed in seeds
        ]  # fmt: skip
        self.queues = [AdmissionQueue(one, self.registry, limits, self.stats) for one in self.selections]
