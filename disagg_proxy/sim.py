"""``python -m disagg_proxy.sim``: the former name of ``python -m disagg_sim``, which it starts with the same flags."""

import sys

from disagg_sim.cli import main

if __name__ == "__main__":
    sys.exit(main())
