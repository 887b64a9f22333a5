"""A stand-in for the proxy, started by the script in its place: /stats shows what a test wrote down.

Environment: TOLD, a folder. ``instances.json`` in it is the list that /stats shows; each question for /stats adds a
line to ``asked``. API_KEY, when set, is asked for. No request is served, and pings go nowhere.
"""

from __future__ import annotations

import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MANY = {"ready": 9, "known": 9}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        folder = Path(os.environ["TOLD"])
        status, body = 200, {"status": "ok", "pairs": 9, "prefill": MANY, "decode": MANY, "missing": []}
        if self.path == "/stats":
            key = os.environ.get("API_KEY")
            if key and self.headers["Authorization"] != f"Bearer {key}":
                status, body = 401, {}
            else:
                body = {"instances": json.loads((folder / "instances.json").read_text())}
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        if self.path == "/stats":
            with open(folder / "asked", "a") as asked:
                asked.write(f"{status}\n")


if __name__ == "__main__":
    ThreadingHTTPServer((os.environ["HTTP_PROXY_HOST"], int(os.environ["HTTP_PROXY_PORT"])), Handler).serve_forever()
