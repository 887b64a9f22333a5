"""Power, energy and clocks of GPUs: the devices (NVML or simulated), the meter, the recorder."""
