"""Ports that belong to one test, whether anything listens on them or not.

The kernel gives a port that was freed to the next who asks: to another test's server, or to a connection's own end,
which may even be connected with itself. A test that expects nobody there must keep it.
"""

from __future__ import annotations

import socket
from contextlib import ExitStack


def hold_port(hold: ExitStack, host: str = "127.0.0.1", port: int = 0) -> int:
    """A port, of the kernel's choice where it is 0, that nobody else gets until ``hold`` is closed.

    The socket stays bound and never listens, which refuses connections and leaves the port to servers that set
    SO_REUSEADDR, as all of those under test do. It is set after bind, so that the kernel gives each port once.

    Raises:
        OSError: the port is taken.
    """
    one = hold.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
    one.bind((host, port))
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return int(one.getsockname()[1])


def may_listen(port: int, host: str = "127.0.0.1") -> bool:
    """Whether nobody listens on a held port."""
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            again.bind((host, port))
            again.listen()
        except OSError:
            return False
    return True
