"""``python -m bench.policies``; the work is in a module of a name that worker processes can import."""

import sys

from bench.policies.cli import main

if __name__ == "__main__":
    sys.exit(main())
