"""The command ``disagg-proxy top``: a live screen of a proxy, or its state printed once.

Exit codes: 0 after q, Ctrl+C or ``--once``; 1 if no proxy responds (with ``--once``), or it has no feed or rejects the
key; 2 for wrong usage, or if rich is not installed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

NO_RICH = "disagg-proxy top: the package rich is missing: pip install rich"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="disagg-proxy top",
        description="Show the live page of a proxy in the terminal. "
        "Keys: r requests, e events, i instances, o overview, q quit.",
        allow_abbrev=False,
    )
    port = os.environ.get("HTTP_PROXY_PORT") or "10001"
    parser.add_argument(
        "--url",
        default=f"http://127.0.0.1:{port}",
        help="URL of the proxy, with its path prefix if it has one (default: %(default)s)",
    )
    parser.add_argument("--key", default=os.environ.get("API_KEY", ""), help="API key of the proxy (default: API_KEY)")
    parser.add_argument(
        "--once",
        action="store_true",
        help="print the current state and exit; the default without a terminal",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command. Returns its exit code, see the module docstring."""
    parser = _parser()
    args = parser.parse_args(argv)
    url = args.url.rstrip("/")
    if not url.startswith(("http://", "https://")):
        parser.error(f"--url must look like http://127.0.0.1:10001, not {args.url!r}")
    try:
        import rich  # noqa: F401
    except ModuleNotFoundError:
        print(NO_RICH, file=sys.stderr)
        return 2
    from disagg_proxy.top.follow import FeedError

    # A terminal without cursor movement cannot show the screen.
    once = args.once or not sys.stdout.isatty() or os.environ.get("TERM") in (None, "", "dumb")
    try:
        asyncio.run(_print(url, args.key) if once else _watch(url, args.key))
    except FeedError as error:
        print(f"disagg-proxy top: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:
        # The reader has closed the pipe. Without this the interpreter reports the error again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


async def _print(url: str, key: str) -> None:
    from rich.console import Console

    from disagg_proxy.top.follow import FeedError, views
    from disagg_proxy.top.screen import screen
    from disagg_proxy.top.words import Words

    seen = views(url, key)
    try:
        async for view in seen:
            # A pipe has no width; 200 columns avoid truncation.
            console = Console() if sys.stdout.isatty() else Console(width=200)
            console.print(screen(view, Words.of(os.environ), width=console.width))
            return
    finally:
        await seen.aclose()  # type: ignore[attr-defined]
    raise FeedError(f"{url} is stopping")


async def _watch(url: str, key: str) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from disagg_proxy.top.follow import views_with_reconnect
    from disagg_proxy.top.screen import View, screen
    from disagg_proxy.top.words import Words

    console, words = Console(), Words.of(os.environ)
    seen: list[View] = []
    shown = Shown()
    left = asyncio.Event()
    why_gone = ""

    with Live(Text(words.say("head_connecting")), console=console, screen=True, auto_refresh=False) as live:

        def draw() -> None:
            if not seen:
                live.update(Text(why_gone or words.say("head_connecting")), refresh=True)
                return
            size = console.size
            above = shown.limit(seen[0])
            live.update(screen(seen[0], words, size.height, why_gone, size.width, shown.alone, above), refresh=True)

        def pressed(keys: bytes) -> None:
            if shown.press(keys, console.size.height):
                draw()
            else:
                left.set()

        def gone(why: str) -> None:
            nonlocal why_gone
            why_gone = why
            draw()

        async def follow() -> None:
            nonlocal why_gone
            async for view in views_with_reconnect(url, key, gone):
                seen[:], why_gone = [view], ""
                draw()

        with _keys(pressed):
            following, leaving = asyncio.ensure_future(follow()), asyncio.ensure_future(left.wait())
            try:
                await asyncio.wait((following, leaving), return_when=asyncio.FIRST_COMPLETED)
            finally:
                leaving.cancel()
                following.cancel()
                await asyncio.gather(leaving, return_exceptions=True)
                [end] = await asyncio.gather(following, return_exceptions=True)
    if isinstance(end, Exception):
        raise end


class Shown:
    """What the keys have selected.

    Attributes:
        alone: the list that is shown alone, empty for the overview.
        above: its entries that are scrolled past.
    """

    def __init__(self) -> None:
        self.alone = ""
        self.above = 0

    def press(self, keys: bytes, height: int) -> bool:
        """Apply keys as a terminal sends them. Returns False if one of them quits.

        Args:
            height: lines of the terminal, half of which a page scrolls.
        """
        page = max(1, height // 2)
        moves = {b"\x1b[A": -1, b"k": -1, b"\x1b[B": 1, b"j": 1, b"\x1b[5~": -page, b"\x1b[6~": page}
        for pressed in re.findall(rb"\x1b[\[O][\d;]*[A-Za-z~]|[^\x1b]|\x1b", keys):
            # In application mode, arrows are ESC O A.
            name = pressed.lower() if len(pressed) == 1 else pressed.replace(b"\x1bO", b"\x1b[")
            if name in (b"q", b"\x04"):
                return False
            if name in moves:
                self.above = max(0, self.above + moves[name])
            elif name in (b"r", b"e", b"i", b"o", b"\x1b"):
                self.alone, self.above = {b"r": "requests", b"e": "events", b"i": "instances"}.get(name, ""), 0
        return True

    def limit(self, view: dict[str, Any]) -> int:
        """Entries to skip, so that the oldest one stays visible."""
        from disagg_proxy.top.screen import length

        self.above = min(self.above, max(0, length(view, self.alone) - 1)) if self.alone else 0
        return self.above


@contextmanager
def _keys(pressed: Callable[[bytes], None]) -> Iterator[None]:
    """Call ``pressed`` with the keys that are pressed, without Enter. Does nothing if stdin is not a terminal."""
    if not sys.stdin.isatty():
        yield
        return
    import termios
    import tty

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    loop = asyncio.get_running_loop()
    loop.add_reader(fd, lambda: pressed(os.read(fd, 64)))
    tty.setcbreak(fd)
    try:
        yield
    finally:
        loop.remove_reader(fd)
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
