"""``disagg-proxy key new NAME``: draws a key for API_KEYS_FILE. Nothing is stored."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from disagg_proxy.config.keys_file import check_name, new_key, table_of


def main(argv: Sequence[str]) -> int:
    """Print a key to standard output and its table for the file to standard error. Returns the exit code.

    So each can be redirected on its own: ``disagg-proxy key new alice 2>> keys.toml`` shows the key and adds its table.
    """
    parser = argparse.ArgumentParser(
        prog="disagg-proxy key",
        description="Keys for API_KEYS_FILE.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    new = commands.add_parser(
        "new",
        help="print a new key, and its table for the file",
        description="Prints a new key to standard output, and its table for API_KEYS_FILE to standard error. The key "
        "is shown once and stored nowhere; the table holds its hash only.",
        epilog="Add the table to the file: disagg-proxy key new NAME 2>> keys.toml; then reload the proxy (SIGHUP).",
        allow_abbrev=False,
    )
    new.add_argument("name", metavar="NAME", help="who the key is for: its name in metrics and the access log")
    args = parser.parse_args(argv)
    try:
        name = check_name(args.name)
    except ValueError as error:
        parser.error(str(error))
    key = new_key()
    print(key, flush=True)
    print(f"\n{table_of(name, key)}", end="", file=sys.stderr)
    return 0
