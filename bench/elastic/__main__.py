"""``python -m bench.elastic``; the work is in a module of a name that worker processes can import."""

import sys

from bench.elastic.cli import main

if __name__ == "__main__":
    sys.exit(main())
