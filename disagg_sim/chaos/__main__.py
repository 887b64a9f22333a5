"""``python -m disagg_sim.chaos``."""

import sys

from disagg_sim.chaos.cli import main

if __name__ == "__main__":
    sys.exit(main())
