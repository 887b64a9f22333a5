"""Prefill, decode and a plain engine of vLLM on one GPU: answers, stages of TTFT, IPC beside TCP, kills, memory."""
