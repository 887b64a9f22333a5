"""Whether an instance serves (prober), its process runs (liveness), and its engine makes progress (stall_detector)."""
