"""One GET with one deadline: what counts as an answer, and ports that are taken."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from disagg_machine import messages, net
from disagg_machine.net import Answer, http_get

Serve = Callable[..., int]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Answers one request with these bytes, some of them only once the test has ended; returns the port."""
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threads: list[threading.Thread] = []
        requests: list[bytes] = []

        def answer(now: bytes, later: bytes) -> None:
            connection, _ = listener.accept()
            with connection:
                requests.append(connection.recv(65536))
                connection.sendall(now)
                if later:
                    ended.wait(20)

        def begin(now: bytes, later: bytes = b"") -> int:
            threads.append(threading.Thread(target=answer, args=(now, later), daemon=True))
            threads[-1].start()
            return int(listener.getsockname()[1])

        begin.requests = requests  # type: ignore[attr-defined]
        yield begin
        ended.set()
        for thread in threads:
            thread.join()


OK = b"HTTP/1.1 200 OK\r\nContent-Type: x\r\n\r\n"


def test_an_answer_and_what_was_sent(serve: Serve) -> None:
    port = serve(OK + b'{"a":"\xc3\xa9"}')
    answer = http_get("127.0.0.1", port, "/stats", "sesame")
    assert answer == Answer(200, '{"a":"é"}') and answer.ok
    request = serve.requests[0].decode()  # type: ignore[attr-defined]
    assert request.startswith(f"GET /stats HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\n")
    assert "\r\nAuthorization: Bearer sesame\r\n" in request
    http_get("127.0.0.1", serve(OK), "/")
    assert b"Authorization" not in serve.requests[1]  # type: ignore[attr-defined]


def test_an_answer_of_another_status(serve: Serve) -> None:
    answer = http_get("127.0.0.1", serve(b"HTTP/1.0 503 Service Unavailable\r\n\r\nno"), "/health")
    assert answer == Answer(503, "no") and not answer.ok


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 xyz\r\n\r\n"])
def test_what_is_no_answer(serve: Serve, answer: bytes) -> None:
    assert http_get("127.0.0.1", serve(answer), "/health") is None


@pytest.mark.parametrize("now", [b"", OK, OK + b"half of"])
def test_an_answer_that_does_not_end_in_time(serve: Serve, now: bytes) -> None:
    assert http_get("127.0.0.1", serve(now, later=b"x"), "/health", seconds=0.05) is None


def test_a_port_that_nobody_listens_on() -> None:
    messages.use("en")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        assert http_get("127.0.0.1", port, "/health") is None
        assert not net.port_taken(port) and net.port_holder(port) == ""
        held.listen()
        assert net.port_taken(port) and net.port_holder(port).startswith("held by PID ")
