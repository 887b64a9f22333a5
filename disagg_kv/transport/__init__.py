"""How the bytes of blocks move: one interface; NCCL between GPUs, the control connection (TCP) otherwise."""
