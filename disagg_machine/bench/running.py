"""`bench`: the report of what runs now, however it was started."""

from __future__ import annotations

from disagg_machine import net, proxy_view
from disagg_machine.bench import plan
from disagg_machine.bench.report import begin, finish, running_kind
from disagg_machine.context import Context
from disagg_machine.messages import die


def measure(context: Context, answer: net.Answer) -> int:
    """The exit code; ``answer`` is the proxy's ``/health``.

    Raises:
        MachineError: 1, no pair is ready.
    """
    health = proxy_view.read_health(answer)
    prefills, decodes = (health.ready[role] if health else 0 for role in ("prefill", "decode"))
    if not (prefills and decodes):
        raise die(1, "bench_no_pair", context.url)
    report = begin(context, running_kind(context.run_dir))
    setup = plan.pd_setup("pd", "sweep", prefills, decodes, context.url)
    return finish(lambda: report.measure(setup, context.settings.api_key), report.write)
