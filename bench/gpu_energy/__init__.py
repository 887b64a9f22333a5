"""The meter on a real GPU: counter against integral, an announcement against an own reader, and joules per token.

    python -m bench.gpu_energy --engine http://127.0.0.1:8000 --gpu 0 --out energy.jsonl
    python -m bench.gpu_energy --engine ... --proxy http://127.0.0.1:10001   # and the proxy's figures of that GPU

Engines run already; this only loads one of them (any OpenAI-compatible vLLM, plain is best) and reads. One JSON line
per step, as each ends. Nothing is set: a call of NVML that sets or resets something fails the run. The steps share the
limit (240 s by default): idle, prefill only (random prompts, one output token), idle, decode only (short prompts, long
answers). Tokens are those of the engine's own /metrics, so the windows need not end with a request.

Needs the standard library, and nvidia-ml-py or the copy that vLLM brings along. With POWER_SIMULATED it reads simulated
GPUs (``disagg-proxy sim --gpu 0 --gpus-file FILE``).
"""
