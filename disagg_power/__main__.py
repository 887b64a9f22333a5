"""``python -m disagg_power``."""

from __future__ import annotations

import sys

from disagg_power.cli import main

if __name__ == "__main__":
    sys.exit(main())
