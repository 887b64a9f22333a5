"""The KV port of an engine with ``disagg_kv``: decode engines and the proxy connect to it.

As in ``disagg_kv/prefill/server.py``, a protocol error ends the connection that made it and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from typing import Any

from disagg_kv.protocol.frames import Kind, WireError
from disagg_kv.protocol.handshake import Identity, Refused, check, check_proof, choose_transport, nonce, proof
from disagg_kv.protocol.messages import PINGS, Release, Want
from disagg_kv.protocol.proven import ANNOUNCED, announced_field
from disagg_kv.within import within
from disagg_sim.config import SimConfig
from disagg_sim.connectors.blocks import row_bytes
from disagg_sim.connectors.disagg_kv_decode import Loads
from disagg_sim.connectors.disagg_kv_prefill import Offers
from disagg_sim.connectors.disagg_kv_wire import HANDSHAKE_SECONDS, expect, read_frame, send
from disagg_sim.faults import Faults

logger = logging.getLogger(__name__)


class KvServer:
    """Serves one connection: WANT, RELEASE and PING of a decode engine, RELEASE and MEET of the proxy.

    Args:
        loads: decode's side, which the proxy's RELEASE and MEET go to; None on a prefill engine.

    Attributes:
        announcement: the announcement that the engine sends, which WELCOME to the proxy proves; None without pings.
    """

    def __init__(
        self, config: SimConfig, identity: Identity, faults: Faults, offers: Offers, loads: Loads | None
    ) -> None:
        self._config = config
        self._faults = faults
        self._identity = identity
        self._offers = offers
        self._loads = loads
        self.announcement: Mapping[str, Any] | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Handle one connection until it ends."""
        peer = self._offers.attach(writer)
        try:
            async with within(HANDSHAKE_SECONDS):
                role, hello = await self._handshake(reader, writer)
            if role == "control":
                send(writer, Kind.READY, {})
            else:
                staging = max(min(int(hello["staging"]), 16 << 20), row_bytes(self._config))
                send(writer, Kind.READY, {"transport": "tcp", "staging": staging})
            while True:
                kind, body = await read_frame(reader)
                if kind is Kind.RELEASE:
                    release = Release.decode(body)
                    self._offers.release(None if role == "control" else peer, release)
                    if role == "control" and self._loads is not None:
                        self._loads.release(release.transfer)
                elif kind is Kind.MEET and role == "control" and self._loads is not None:
                    self._loads.meet(str(body.get("from")))
                elif kind is Kind.WANT and role == "decode":
                    self._offers.want(peer, Want.decode(body))
                elif kind is Kind.PING and role == "decode":
                    if self._faults.kv_answers:
                        send(writer, Kind.PONG, {})
                else:
                    raise WireError(f"unexpected {kind.name} on this connection")
        except Refused as refusal:
            with contextlib.suppress(OSError):
                send(writer, Kind.REFUSE, {"reason": str(refusal)[:1000]})
                await writer.drain()
                writer.close()
        except (OSError, ValueError, KeyError, TypeError, asyncio.TimeoutError) as error:
            logger.debug("Closing a KV connection: %s: %s", type(error).__name__, error)
        finally:
            self._offers.detach(peer)

    async def _handshake(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> tuple[str, dict[str, Any]]:
        hello = await expect(reader, Kind.HELLO)
        if not self._faults.kv_answers:
            await asyncio.get_running_loop().create_future()
        theirs, secret = Identity.from_wire(hello), self._config.kv_secret
        if theirs.role == "prefill":
            raise Refused("a prefill engine has nothing to ask for")
        check(self._identity, theirs)
        welcome = {**self._identity.to_wire(), "nonce": nonce(), PINGS: True}
        if theirs.role == "decode":
            welcome["transport"] = choose_transport(self._config.kv_transports, hello.get("transports"))
        elif theirs.role == "control" and self.announcement is not None:
            welcome[ANNOUNCED] = announced_field(self.announcement)
        send(writer, Kind.WELCOME, {**welcome, "proof": proof(secret, self._identity.role, hello, welcome)})
        answer = await expect(reader, Kind.PROOF)
        check_proof(proof(secret, theirs.role, hello, welcome), answer.get("proof"))
        return theirs.role, hello
