"""The command ``disagg-proxy top``: a live screen of a proxy, or its state printed once.

Exit codes: 0 after q, Ctrl+C or ``--once``; 1 if no proxy responds (with ``--once``), or it has no feed or rejects the
key; 2 for wrong usage, or if rich is not installed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

NO_RICH = "disagg-proxy top: the package rich is missing: pip install rich"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="disagg-proxy top",
        description="Show the live page of a proxy in the terminal. Quit with q or Ctrl+C.",
        allow_abbrev=False,
    )
    port = os.environ.get("HTTP_PROXY_PORT") or "10001"
    parser.add_argument(
        "--url",
        default=f"http://127.0.0.1:{port}",
        help="URL of the proxy (default: %(default)s)",
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
            console.print(screen(view, Words.of(os.environ)))
            return
    finally:
        await seen.aclose()  # type: ignore[attr-defined]
    raise FeedError(f"{url} is stopping")


async def _watch(url: str, key: str) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from disagg_proxy.top.follow import View, views_with_reconnect
    from disagg_proxy.top.screen import screen
    from disagg_proxy.top.words import Words

    console, words = Console(), Words.of(os.environ)
    seen: list[View] = []
    left = asyncio.Event()

    with (
        _keys(left),
        Live(Text(words.say("head_connecting")), console=console, screen=True, auto_refresh=False) as live,
    ):

        def show(gone: str = "") -> None:
            shown = screen(seen[0], words, console.height, gone) if seen else Text(gone or words.say("head_connecting"))
            live.update(shown, refresh=True)

        async def follow() -> None:
            async for view in views_with_reconnect(url, key, show):
                seen[:] = [view]
                show()

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


@contextmanager
def _keys(left: asyncio.Event) -> Iterator[None]:
    """Set ``left`` when q is pressed, without Enter. Does nothing if stdin is not a terminal."""
    if not sys.stdin.isatty():
        yield
        return
    import termios
    import tty

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    loop = asyncio.get_running_loop()
    loop.add_reader(fd, lambda: left.set() if set(os.read(fd, 64)) & set(b"qQ\x04") else None)
    tty.setcbreak(fd)
    try:
        yield
    finally:
        loop.remove_reader(fd)
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
