"""TTFT and inter-token latency through the proxy, against talking to prefill and decode directly.

    python -m bench.gpu_latency --model DIR --connector p2p_nccl|own --limit SECONDS --out DIR

Prefill on GPU 0, decode on GPU 1, the proxy beside them, and a client with two arms that share everything but the way:
``direct`` asks both engines itself, as the proxy does, and ``proxy`` asks the proxy. The method is in
docs/gpu-latency.md; ``--engines sim`` rehearses all of it with simulated engines.
"""
