"""The command ``disagg-proxy``: runs the proxy, or passes the rest of the line to a subcommand.

Exit codes of the proxy: 0 stopped by signals, 1 a port is taken or no worker starts, 2 a bad setting or command.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from disagg_proxy.config.commands import COMMANDS, SERVE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the proxy until SIGINT or SIGTERM, or the subcommand that the first word names.

    Args:
        argv: the words after the program's name; None for those of this process.

    Returns:
        The exit code.

    Raises:
        SystemExit: after ``--help`` and ``--version``; from a subcommand also for wrong usage.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv and not argv[0].startswith("-"):
        command, argv = argv[0], argv[1:]
        if command in COMMANDS:
            try:
                module = importlib.import_module(COMMANDS[command].module)
            except KeyboardInterrupt:
                # Imports take a second; later the command itself decides.
                return 130
            return int(module.main(argv))
        if command != SERVE:
            there = ", ".join((SERVE, *COMMANDS))
            print(f"disagg-proxy: no such command: {command!r}; commands: {there} (see --help)", file=sys.stderr)
            return 2
    from disagg_proxy import serve

    return serve.run(argv)
