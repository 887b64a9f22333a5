"""``discovery/announcement.py`` and the allow list on arbitrary frames.

Holds: nothing but :class:`BadAnnouncement` of a known kind is raised; what is accepted can stand in a URL, and in
a request id so that vLLM's patterns find exactly these addresses in it.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import msgpack

from disagg_proxy.connectors.disagg_kv import KIND, REQUIRED
from disagg_proxy.discovery.allow import AllowList
from disagg_proxy.discovery.announcement import MAX_BYTES, BadAnnouncement, decode
from disagg_proxy.request_id import new_request_id
from fuzz.source import Source

_KINDS = ("oversized", "malformed", "mistyped")
_ALLOW = AllowList(("local", "10.0.0.0/8", "fd00::/8", "engine-host"))

# vLLM 0.9.2 - 0.23, kv_connector/v1/p2p/p2p_nccl_connector.py, parse_request_id
_DECODE = re.compile(r"___decode_addr_(.*):(\d+)")
_PREFILL = re.compile(r"___prefill_addr_(.*):(\d+)___")


def ping(**fields: object) -> bytes:
    """A real ping with some fields changed."""
    good = {"type": "P", "http_address": "127.0.0.1:8100", "zmq_address": "127.0.0.1:21001"}
    return bytes(msgpack.packb({**good, **fields}))


def connector_ping(**fields: object) -> bytes:
    """A ping of the project's own connector with some fields changed."""
    traits = dict.fromkeys(REQUIRED, 1)
    return ping(**{"protocol": KIND.protocol, **traits, "transports": ["tcp"], "boot_id": "ab", **fields})


ADDRESSES = [
    *("127.0.0.1:1", "localhost:65535", "::1:80", "[::1]:80", "[fe80::1%eth0]:1", "a_b-c.d:9", "10.1.2.3:007", "a:1:2"),
    *("[:1", "::", ":80", "1:", "a b:1", "a/b:1", "a@b:1", "a___decode_addr_b:1", "a_:1", "\u0661:\u0661", "[[::1]]:1"),
    *("1.1.1.1:0", "1.1.1.1:65536", "%:1", "::%a%b:1", "a" * 300 + ":1", "127.1:1", "0x7f.1:1", "::ffff:127.0.0.1:1"),
]

SEEDS = [
    *(b"\0" + ping(http_address=text) for text in ADDRESSES),
    *(b"\0" + ping(zmq_address=text) for text in ADDRESSES),
    b"\0" + ping(extra="x" * 5000),
    b"\0" + connector_ping(),
    *(
        b"\0" + connector_ping(**{name: odd})
        for name in (*REQUIRED[:2], "transports", "boot_id")
        for odd in ("x", [], None)
    ),
    *(b"\0" + connector_ping(protocol=odd) for odd in ("x" * 99, [1], {}, 2**64 - 1, b"x", "\ud7ff")),
    *(b"\0" + ping(type=kind) for kind in ("D", "X", 1, None, ["P"], b"P", {})),
    *(
        b"\2\4" + ping(),
        b"\3\0\4" + ping(),
        b"\0\x91" * 40,
        b"\0\xc1",
        b"\0" + bytes(msgpack.packb(msgpack.Timestamp(1, 1))),
    ),
]

WORDS = [
    *(b"\xa4type", b"\xa1P", b"\xa1D", b"\xachttp_address", b"\xabzmq_address", b"\xc1", b"\xdf\xff\xff\xff\xff"),
    *(
        b"\xdb\xff\xff\xff\xff",
        b"\xc7\x0c\xff",
        b"\xd6\xff",
        b"___",
        b"%",
        b"[",
        b"]",
        b":",
        b"::",
        b"\xd9\x20",
        b"\x83",
    ),
]


def check(data: bytes) -> str:
    """One execution: mostly one frame, sometimes several or an oversized one."""
    source = Source(data)
    count = source.pick((1, 1, 1, 2, 3, 0))
    frames = [source.take(source.number(64)) for _ in range(max(0, count - 1))]
    if count:
        frames.append(source.rest())
    return check_frames(frames)


def check_frames(frames: list[bytes]) -> str:
    """The promises for one message."""
    try:
        found = decode(frames)
    except BadAnnouncement as error:
        assert error.kind in _KINDS, error.kind
        assert (error.kind == "oversized") == (sum(map(len, frames)) > MAX_BYTES)
        str(error).encode("utf-8", "backslashreplace")
        return error.kind
    for address in (found.http, found.kv):
        assert 0 < address.port < 65536 and address.host
        assert _ALLOW.permits(address.host) in (True, False)
    url = urlsplit(f"http://{found.http.netloc}/v1/models")
    assert url.port == found.http.port and url.path == "/v1/models" and not url.username, url
    name = new_request_id(found.kv, found.kv).internal
    assert name.isascii() and name.isprintable() and " " not in name
    on_p, on_d = _DECODE.search(name), _PREFILL.search(name)
    assert on_p is not None and f"{on_p[1]}:{on_p[2]}" == found.kv.text, name
    assert on_d is not None and f"{on_d[1]}:{on_d[2]}" == found.kv.text, name
    return "accepted"
