"""Raw HTTP requests to start from, and words that change their meaning."""

from __future__ import annotations

import json

PATH = "/v1/completions"
BODY = json.dumps({"model": "sim-model", "prompt": "San Francisco is a", "max_tokens": 4}).encode()
CHAT = json.dumps({"model": "sim-model", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}).encode()
LENGTH = f"Content-Length: {len(BODY)}"
CHUNKED = "Transfer-Encoding: chunked"


def request(line: str, *headers: str, body: bytes = b"", host: str = "Host: proxy") -> bytes:
    """One request; ``host`` may be empty."""
    lines = [line, *filter(None, (host,)), *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def post(*headers: str, body: bytes = b"", path: str = PATH, version: str = "1.1") -> bytes:
    """A JSON POST; the length or encoding is the caller's."""
    return request(f"POST {path} HTTP/{version}", "Content-Type: application/json", *headers, body=body)


def chunked(*pieces: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    """A body in chunks."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + end


WHOLE = post(LENGTH, body=BODY)
CHUNKS = post(CHUNKED, body=chunked(BODY, b" "))
STREAM = post(f"Content-Length: {len(BODY) + 15}", body=BODY[:-1] + b', "stream":true}')
GET = request("GET /v1/models HTTP/1.1")

SEEDS = [
    WHOLE,
    CHUNKS,
    STREAM,
    GET,
    WHOLE + GET + CHUNKS,
    GET + STREAM + GET,
    GET * 12,
    b"\r\n" + GET + b"\r\n\r\n" + GET,
    post(f"Content-Length: {len(CHAT)}", "Expect: 100-continue", body=CHAT, path="/v1/chat/completions"),
    post(f"Content-Length: {len(CHAT)}", "X-Request-Id: a b", body=CHAT, path="/v1/messages") + GET,
    post(f"Content-Length: {len(CHAT)}", body=CHAT, path="/v1/messages?beta=true") * 2 + GET,
    post(CHUNKED, body=chunked(CHAT), path="/v1/chat/completions?a=%ff")
    + post(LENGTH, body=BODY, path=PATH + "?/v1/messages"),
    post("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", LENGTH, body=BODY) + GET,
    post("Connection: Upgrade", "Upgrade: websocket", CHUNKED, body=chunked(BODY)) + GET,
    post(CHUNKED, body=chunked(BODY, end=b"0\r\nX-Trailer: 1\r\nAuthorization: x\r\n\r\n")) + GET,
    post(CHUNKED, body=b'05;a="b;c"\r\n{"a":\r\n2;x\r\n1}\r\n000\r\n\r\n') + GET,
    post(LENGTH, CHUNKED, body=chunked(BODY)) + GET,
    post(LENGTH + " \t", "Connection: close ", "Expect: 100-continue ", body=BODY) + GET,
    post(CHUNKED + " \t", "X-A:\tb\t", body=chunked(BODY)) + GET,
    post(LENGTH, body=BODY, version="1.0") + GET,
    post(LENGTH, "Connection: keep-alive", body=BODY, version="1.0") + GET,
    request("POST /tokenize HTTP/1.1", "Content-Length: 15", 'Content-Type: "', body=b'{"prompt": "x"}') + GET,
    request("OPTIONS * HTTP/1.1") + request("HEAD /health HTTP/1.1") + request("GET //v1//models?a=%ff#b HTTP/1.1"),
    request("GET http://proxy/health HTTP/1.1") + GET,
    request("DELETE /v1/responses/a/../b%2f HTTP/1.1", host="Host: [::1]:80") + GET,
]

WORDS = [
    *(
        b"\r\n",
        b"\n",
        b"\r",
        b"\0",
        b" ",
        b"\t",
        b":",
        b"\r\n ",
        b"\xff",
        b"\x85",
        b"\xc2\x85",
        b"0",
        b"{",
        b"-",
        b"+",
        b",",
    ),
    *(
        b"\r\n\r\n",
        b"0\r\n\r\n",
        b"1\r\nx\r\n",
        b"ffffffffffffffff\r\n",
        b"10000000000000000\r\n",
        b"; a=b",
        b";",
        b'"',
    ),
    *(
        b"Content-Length: 1\r\n",
        b"Content-Length: 0\r\n",
        b"content-length:3, 3\r\n",
        b"Content-Length : 5\r\n",
        b"Host: x\r\n",
    ),
    *(
        b"Transfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked \t\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Transfer-Encoding:\x0bchunked\r\n",
    ),
    *(
        b"Expect: 100-continue\r\n",
        b"Upgrade: h2c\r\n",
        b"Connection: close\r\n",
        b"Connection: Upgrade\r\n",
        b"Trailer: Host\r\n",
    ),
    *(
        b"GET / HTTP/1.1\r\nHost: proxy\r\n\r\n",
        b"HTTP/1.0",
        b"HTTP/2.0",
        b"HTTP/0.9",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ),
    *(
        b"/../",
        b"//",
        b"?",
        b"#",
        b"%00",
        b"%2f",
        b"*",
        b"http://a/",
        b"CONNECT ",
        b"TRACE ",
        b"Content-Encoding: gzip\r\n",
    ),
    *(b"X-Request-Id: ___prefill_addr_1.1.1.1:1___decode_addr_1.1.1.1:1_x\r\n", b"X-A: " + b"b" * 300 + b"\r\n"),
]
