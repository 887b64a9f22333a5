"""vLLM's MoRIIOConnector: prefill first, and the request id names the addresses of both engines."""

from __future__ import annotations

from disagg_proxy.address import Address, parse_address
from disagg_proxy.cluster.kv_kind import KvKind
from disagg_proxy.cluster.lease import Placement
from disagg_proxy.connectors.attempt import Attempt
from disagg_proxy.connectors.base import Announced, Engines, Failure, Fields, KvProtocol, Request, text_field
from disagg_proxy.connectors.nixl import for_decode, for_prefill
from disagg_proxy.downstream.reply import Reply
from disagg_proxy.errors import EngineDeadline, EngineError
from disagg_proxy.openai.usage import UsageRepair, cache_use
from disagg_proxy.request_id import RequestIdRewriter, new_request_id
from disagg_proxy.upstream import ReadUntil, Resend

KIND: KvKind = KvKind("moriio", computes=False)


def parse_kv_address(text: str) -> Address:
    """``host:IP,handshake:PORT,notify:PORT``: the address of the handshake port, with the text that ids repeat."""
    fields = dict(part.split(":", 1) for part in text.split(","))
    handshake, notify = (parse_address(f"{fields['host']}:{fields[port]}") for port in ("handshake", "notify"))
    text = f"host:{handshake.host},handshake:{handshake.port},notify:{notify.port}"
    return Address(text, handshake.host, handshake.port)


def read(fields: Fields) -> Announced | None:
    """Read a ping: that of P2pNcclConnector with another ``zmq_address``."""
    text = text_field(fields, "zmq_address", "")
    if not text.startswith("host:"):
        return None
    try:
        return Announced(KIND, parse_kv_address(text))
    except (KeyError, ValueError) as error:
        raise ValueError(f"zmq_address: {error}") from None


class Moriio:
    """Serves requests on pairs of MoRIIOConnector engines."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines

    async def run(self, request: Request, placement: Placement, reply: Reply) -> Failure | None:
        """One attempt: see :class:`disagg_proxy.connectors.base.Connector`."""
        prefill, lease, decode = placement.prefill, placement.prefill_lease, placement.decode
        assert prefill and lease and prefill.kv and decode.kv, "only pairs, since decode does not compute"
        attempt = Attempt(
            self._engines, request, placement, new_request_id(prefill.kv, decode.kv, request.record.own_id)
        )
        clock, prepared = self._engines.registry.now, request.prepared
        try:
            # 1. Prefill: one token. Its 4xx is the client's, and another pair may do better than one that failed.
            pending = lease.progress.begin(clock, tokens=request.tokens)
            body, timeout = for_prefill(prepared.prefill_body), self._engines.config.prefill_timeout
            try:
                prefilled = (await attempt.send_prefill(lease, body, timeout, pending)).read()
            except (EngineError, EngineDeadline) as error:
                lease.end(failed=True)
                return Failure(error, prefill)
            finally:
                pending.end()
            if prefilled.status != 200:
                attempt.refuse(reply, prefilled, "prefill")
                return None
            lease.end(failed=False)

            # 2. Decode: sent once. It reads the KV where prefill's answer says it is.
            attempt.watch_decode(placement.decode_lease.progress.begin(clock, tokens=request.tokens))
            body = for_decode(prepared.decode_body, prefilled.body)
            answer = await attempt.send_decode(body, until=ReadUntil.BODY_STARTED, resend=Resend.UNSENT)
            if answer.status != 200:
                attempt.refuse(reply, await answer.read_all(), "decode")
                return None

            # 3. Answer: streamed to the client, with the public id in place of the engines' addresses.
            repair = UsageRepair(request.route, cache_use(request.route, prefilled.body))
            await attempt.deliver(reply, answer, RequestIdRewriter(attempt.id), repair, attempt.id)
            return None
        finally:
            attempt.release()


PROTOCOL: KvProtocol = KvProtocol(KIND, Moriio, read)
