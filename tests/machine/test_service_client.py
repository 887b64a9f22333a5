"""The requests of `test` and `bench --once` against a server that answers as a test says, and what is made of them."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from disagg_machine import messages, service
from disagg_machine.service_client import Answer, Failed, Service, Silent

COMPLETION = {"choices": [{"text": "the city"}], "usage": {"completion_tokens": 2}}
CHAT = {"choices": [{"message": {"content": "Fresno"}}], "usage": {"completion_tokens": 1}}
STREAM = [
    {"choices": [{"text": "the"}]},
    {"choices": [{"delta": {"content": " city"}}]},
    {"choices": [], "usage": {"completion_tokens": 2}},
]


def sse(*events: Any, done: bool = True) -> bytes:
    lines = [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"] * done
    return "".join([": a comment\n\n", *lines]).encode()


class Fake(ThreadingHTTPServer):
    """Answers by path; a list is answered one after the other, the last one again and again."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, Any] = {}
        self.asked: list[tuple[str, str | None, Any]] = []
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Short(bytes):
    """A body of which the last byte is not sent."""


class Handler(BaseHTTPRequestHandler):
    server: Fake

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append((self.path, self.headers["Authorization"], json.loads(body) if body else None))
        answer = self.server.answers.get(self.path, (404, {"error": "no such\nroute"}))
        if isinstance(answer, list):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        if answer is None:
            self.server.released.wait(20)
            return
        status, value = answer if isinstance(answer, tuple) else (200, answer)
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) + isinstance(data, Short)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        self.do_GET()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    messages.use("en")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with Fake() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()


def stats(prefill: int, decode: int) -> dict[str, Any]:
    counts = {"prefill": prefill, "decode": decode}
    return {
        "instances": [{"role": r, "http_address": f"127.0.0.1:{r}", "requests_total": n} for r, n in counts.items()]
    }


def test_whole_answers_and_the_key(fake: Fake) -> None:
    fake.answers = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}
    answer = Service(fake.url, "sesame").whole("/v1/completions", {"prompt": "x"})
    assert (answer.text, answer.tokens) == ("the city", 2) and answer.first == answer.seconds > 0
    assert fake.asked == [("/v1/completions", "Bearer sesame", {"prompt": "x"})]
    assert Service(fake.url).whole("/v1/chat/completions", {}).text == "Fresno"
    assert fake.asked[-1][1] is None


def test_a_stream_is_read_to_the_end_of_its_body(fake: Fake) -> None:
    fake.answers = {"/v1/completions": Short(sse(*STREAM))}
    with pytest.raises(Failed, match="IncompleteRead"):
        Service(fake.url).stream("/v1/completions", {"prompt": "x"})


def test_streams(fake: Fake) -> None:
    fake.answers = {"/v1/completions": sse(*STREAM)}
    answer = Service(fake.url).stream("/v1/completions", {"prompt": "x"})
    assert (answer.text, answer.tokens) == ("the city", 2) and 0 < answer.first <= answer.seconds
    assert fake.asked[0][2] == {"prompt": "x", "stream": True, "stream_options": {"include_usage": True}}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((503, {"error": "no\n pair"}), r'HTTP 503: \{"error": "no\\n pair"\}'),
        (b"<html>", "JSONDecodeError"),
        ([["x"]], "not a JSON object"),
        ({"choices": []}, "not an answer"),
        ({"choices": [{"text": ""}], "usage": {"completion_tokens": 0}}, "no tokens"),
    ],
)
def test_answers_that_are_none(fake: Fake, answer: Any, words: str) -> None:
    fake.answers = {"/v1/completions": answer}
    with pytest.raises(Failed, match=words):
        Service(fake.url).whole("/v1/completions", {})


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (sse(*STREAM, done=False), r"without \[DONE\]"),
        (sse(*STREAM[:2]), "no tokens"),
        (b"data: {\n\n", "JSONDecodeError"),
        (sse({"choices": [3]}), "AttributeError"),
    ],
)
def test_streams_that_are_none(fake: Fake, answer: bytes, words: str) -> None:
    fake.answers = {"/v1/completions": answer}
    with pytest.raises(Failed, match=words):
        Service(fake.url).stream("/v1/completions", {})


def test_a_service_that_is_silent_or_not_there(fake: Fake) -> None:
    fake.answers = {"/v1/completions": [None]}
    with pytest.raises(Silent, match=r"no answer for 0\.05 s"):
        Service(fake.url, timeout=0.05).whole("/v1/completions", {})
    with socket.socket() as held, pytest.raises(Failed, match="Refused"):
        # Bound and not listening.
        held.bind(("127.0.0.1", 0))
        Service(f"http://127.0.0.1:{held.getsockname()[1]}").json("/stats")


def test_the_model(fake: Fake) -> None:
    fake.answers = {"/v1/models": {"data": [{"id": "a"}, {"id": "b"}]}}
    one = Service(fake.url)
    assert (one.model("b"), one.model("c")) == ("b", "a")
    for nothing in ({"data": []}, {}, {"data": [3]}):
        fake.answers = {"/v1/models": nothing}
        with pytest.raises(Failed, match="names no model"):
            one.model("a")


def test_counts(fake: Fake) -> None:
    fake.answers = {"/stats": stats(3, 4)}
    assert Service(fake.url).counts() == {"prefill 127.0.0.1:prefill": 3, "decode 127.0.0.1:decode": 4}
    fake.answers = {"/stats": {"instances": [{}]}}
    with pytest.raises(Failed, match="names no instances"):
        Service(fake.url).counts()


# -- `test`


def serving(fake: Fake, requests: int = 3, **changes: Any) -> Service:
    """A service whose counts rise with every request."""
    counts = [stats(n, n) for n in range(requests) for n in (n, n + 1)]
    answers: dict[str, Any] = {
        "/v1/models": {"data": [{"id": "m"}]},
        "/v1/completions": [COMPLETION, sse(*STREAM)],
        "/v1/chat/completions": CHAT,
        "/stats": counts,
    }
    fake.answers = {**answers, **changes}
    return Service(fake.url, timeout=10)


def test_all_three_requests(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert service.check(serving(fake), "m")
    lines = capsys.readouterr().out.splitlines()
    assert [line[:10].strip() for line in lines] == ["model: m", "completion", "", "stream", "", "chat", ""]
    assert lines[1].endswith(" 2 tokens, prefill 127.0.0.1:prefill -> decode 127.0.0.1:decode")
    assert lines[2].strip() == lines[4].strip() == "the city" and lines[6].strip() == "Fresno"
    bodies = [body for path, _, body in fake.asked if path.endswith("completions")]
    assert [body["max_tokens"] for body in bodies] == [service.TOKENS] * 3


def test_text_of_a_model_cannot_move_the_cursor(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    odd = {"choices": [{"text": "a\x1b[2J\nb"}], "usage": {"completion_tokens": 2}}
    assert service.check(serving(fake, **{"/v1/completions": [odd, sse(*STREAM)]}), "m")
    assert "a [2J b" in capsys.readouterr().out


def test_a_model_without_a_chat_template(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    refused = (400, {"error": "No chat template is defined"})
    assert service.check(serving(fake, **{"/v1/chat/completions": refused}), "m")
    assert "chat was skipped: the model's tokenizer has no chat template" in capsys.readouterr().err


def test_problems_are_counted_and_the_next_request_is_sent(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert not service.check(serving(fake, **{"/v1/completions": [(500, {"error": "x"}), sse(*STREAM)]}), "m")
    out, err = capsys.readouterr()
    assert "completion: HTTP 500" in err and "stream " in out and "chat " in out
    assert not service.check(serving(fake, **{"/v1/models": {}}), "m")
    assert "/v1/models: /v1/models names no model" in capsys.readouterr().err


def test_a_silent_request_ends_the_test(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    silent = serving(fake, **{"/v1/completions": [None]})
    silent.timeout = 0.05
    assert not service.check(silent, "m")
    assert "no answer for 0.05 s" in capsys.readouterr().err
    assert [path for path, _, _ in fake.asked].count("/v1/completions") == 1


def test_the_engines_that_served(fake: Fake) -> None:
    slept: list[float] = []
    late = [stats(1, 0), stats(1, 0), stats(1, 1)]
    one = serving(fake, **{"/stats": late})
    before = {"prefill 127.0.0.1:prefill": 0, "decode 127.0.0.1:decode": 0}
    shown = "prefill 127.0.0.1:prefill -> decode 127.0.0.1:decode"
    assert service.served_by(one, before, slept.append) == shown and slept == [0.1, 0.1]
    with pytest.raises(Failed, match="both a prefill and a decode"):
        service.served_by(serving(fake, **{"/stats": stats(1, 0)}), before, slept.append)
    assert len(slept) == 2 + 9


def test_seconds_per_token() -> None:
    assert Answer("", 1.0, 0.2, 1).per_token is None
    assert Answer("", 1.0, 0.2, 5).per_token == pytest.approx(0.2)
