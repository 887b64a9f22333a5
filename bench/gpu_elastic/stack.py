"""The processes: a plain engine on each GPU, a pair of prefill and decode, and a proxy for each placement."""

from __future__ import annotations

import sys
from dataclasses import replace

from bench.gpu_latency.processes import HOST, SERVED, Machine, Process, Stack, free_port

SPLIT, ELASTIC, PLAIN = "split", "elastic", "plain"


class ElasticStack(Stack):
    """Two plain engines beside a pair with two proxies.

    Args:
        gpus: the two GPUs, which may be the same one.
        slo: longest TTFT and time per output token, in milliseconds; for both proxies.
    """

    def __init__(self, machine: Machine, gpus: tuple[str, str], slo: tuple[float, float]) -> None:
        self._slo = {"SLO_TTFT_MS": f"{slo[0]:g}", "SLO_TPOT_MS": f"{slo[1]:g}"}
        # The engines announce themselves to the split's proxy, which passes it on.
        self._elastic_zmq = free_port()
        forward = ("--forward-registrations", f"{HOST}:{self._elastic_zmq}")
        super().__init__(replace(machine, proxy_arguments=(*machine.proxy_arguments, *forward)), gpus)
        self.proxy.environment = self._environment(self.proxy, SPLIT)
        self.elastic = self._elastic_proxy(machine)
        self.plain = [self._plain(number, gpu) for number, gpu in enumerate(gpus)]
        self.proxies = [self.proxy, self.elastic]
        self.engines = [self.prefill, self.decode, *self.plain]

    def urls(self, arm: str) -> list[str]:
        """Where the requests of an arm go, in turn."""
        targets = {PLAIN: self.plain, SPLIT: [self.proxy], ELASTIC: [self.elastic]}[arm]
        return [f"http://{HOST}:{one.port}" for one in targets]

    def engines_of(self, arm: str) -> list[Process]:
        """The engines that compute an arm's requests."""
        return self.plain if arm == PLAIN else [self.prefill, self.decode]

    def _environment(self, proxy: Process, placement: str) -> dict[str, str]:
        return {**proxy.environment, "PLACEMENT": placement, **self._slo}

    def _elastic_proxy(self, machine: Machine) -> Process:
        port = free_port()
        command = [
            sys.executable, "-m", "disagg_proxy", "--http-host", HOST, "--http-port", str(port), "--zmq-host", HOST,
            "--zmq-port", str(self._elastic_zmq), "--decode-max-in-flight", "256", *machine.proxy_arguments,
        ]  # fmt: skip
        return self._process("proxy-elastic", command, self._environment(self.proxy, ELASTIC), port)

    def _plain(self, number: int, gpu: str) -> Process:
        """The decode's command without the connector."""
        name, port = f"plain-{number}", free_port()
        if self.machine.engines == "sim":
            command = [
                self.machine.python, "-m", "disagg_sim", "--role", "decode", "--host", HOST, "--port", str(port),
                "--kv-port", "0", "--connector", "disagg_kv", "--model", SERVED,
                "--max-model-len", str(self.machine.max_model_len), *self.machine.arguments,
            ]  # fmt: skip
            return self._process(name, command, {}, port)
        command = self._vllm("decode", port)
        at = command.index("--kv-transfer-config")
        environment = {**self.decode.environment, "CUDA_VISIBLE_DEVICES": gpu}
        return Process(name, command[:at] + command[at + 2 :], environment, self.machine.out / f"{name}.log", port)
