"""``python -m disagg_proxy.chaos``: the former name of ``python -m disagg_sim.chaos``, started with the same flags."""

import sys

from disagg_sim.chaos.cli import main

if __name__ == "__main__":
    sys.exit(main())
