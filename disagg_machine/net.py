"""Looking at ports, and small HTTP questions, with sockets and /proc alone."""

from __future__ import annotations

import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from disagg_machine import proc
from disagg_machine.messages import text
from disagg_machine.ui import plain_line


def reach(host: str) -> str:
    """Where to reach a server that listens on ``host``."""
    return {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1", "[::]": "::1"}.get(host, host)


def authority(host: str, port: int) -> str:
    """``HOST:PORT`` as it stands in a URL."""
    host = reach(host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer: status and body."""

    status: int
    body: str

    @property
    def ok(self) -> bool:
        """Whether the status is 200."""
        return self.status == 200


def http_get(host: str, port: int, path: str, key: str = "", seconds: float = 3) -> Answer | None:
    """The answer to one GET, without any HTTP proxy in between.

    Args:
        key: sent as ``Authorization: Bearer``.
        seconds: for all of it.

    Returns:
        None when no whole answer came.
    """
    deadline = time.monotonic() + seconds
    name = f"[{host}]" if ":" in host else host
    bearer = f"Authorization: Bearer {key}\r\n" if key else ""
    request = f"GET {path} HTTP/1.0\r\nHost: {name}:{port}\r\n{bearer}Connection: close\r\n\r\n"
    data = bytearray()
    try:
        with socket.create_connection((host, port), timeout=seconds) as connection:
            connection.sendall(request.encode())
            while True:
                connection.settimeout(max(0.001, deadline - time.monotonic()))
                received = connection.recv(1 << 16)
                if not received:
                    break
                data += received
                if time.monotonic() > deadline:
                    return None
    except OSError:
        return None
    head, _, body = bytes(data).partition(b"\r\n\r\n")
    match = re.match(rb"HTTP/1\.[01] ([0-9]{3})", head)
    return Answer(int(match[1]), body.decode("utf-8", "replace")) if match else None


def listener_inode(port: int) -> str | None:
    """The inode of a socket that listens on ``port``; None when the port is free."""
    pattern = re.compile(rb":%04X [0-9A-F]+:[0-9A-F]+ 0A(.*)" % port)
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            with open(table, "rb") as file:
                match = pattern.search(file.read())
        except OSError:
            continue
        if match:
            return match[1].split()[5].decode()
    return None


def port_taken(port: int) -> bool:
    """Whether something listens on ``port``."""
    return listener_inode(port) is not None


def port_holder(port: int) -> str:
    """Who listens on ``port``, in words; empty when nobody does."""
    inode = listener_inode(port)
    if inode is None:
        return ""
    for pid in proc.pids():
        if f"socket:[{inode}]" in proc.descriptors(pid):
            return text("held_by", pid, plain_line(proc.command_line(pid)))
    return text("held_by_other")


def is_ip(host: str) -> bool:
    """Whether ``host`` is an address and no name."""
    return re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,3}){3}", host) is not None or ":" in host


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    return host.startswith("127.") or host == "::1"


def free_gib(path: Path) -> int:
    """Free GiB where a path is, or would be."""
    while not path.is_dir():
        path = path.parent
    usage = os.statvfs(path)
    return usage.f_bavail * usage.f_frsize >> 30
