"""Transports: how bytes of blocks move. NCCL between GPUs, the control connection (TCP) otherwise."""
