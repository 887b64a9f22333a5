"""``python -m disagg_sim``: simulated engines as a process."""

import sys

from disagg_sim.cli import main

sys.exit(main())
