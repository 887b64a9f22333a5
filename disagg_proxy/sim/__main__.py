"""``python -m disagg_proxy.sim``."""

import sys

from disagg_proxy.sim.cli import main

sys.exit(main())
