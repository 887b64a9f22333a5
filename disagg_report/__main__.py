"""``python -m disagg_report``: see ``--help``."""

import sys

from disagg_report.cli import main

if __name__ == "__main__":
    sys.exit(main())
