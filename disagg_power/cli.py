"""``disagg-proxy power``: clocks and energy of GPUs.

Exit codes: 0 success; 1 it failed, the text says why; 2 wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from disagg_power import clock_commands, hold, meter_commands


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand, whose module's ``add_parsers`` has said how."""
    parser = argparse.ArgumentParser(
        prog="disagg-proxy power", description="Clocks and energy of the GPUs.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (meter_commands, clock_commands, hold):
        module.add_parsers(commands)
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    return int(args.run(args))
