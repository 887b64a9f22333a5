"""The life of one request: prepare, admit, attempt on its instances, retry, answer.

    prepare    read and check the body; make the bodies of both legs            protocol/prepare.py
    admit      wait for room within the limits, choose the instances            admission/gate.py, cluster/pairing.py
    attempt    the legs, in the order that the KV connector needs               connectors/
    retry      another attempt elsewhere, while decode cannot have received it  coordinator/retry.py
    answer     one answer or one error, to a client that may leave              response/reply.py

The whole of it is one coroutine, which runs without a task. It calls back twice: the connector calls the ``Reply``,
which writes to the client's connection, and the stall detector fails the pending answers of an instance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_proxy.admission.gate import Demand, Gate
from disagg_proxy.cluster.instance import Role
from disagg_proxy.cluster.kv_kind import DISAGG_KV, NIXL, P2P_NCCL
from disagg_proxy.cluster.pairing import Pairing, Wish
from disagg_proxy.cluster.policies import Traits
from disagg_proxy.config import Config
from disagg_proxy.connectors.base import CLIENT_GIVEN_UP, Connector, Engines, Request
from disagg_proxy.connectors.disagg_kv import DisaggKv, Release
from disagg_proxy.connectors.kv_release import KvReleaser
from disagg_proxy.connectors.nixl import Nixl
from disagg_proxy.connectors.p2p_nccl import P2pNccl
from disagg_proxy.coordinator.head import Head
from disagg_proxy.coordinator.retry import Retry
from disagg_proxy.errors import ProxyError, Unavailable
from disagg_proxy.observe.record import Record
from disagg_proxy.observe.recorder import Recorder
from disagg_proxy.protocol.headers import request_lines
from disagg_proxy.protocol.prefix import Wanted, session_name
from disagg_proxy.protocol.prepare import Prepared, prepare
from disagg_proxy.response.reply import Reply
from disagg_proxy.stats import Stats

if TYPE_CHECKING:
    from disagg_proxy.observe.traces import Traces


class Coordinator:
    """Serves generation requests.

    Args:
        engines: what the connectors send their legs with.
        releaser: releases KV that no decode fetches (P2pNcclConnector).
        release: sends RELEASE to engines of this project's connector.
    """

    def __init__(
        self,
        engines: Engines,
        pairing: Pairing,
        gate: Gate,
        recorder: Recorder,
        releaser: KvReleaser,
        release: Release,
        traces: Traces | None = None,
    ) -> None:
        self._config: Config = engines.config
        self._registry = engines.registry
        self._background = engines.background
        self._pairing = pairing
        self._gate = gate
        self._recorder = recorder
        self._traces = traces
        self._stats: Stats = recorder.stats
        self._connectors: dict[str, Connector] = {
            P2P_NCCL: P2pNccl(engines, releaser),
            DISAGG_KV: DisaggKv(engines, release),
            NIXL: Nixl(engines),
        }
        self._sizes = engines.sizes
        self._wanted = Wanted(pairing.wants_prefix, pairing.wants_session)
        self._wanted_of_one = Wanted(False, pairing.wants_session)

    @property
    def wanted(self) -> Wanted:
        """What :func:`disagg_proxy.protocol.prepare.prepare` has to find for the choice of instances."""
        return self._wanted if len(self._registry.ready(Role.PREFILL)) > 1 else self._wanted_of_one

    def start(self, head: Head, body: bytes, reply: Reply) -> None:
        """Serve one request, whose outcome goes to ``reply``, maybe within this call. Raises no ProxyError."""
        record = self._recorder.open(head.route.path, head.client_id)
        work = self._background.request(self._run(head, body, record, reply))
        reply.begin(record, work, self._background)
        work.start()

    async def _run(self, head: Head, body: bytes, record: Record, reply: Reply) -> None:
        outcome: ProxyError = Unavailable(CLIENT_GIVEN_UP, retry_after=1)
        try:
            # Prepare
            lines = head.lines
            if self._traces is not None:
                lines = request_lines(self._traces.begin(record, head.headers), self._config.engine_api_key)
            prepared = prepare(head.route, body, self.wanted)
            # This frame lives until the answer ends; a long prompt must not.
            body = b""
            request = self._request(head, lines, prepared, record)

            # Admit
            placement = self._gate.try_acquire(request.demand)
            if placement is None:
                record.waited = True
                placement = await self._gate.wait(request.demand)
            record.admit()

            # Attempt and retry
            computes = placement.decode.kind.computes
            retry = Retry(self._gate, self._pairing, self._registry, request.demand, computes, self._config.max_tries)
            request.others = retry
            while True:
                connector = self._connectors[placement.decode.kind.protocol]
                failed = await connector.run(request, placement, reply)
                if failed is None:
                    return
                placement = await retry.next(failed, reply)
                if placement is None:
                    raise failed.error
                self._stats.failovers += 1
        except ProxyError as error:
            outcome = error
        except Exception:
            outcome = ProxyError("The proxy failed; its log has the cause.")
            raise
        finally:
            # Without effect where an answer was delivered.
            reply.fail(outcome)

    def _request(self, head: Head, lines: bytes, prepared: Prepared, record: Record) -> Request:
        """What the connectors and the admission need of a request that was read and checked.

        Raises:
            ProxyError: no instance here can serve it.
        """
        record.asks(prepared.model)
        tokens, kv_bytes = self._sizes.tokens(prepared), self._sizes.kv_bytes(head.route, prepared)
        shared = prepared.affinity
        name = shared.user
        if head.session and self.wanted.session:
            name = session_name(head.session.decode("latin-1"))
        traits = Traits(tokens, self._sizes.kv_of(tokens), shared.prefix, shared.size, shared.home, name)
        demand = Demand(prepared.model, self._wish(prepared, tokens), kv_bytes, traits)
        return Request(head.route, lines, prepared, record, tokens, demand)

    def _wish(self, prepared: Prepared, tokens: int) -> Wish:
        if prepared.refusal is not None:
            # Where only such a decode is down, the same request may succeed later.
            if not any(i.kind.computes and i.role is Role.DECODE for i in self._registry.instances()):
                raise prepared.refusal
            return Wish.ALONE
        if tokens < self._config.decode_alone_below:
            return Wish.RATHER_ALONE
        return Wish.EITHER if self._config.decode_alone else Wish.PAIR
