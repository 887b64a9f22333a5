"""`bench`: a report over request rates (disagg_report) of what runs, of plain engines on the same GPUs beside it, or of
each split of the GPUs into prefill and decode. ``bench --once`` is one load without a report."""

from __future__ import annotations

from collections.abc import Sequence

from disagg_machine import ui
from disagg_machine.compiled import control
from disagg_machine.context import Context
from disagg_machine.messages import die

OPTIONS = ("--once", "--ratio", "--against-plain", "--clocks", "--traditional")


def cmd_bench(context: Context, words: Sequence[str]) -> int:
    """``bench [--ratio] [--against-plain] [--once]`` or ``bench --clocks [--against-plain] [--traditional]``.

    Raises:
        MachineError: what keeps it from beginning.
    """
    for word in words:
        if word not in OPTIONS:
            raise die(2, "unknown_argument", "bench", word)
    once, ratio, plain, clocks, traditional = (option in words for option in OPTIONS)
    if once and len(set(words)) > 1:
        raise die(2, "bench_once_alone")
    if (clocks and ratio) or (traditional and not clocks):
        raise die(2, "bench_clocks_with")
    if control.end(context):
        # It would be measured too.
        ui.say("compile_ended")
    if clocks:
        from disagg_machine.bench import clocks as over_clocks

        return over_clocks.compare(context, plain, traditional)
    if ratio or plain:
        from disagg_machine.bench.setups import compare

        return compare(context, ratio, plain)
    from disagg_machine import service

    answer = service.need_key(context)
    if once:
        from disagg_machine.bench.once import run

        return run(context)
    from disagg_machine.bench.running import measure

    return measure(context, answer)
