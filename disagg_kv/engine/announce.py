"""Announcements to the proxy, in the format of P2pNcclConnector's pings with additional fields.

The format is vLLM 0.21's (kv_connector/v1/p2p/p2p_nccl_engine.py). The additional fields tell the proxy which engines
can exchange KV.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import zmq

from disagg_kv import PROTOCOL_NAME, PROTOCOL_VERSION, __version__
from disagg_kv.protocol.handshake import Identity, secret_mark
from disagg_kv.protocol.keys import join_address
from disagg_kv.settings import Settings

logger = logging.getLogger("vllm.disagg_kv")
PERIOD_SECONDS = 3.0
_MAX_TEXT_LENGTH = 64
_MAX_LINKS, _MAX_LINK_LENGTH = 16, 100
"""A proxy reads at most 4096 bytes of a message."""


def announcement(
    identity: Identity,
    http_address: str,
    kv_address: str,
    transports: list[str],
    secret: str = "",
    links: Mapping[str, str] | None = None,
    both: bool = False,
    power: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Build the message: the three fields of P2pNcclConnector, then those of this connector.

    Args:
        links: transport of each open connection to a prefill engine, by its address (``TransportMemory.running``).
        both: the engine is prefill too; a proxy that does not read ``roles`` takes it for a decode.
        power: reports of this engine's GPUs (``engine/energy.py``).
    """
    shape = identity.shape
    assert shape is not None
    more: dict[str, Any] = {"kv_digest": shape.digest} if shape.digest else {}
    if both:
        more["roles"] = ["prefill", "decode"]
    if links:
        more["kv_links"] = {peer: text[:_MAX_LINK_LENGTH] for peer, text in list(links.items())[:_MAX_LINKS]}
    if power:
        more["power"] = list(power)
    return {
        "type": "P" if identity.role == "prefill" else "D",
        "http_address": http_address,
        "zmq_address": kv_address,
        "protocol": PROTOCOL_NAME,
        "protocol_version": PROTOCOL_VERSION,
        "connector_version": __version__,
        "boot_id": identity.boot,
        "tp": shape.tp,
        "layout": _short(shape.layout),
        "dtype": _short(shape.dtype),
        "block_size": shape.block_size,
        "block_bytes": shape.block_bytes,
        "kv_model": shape.model,
        "transports": transports,
        "kv_secret": secret_mark(secret),
        **more,
    }


def _short(text: str) -> str:
    """Return the text, or its digest if it is long; the proxy only compares it."""
    return text if len(text) <= _MAX_TEXT_LENGTH else f"sha256:{hashlib.sha256(text.encode()).hexdigest()[:32]}"


class Announcer:
    """Thread that sends the announcement to every proxy each 3 seconds, from ``start`` until ``close``.

    ZMQ connects in the background, and nothing waits for a proxy that does not accept messages.
    """

    def __init__(
        self,
        settings: Settings,
        identity: Identity,
        host: str,
        port: int,
        transports: list[str],
        links: Callable[[], Mapping[str, str]] = dict,
        both: bool = False,
        power: Callable[[], Sequence[Mapping[str, Any]]] = tuple,
    ) -> None:
        self._proxies = settings.announce_to
        self._kv_address = join_address(host, port)
        self._http_address, self._transports = join_address(host, settings.http_port), transports
        self._secret, self._links, self._both, self._power = settings.secret, links, both, power
        self.renew(identity)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="disagg-kv-announce", daemon=True)

    def start(self) -> None:
        """Send the first announcement now."""
        self._thread.start()

    def renew(self, identity: Identity) -> None:
        """Announce this identity from the next message on."""
        self._identity = identity

    def fields(self) -> dict[str, Any]:
        """Return the announcement as it is now."""
        return announcement(
            self._identity,
            self._http_address,
            self._kv_address,
            self._transports,
            self._secret,
            self._links(),
            self._both,
            self._power(),
        )

    def close(self) -> None:
        self._stop.set()
        self._thread.join(2)

    def _run(self) -> None:
        context = zmq.Context()
        sockets: dict[str, zmq.Socket[bytes]] = {}
        try:
            for proxy in self._proxies:
                socket = sockets[proxy] = context.socket(zmq.DEALER)
                socket.setsockopt_string(zmq.IDENTITY, self._kv_address)
                socket.setsockopt(zmq.LINGER, 0)
                socket.setsockopt(zmq.SNDHWM, 2)
                socket.setsockopt(zmq.IPV6, "[" in proxy)
                socket.connect(f"tcp://{proxy}")
            while True:
                message = msgspec.msgpack.encode(self.fields())
                for proxy, socket in sockets.items():
                    try:
                        socket.send(message, zmq.NOBLOCK)
                    except zmq.Again:
                        logger.debug("the proxy at %s does not accept announcements", proxy)
                if self._stop.wait(PERIOD_SECONDS):
                    return
        except zmq.ZMQError:
            logger.exception("stopped announcing to %s", ", ".join(self._proxies))
        finally:
            context.destroy()
