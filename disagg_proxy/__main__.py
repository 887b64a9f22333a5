"""``python -m disagg_proxy``: the proxy."""

import sys

from disagg_proxy.cli import main

if __name__ == "__main__":
    sys.exit(main())
