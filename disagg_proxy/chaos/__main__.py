"""``python -m disagg_proxy.chaos``."""

import sys

from disagg_proxy.chaos.cli import main

if __name__ == "__main__":
    sys.exit(main())
