"""One machine: the proxy, prefill and decode engines, from set-up to stop. ``python -m disagg_machine help``.

Standard library only, so that `stop`, `status`, `logs` and `help` work without any environment. From the bottom up:

    messages, ui, files     texts in English and Chinese; what is written to stderr; small files
    table, values, settings the table of settings, its readers, and each value with its source
    proc, parts, signals    /proc; PID files and process groups; what Ctrl+C and TERM do
    net, proxy_view         ports, small HTTP questions; what the proxy says of the engines
    context, lock           what every command gets; one command at a time changes what runs
    gpus, vllm_facts        what this machine has
    engines                 vLLM's or simulated ones, and which KV connector
    layout, commands        pure: roles to GPUs and ports; the exact command line and environment of every process
    python_environment      which Python runs the proxy, and its virtual environment
    compiled                the proxy's hot path as native code: built beside what runs, used by the next start
    launch, start           what runs here, worked out once; the start of a process, and waiting for it
    dependents, supervisor  pure: which prefills go with a decode; what to restart, in one table
    probes                  programs for other Pythons: which vLLM they have, which packages they miss

Commands: up (`all`), foreground (`proxy`, `prefill`, `decode`), down (`stop`), restart, supervise (the supervisor's
process), look (`status`, `logs`; readiness judges a part), show (`config`, `env`), doctor, service (`test`, `page`,
`top`), bench, menu; cli has their table and `help`.
"""
