"""``python -m disagg_machine``, or by its path with ``-I -S``: no site packages, standard library only."""

import os
import sys

if __name__ == "__main__":
    if not __package__:
        sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from disagg_machine.cli import main

    sys.exit(main())
