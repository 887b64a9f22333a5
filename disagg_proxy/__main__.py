"""``python -m disagg_proxy``: the proxy; ``python -m disagg_proxy top``: what shows it in a terminal."""

import sys

from disagg_proxy.cli import main

if __name__ == "__main__":
    sys.exit(main())
