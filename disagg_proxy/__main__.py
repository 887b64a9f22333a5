"""``python -m disagg_proxy``: the command ``disagg-proxy`` where it is not installed."""

import sys

from disagg_proxy.cli import main

if __name__ == "__main__":
    sys.exit(main())
