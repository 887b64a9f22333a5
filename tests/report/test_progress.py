"""The bar on a terminal, and lines elsewhere."""

from __future__ import annotations

import io

from disagg_report.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_bar_that_is_written_over() -> None:
    out, clock = Terminal(), Clock()
    progress = Progress(out, clock)
    progress.begin("pd, 4 requests/s", 10)
    clock.now = 2.0
    progress.update(10, 2, 24)
    assert out.getvalue().endswith("\r\x1b[Kpd, 4 requests/s [############------------] 10/24 answered, 2 failed  2 s")
    before = out.getvalue()
    clock.now = 2.05
    progress.update(11, 2, 24)
    assert out.getvalue() == before  # ten times a second at most
    progress.update(22, 2, 24)
    assert "[########################] 22/24" in out.getvalue()
    progress.say("done")
    assert out.getvalue().endswith("\r\x1b[Kdone\n")


def test_plain_lines_elsewhere() -> None:
    out, clock = io.StringIO(), Clock()
    progress = Progress(out, clock)
    progress.begin("pd, 4 requests/s", 10)
    for second in range(25):
        clock.now = float(second)
        progress.update(second, 0, 40)
    progress.say("done")
    assert out.getvalue().splitlines() == [
        "pd, 4 requests/s: requests for 10 s",
        "pd, 4 requests/s: 10/40 answered",
        "pd, 4 requests/s: 20/40 answered",
        "done",
    ]


def test_a_terminal_that_has_gone_away_ends_nothing() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    progress = Progress(Gone())
    progress.begin("x", 1)
    progress.say("y")
