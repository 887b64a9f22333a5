"""What goes to stderr, on a terminal and elsewhere, and small files."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from disagg_machine import files, messages, ui


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    messages.use("en")
    monkeypatch.setattr(ui._Progress, "last", "")
    monkeypatch.setattr(ui._Progress, "at", 0)


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    one = Terminal()
    monkeypatch.setattr(sys, "stderr", one)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return one


def test_colours_only_on_a_terminal_that_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch)
    ui.complain("unknown_command", "x")
    assert terminal.getvalue() == '\x1b[31mtest_single_machine.sh: unknown command "x"\x1b[0m\n'
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as change:
            change.setenv(name, value)
            assert ui.coloured("x", ui.RED) == "x"
    monkeypatch.undo()
    assert ui.coloured("x", ui.RED) == "x", "no terminal"


def test_the_progress_line_is_overwritten_and_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    terminal = on_a_terminal(monkeypatch)
    log = tmp_path / "log"
    log.write_text("first\nloading \x1b[1mweights " + "字" * 40 + "\n")
    ui.progress("decode to answer", 3, log)
    shown = terminal.getvalue()
    assert shown.startswith("\r\x1b[KWaiting for decode to answer, 3 s | ") and "\x1b[1m" not in shown
    line = shown.removeprefix("\r\x1b[K")
    assert len(line) + line.count("字") <= 39
    ui.say("nothing_runs")
    assert terminal.getvalue() == shown + "\r\x1b[KNothing is running.\n"


def test_elsewhere_a_line_when_it_changes_and_every_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    for elapsed in range(25):
        ui.progress("the proxy" if elapsed < 12 else "decode to answer", elapsed)
    assert capsys.readouterr().err.splitlines() == [
        "Waiting for the proxy, 0 s",
        "Waiting for the proxy, 10 s",
        "Waiting for decode to answer, 12 s",
        "Waiting for decode to answer, 22 s",
    ]


def test_a_terminal_that_is_gone_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Gone())
    ui.say("nothing_runs")
    ui.progress("x", 0)
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    ui.loud("a", "b")


def test_the_end_of_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    ui.show_log_tail(log)
    log.write_text("".join(f"line {n}\n" for n in range(100)) + "a\tbell\x07\n")
    ui.show_log_tail(log, 2)
    assert capsys.readouterr().err == f"Last lines (at most 2) of {log}:\n    line 99\n    a bell \n"


def test_tails(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert files.tail(log, 3) == []
    log.write_bytes(b"")
    assert files.tail(log, 3) == []
    log.write_bytes(b"a\n\nb")
    assert files.tail(log, 9) == ["a", "", "b"] and files.tail(log, 2) == ["", "b"]
    log.write_bytes(b"\xff\n" + b"x" * 100 + b"\nend\n")
    assert files.tail(log, 1, limit=10) == ["end"]


def test_one_generation_of_a_log_is_kept(tmp_path: Path) -> None:
    log = tmp_path / "proxy.log"
    for text in ("first", "second"):
        files.rotate(log)
        assert log.read_text() == ""
        log.write_text(text)
    files.rotate(log)
    files.rotate(log)
    assert (tmp_path / "proxy.log.1").read_text() == "second", "an empty log replaces nothing"


def test_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.pid"
    files.write_fields(path, {"pid": 7, "log": "/a b=c", "empty": ""})
    assert path.read_text() == "pid=7\nlog=/a b=c\nempty=\n" and path.stat().st_mode & 0o777 == 0o600
    path.write_text(path.read_text() + "no sign\n=x\n")
    assert files.read_fields(path) == {"pid": "7", "log": "/a b=c", "empty": "", "no sign": ""}
    assert files.read_fields(tmp_path / "none") == {} and list(tmp_path.iterdir()) == [path]
