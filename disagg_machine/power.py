"""`power`: the commands of ``disagg-proxy power`` for what runs here: clocks that may be set, or a reset."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from disagg_machine import python_environment, signals
from disagg_machine.context import Context


def cmd_power(context: Context, words: Sequence[str]) -> int:
    """``power [COMMAND]``: becomes ``disagg-proxy power COMMAND``, without one ``clocks``, with this RUN_DIR."""
    python = python_environment.ensure(context)
    environment = {**context.child_environment(), "RUN_DIR": str(context.run_dir)}
    sys.stdout.flush()
    signals.restore_sigpipe()
    os.chdir(context.root)
    os.execve(python, [python, "-m", "disagg_power", *(words or ["clocks"])], environment)
