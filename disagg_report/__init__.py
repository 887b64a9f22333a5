"""Reports of `test_single_machine.sh bench`: a sweep over request rates, and its figures, page and plots.

A *setup* is one way to use the GPUs: a split of prefill and decode behind the proxy, or plain engines side by side.

- ``records``, ``slo``, ``figures``, ``rates``, ``arrivals``, ``verdict``: records of requests, the SLO, figures, choice
  of the next rate, arrival times, conclusions. Pure.
- ``open_loop``, ``vllm_client``: the two load generators; ``load_client``: the HTTP client of the former.
- ``power``, ``machine``: power of the GPUs, description of the machine.
- ``sweep``: one setup from its warm-up to its last rate.
- ``folder``, ``summary``, ``plots``, ``progress``: files, and output for people.
"""
