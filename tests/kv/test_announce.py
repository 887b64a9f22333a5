"""The announcement: what the proxy's listener reads, from a real socket. Needs msgspec, which vLLM brings along."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import zmq

msgspec = pytest.importorskip("msgspec")

from disagg_kv import __version__  # noqa: E402
from disagg_kv.engine.announce import Announcer, announcement  # noqa: E402
from disagg_kv.protocol.handshake import Identity  # noqa: E402
from disagg_kv.settings import Settings  # noqa: E402
from tests.kv.memory import SHAPE  # noqa: E402
from tests.ports import hold_port  # noqa: E402


@pytest.mark.parametrize(("role", "kind"), [("prefill", "P"), ("decode", "D")])
def test_what_is_announced(role: str, kind: str) -> None:
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    try:
        port = router.bind_to_random_port("tcp://127.0.0.1")
        settings = Settings(proxy_ip="127.0.0.1", proxy_port=port, http_port=8000)
        announcer = Announcer(settings, Identity(role, "boot", 0, SHAPE), "127.0.0.1", 21001, ["nccl", "tcp"])
        announcer.start()
        assert router.poll(10000)
        identity, message = router.recv_multipart()
        announcer.close()
        assert identity == b"127.0.0.1:21001"
        assert msgspec.msgpack.decode(message) == {
            "type": kind, "http_address": "127.0.0.1:8000", "zmq_address": "127.0.0.1:21001", "protocol": "disagg_kv",
            "protocol_version": 1, "connector_version": __version__, "boot_id": "boot", "tp": 1, "layout": "(B*1,4)",
            "dtype": "float32", "block_size": 4, "block_bytes": 24, "kv_model": "m", "transports": ["nccl", "tcp"],
            "kv_secret": "none",
        }  # fmt: skip
    finally:
        router.close(0)
        context.term()


def test_the_digest_is_announced_where_there_is_one() -> None:
    def sent(**changes: str) -> dict[str, Any]:
        return announcement(Identity("decode", "b", 0, replace(SHAPE, **changes)), "h:1", "k:1", ["tcp"])

    assert sent(digest="a" * 32)["kv_digest"] == "a" * 32
    assert "kv_digest" not in sent(digest="")


def test_engines_with_the_same_secret_announce_the_same_digest_of_it() -> None:
    found = [announcement(Identity(role, role, 0, SHAPE), "h:1", "k:1", ["tcp"], secret)["kv_secret"]
             for role, secret in (("prefill", "s"), ("decode", "s"), ("decode", "other"), ("decode", ""))]  # fmt: skip
    assert found[0] == found[1] and len(set(found)) == 3 and found[3] == "none"
    assert len(found[0]) == 8


def test_transports_that_run_are_announced_within_bounds() -> None:
    """A proxy reads at most 4096 bytes."""
    links = {f"[2001:db8::{number:x}]:21001": "tcp; nccl failed: " + "x" * 200 for number in range(64)}
    identity = Identity("decode", "b" * 32, 0, replace(SHAPE, digest="a" * 32))
    found = announcement(identity, "127.0.0.1:65535", "127.0.0.1:65535", ["nccl", "tcp"], "s", links)
    assert len(found["kv_links"]) == 16 and len(msgspec.msgpack.encode(found)) < 3000
    assert "kv_links" not in announcement(identity, "h:1", "k:1", ["tcp"], links={})


def test_the_message_stays_small() -> None:
    """Whatever the number of layers of different forms; proxies of older releases compare these fields as texts."""
    layouts = ["|".join(f"(B*1,{heads},32,128):0123" for heads in range(count)) for count in (100, 101)]
    address, transports = "127.0.0.1:65535", ["nccl", "tcp"]
    shapes = [replace(SHAPE, layout=layout, digest="a" * 32) for layout in layouts]
    found = [announcement(Identity("decode", "b" * 32, 0, shape), address, address, transports, "s")
             for shape in shapes]  # fmt: skip
    assert len({one["layout"] for one in found}) == 2
    assert all(len(msgspec.msgpack.encode(one)) < 512 for one in found)


def test_a_proxy_that_is_away_delays_no_other() -> None:
    """Both get the first announcement; the port of one is bound later."""
    context = zmq.Context()
    first, second = context.socket(zmq.ROUTER), context.socket(zmq.ROUTER)
    hold = ExitStack()
    try:
        port = first.bind_to_random_port("tcp://127.0.0.1")
        away = hold_port(hold)
        settings = Settings(proxies=(f"127.0.0.1:{away}", f"127.0.0.1:{port}"), http_port=8000)
        announcer = Announcer(settings, Identity("decode", "boot", 0, SHAPE), "127.0.0.1", 21001, ["tcp"])
        announcer.start()
        assert first.poll(30000)
        second.bind(f"tcp://127.0.0.1:{away}")
        assert second.poll(30000)
        assert first.recv_multipart()[1] == second.recv_multipart()[1]
        announcer.close()
    finally:
        context.destroy(linger=0)
        hold.close()


def test_a_renewed_identity_is_announced() -> None:
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    try:
        port = router.bind_to_random_port("tcp://127.0.0.1")
        settings = Settings(proxy_ip="127.0.0.1", proxy_port=port, http_port=8000)
        announcer = Announcer(settings, Identity("decode", "old", 0, SHAPE), "127.0.0.1", 21001, ["tcp"])
        announcer.start()
        announcer.renew(Identity("decode", "new", 0, SHAPE))
        boot = ""
        while boot != "new":
            assert router.poll(10000)
            boot = msgspec.msgpack.decode(router.recv_multipart()[1])["boot_id"]
        announcer.close()
    finally:
        router.close(0)
        context.term()
