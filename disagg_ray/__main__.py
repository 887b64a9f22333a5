"""``python -m disagg_ray``: the command ``disagg-proxy cluster`` where it is not installed."""

import sys

from disagg_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
