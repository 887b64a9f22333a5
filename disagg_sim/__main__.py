"""``python -m disagg_sim``."""

import sys

from disagg_sim.cli import main

sys.exit(main())
