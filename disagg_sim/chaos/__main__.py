"""``python -m disagg_sim.chaos``: one chaos run and its report."""

import sys

from disagg_sim.chaos.cli import main

if __name__ == "__main__":
    sys.exit(main())
