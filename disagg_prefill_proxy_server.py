#!/usr/bin/env python3
"""The command ``disagg-proxy`` in a checkout: ``python disagg_prefill_proxy_server.py [--help]``."""

import sys

try:
    from disagg_proxy.cli import main
except ModuleNotFoundError as error:
    if error.name and error.name.startswith("disagg_proxy"):
        raise
    sys.exit(f"The package {error.name!r} is missing: pip install -r requirements-proxy.txt")

if __name__ == "__main__":
    sys.exit(main())
