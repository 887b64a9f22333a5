"""The baseline: the least that does prefill, then decode, with Quart on uvicorn and one aiohttp session.

    python -m bench.proxy.reference --port N --zmq-port N

No limits, no error handling, no hiding: it shows what these libraries cost by themselves. Runs with the libraries of
the Python that starts it; uvloop and httptools, no access log.
"""

from __future__ import annotations

import argparse
import itertools
import json
import secrets
import threading
from collections.abc import AsyncIterator

import aiohttp
import msgpack
import uvicorn
import zmq
from quart import Quart, Response, request

app = Quart(__name__)
app.config["MAX_CONTENT_LENGTH"] = None
engines: dict[str, dict[str, str]] = {"P": {}, "D": {}}
turns = itertools.count()


def listen(port: int) -> None:
    """Receive pings until cancelled."""
    router: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    router.bind(f"tcp://127.0.0.1:{port}")
    while True:
        ping = msgpack.loads(router.recv_multipart()[-1])
        engines[ping["type"]][ping["http_address"]] = ping["zmq_address"]


@app.before_serving
async def open_session() -> None:
    """One for both legs of all requests."""
    app.extensions["session"] = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60), timeout=aiohttp.ClientTimeout(total=None)
    )


@app.after_serving
async def close_session() -> None:
    """At the end."""
    await app.extensions["session"].close()


@app.post("/v1/completions")
async def completions() -> Response:
    """Prefill for one token, then decode with the client's own bytes."""
    session: aiohttp.ClientSession = app.extensions["session"]
    asked = await request.get_data()
    short = {**json.loads(asked), "max_tokens": 1, "stream": False}
    short.pop("stream_options", None)
    turn = next(turns)
    (prefill, prefill_kv), (decode, decode_kv) = (list(engines[r].items())[turn % len(engines[r])] for r in "PD")
    name = f"___prefill_addr_{prefill_kv}___decode_addr_{decode_kv}_{secrets.token_hex(16)}"
    headers = {"X-Request-Id": name, "Content-Type": "application/json"}
    url = "http://{}/v1/completions"
    async with session.post(url.format(prefill), data=json.dumps(short), headers=headers) as answer:
        await answer.read()
        if answer.status != 200:
            return Response("prefill failed", 502)
    answer = await session.post(url.format(decode), data=asked, headers=headers)
    if "Content-Length" in answer.headers:
        return Response(await answer.read(), answer.status, content_type=answer.headers["Content-Type"])

    async def chunks() -> AsyncIterator[bytes]:
        try:
            async for chunk in answer.content.iter_any():
                yield chunk
        finally:
            answer.release()

    response = Response(chunks(), answer.status, content_type=answer.headers["Content-Type"])
    response.timeout = None
    return response


def main() -> None:
    """Serve until a signal."""
    parser = argparse.ArgumentParser(prog="python -m bench.proxy.reference")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--zmq-port", type=int, required=True)
    options = parser.parse_args()
    threading.Thread(target=listen, args=(options.zmq_port,), daemon=True).start()
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=options.port,
        loop="uvloop",
        http="httptools",
        backlog=4096,
        access_log=False,
        log_level="error",
    )


if __name__ == "__main__":
    main()
