"""One machine: the proxy, prefill and decode engines, from set-up to stop. ``python -m disagg_machine help``.

Standard library only, so that `stop`, `status`, `logs` and `help` work without any environment. Who owns what:

    settings, values        the table of settings; :class:`Settings` with the source of each value
    messages, ui            texts in English and Chinese; what is written to stderr
    context                 what every command gets: settings, folders, environment
    gpus, vllm_facts        what this machine has (read-only)
    engines                 vllm or simulated, and which KV connector
    layout, commands        pure: roles -> GPUs and ports; the exact command line and environment of every process
    proc, parts             /proc; PID files, process groups, start and stop
    net, proxy_view         ports, small HTTP questions; what the proxy says of the engines
    lock, launch            one command at a time; start one process
    up, down, foreground    `all`; `stop` and `restart`; `proxy`, `prefill`, `decode`
    supervisor              restarts what died or froze
    readiness, look         `status`, `logs`, `env`, `config`, `help`
    doctor, bench, service  `doctor`; `bench`; `test`, `page`, `top`
    python_environment      which Python runs the proxy, and its virtual environment
    cli                     the table of commands
"""
