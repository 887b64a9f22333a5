"""The announcement: what the proxy's listener reads, from a real socket. Needs msgspec, which vLLM brings along."""

from __future__ import annotations

import pytest
import zmq

msgspec = pytest.importorskip("msgspec")

from disagg_kv.engine.announce import Announcer  # noqa: E402
from disagg_kv.protocol.handshake import Identity  # noqa: E402
from disagg_kv.settings import Settings  # noqa: E402
from tests.kv.memory import SHAPE  # noqa: E402


@pytest.mark.parametrize(("role", "kind"), [("prefill", "P"), ("decode", "D")])
def test_what_is_announced(role: str, kind: str) -> None:
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    try:
        port = router.bind_to_random_port("tcp://127.0.0.1")
        settings = Settings(proxy_ip="127.0.0.1", proxy_port=port, http_port=8000)
        announcer = Announcer(settings, Identity(role, "boot", 0, SHAPE), "127.0.0.1", 21001, ["nccl", "tcp"])
        assert router.poll(10000)
        identity, message = router.recv_multipart()
        announcer.close()
        assert identity == b"127.0.0.1:21001"
        assert msgspec.msgpack.decode(message) == {
            "type": kind, "http_address": "127.0.0.1:8000", "zmq_address": "127.0.0.1:21001", "protocol": "disagg_kv",
            "protocol_version": 1, "connector_version": "0.1.0", "boot_id": "boot", "tp": 1, "layout": "(B*1,4)",
            "dtype": "float32", "block_size": 4, "block_bytes": 24, "kv_model": "m", "transports": ["nccl", "tcp"],
        }  # fmt: skip
    finally:
        router.close(0)
        context.term()
