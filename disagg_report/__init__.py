"""The report of `test_single_machine.sh bench`: request rates one after the other, and what came out, for people.

A *setup* is one way to use the GPUs: a split of prefill and decode behind the proxy, or plain engines side by side.

- ``records``, ``slo``, ``figures``, ``rates``, ``arrivals``, ``verdict``: what is kept of a request, when it is good,
  the figures, which rate comes next, when requests arrive, and what follows. Pure.
- ``open_loop``, ``vllm_client``: the two load generators; ``load_client``: the HTTP client of the former.
- ``power``, ``machine``: what the GPUs draw, and what is measured on.
- ``sweep``: one setup from its warm-up to its last rate.
- ``folder``, ``summary``, ``plots``, ``progress``: what is on disk, and what people see.
"""
