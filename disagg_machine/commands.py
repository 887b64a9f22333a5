"""The exact command line and environment of every process. Pure functions; a cluster's start uses them too.

The flags are those of vLLM 0.9.2 to 0.33 (vllm/engine/arg_utils.py). With P2pNcclConnector some differ by version.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from disagg_machine import net
from disagg_machine.engines import Engines
from disagg_machine.layout import Place
from disagg_machine.messages import die, text
from disagg_machine.proxy_view import announced_host
from disagg_machine.settings import Settings
from disagg_machine.vllm_facts import VllmFacts

POWER_STATUS = "power.status"
"""In RUN_DIR: what is set of clocks, by disagg_power."""


def clocks_wanted(settings: Settings) -> bool:
    """Whether any clock or power limit is to be set."""
    values = (f"{role}_{name}" for role in ("prefill", "decode") for name in ("sm_clock", "mem_clock", "power_limit"))
    set_any = settings.power_governor != "off" or any(getattr(settings, value) for value in values)
    return settings.power_backend != "none" and set_any


@dataclass(frozen=True, slots=True)
class Command:
    """One process.

    Attributes:
        words: the program and its arguments.
        environment: variables that it gets besides those of its parent, in the order in which they are shown.
    """

    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    def line(self, secrets: Mapping[str, str] | None = None) -> str:
        """The command as a person would type it.

        Args:
            secrets: variable -> the name of the one to take its value from. The shell refuses to run the line where
                that is not set, so that nothing starts without its key.
        """
        variables = [f'{name}="${{{source}:?{text("env_secret")}}}"' for name, source in (secrets or {}).items()]
        variables += [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, *map(shlex.quote, self.words)])


def split_words(raw: str) -> list[str]:
    """Shell-quoted words, nothing expanded or run.

    Raises:
        MachineError: 2, a quote is open.
    """
    try:
        return shlex.split(raw)
    except ValueError:
        raise die(2, "bad_quotes", raw) from None


# -- the proxy


def proxy(
    settings: Settings,
    engines: Engines,
    program: Sequence[str],
    *,
    tensor_parallel: int = 1,
    kv_bytes_per_token: int = 0,
    environ: Mapping[str, str] | None = None,
    places: Sequence[Place] = (),
) -> Command:
    """The proxy. Keys stay in the environment of its parent, where `ps` of other users does not show them.

    Args:
        program: the words that start it.
        tensor_parallel: GPUs of each decode engine, each of which has a KV buffer of its own.
        kv_bytes_per_token: bytes of KV of one prompt token; 0, when the model is not on this machine yet, leaves the
            proxy's own limit: `max_model_len` unloaded prompt tokens on one decode.
        environ: what the user has set himself wins.
        places: the parts of this machine. The proxy reads the GPUs of engines that do not announce their energy.
    """
    environ = environ or {}
    variables = {
        "HTTP_PROXY_HOST": settings.http_proxy_host,
        "HTTP_PROXY_PORT": str(settings.http_proxy_port),
        "PROXY_HOST": settings.proxy_host,
        "PROXY_PORT": str(settings.proxy_port),
        # The proxy ends within SHUTDOWN_GRACE and a moment, which must fit into STOP_TIMEOUT.
        "SHUTDOWN_GRACE": str(max(1, settings.stop_timeout - 3)),
        "DECODE_MAX_IN_FLIGHT": str(settings.max_num_seqs),
    }
    if clocks_wanted(settings):
        variables["POWER_STATUS_FILE"] = str(settings.run_dir / POWER_STATUS)
    if settings.config_file:
        variables["CONFIG_FILE"] = settings.config_file
    # This project's connector has no buffer that could fill.
    if not engines.own_connector:
        variables["KV_BUFFER_BYTES"] = str(settings.kv_buffer_size.whole() * tensor_parallel)
        variables["KV_BYTES_PER_TOKEN"] = str(kv_bytes_per_token)
    if engines.vllm is not None and not engines.own_connector:
        gpus = [(net.authority(settings.engine_host, place.http), place.gpus) for place in places if place.gpus]
        if gpus:
            variables["POWER_GPUS"] = ",".join(f"{address}={'+'.join(words)}" for address, words in gpus)
    for name in ("SHUTDOWN_GRACE", "DECODE_MAX_IN_FLIGHT", "KV_BUFFER_BYTES", "KV_BYTES_PER_TOKEN", "POWER_GPUS"):
        if name in variables and environ.get(name):
            variables[name] = environ[name]
    return Command((*program, *split_words(settings.extra_proxy_args)), variables)


# -- engines


def engine(
    settings: Settings, engines: Engines, place: Place, python: str, root: str, environ: Mapping[str, str]
) -> Command:
    """One prefill, decode or plain engine.

    Args:
        python: the Python that has the simulator.
        root: the checkout, for PYTHONPATH of this project's connector.
    """
    if engines.vllm is None:
        return simulated(settings, place, python)
    if place.role == "plain":
        return plain(settings, engines.vllm, place, environ)
    if engines.own_connector:
        return own_connector(settings, engines.vllm, place, root, environ, engines.kv_cache_bytes)
    return p2p_nccl(settings, engines.vllm, place)


def own_connector(
    settings: Settings,
    facts: VllmFacts,
    place: Place,
    root: str,
    environ: Mapping[str, str],
    kv_cache_bytes: int = 0,
    extra: Mapping[str, object] | None = None,
) -> Command:
    """A vLLM engine with this project's connector, which sends after the step: CUDA graphs and chunks cost nothing.

    Args:
        kv_cache_bytes: size of its KV cache; 0: what its share of the GPU leaves.
        extra: see :func:`own_transfer_config`.
    """
    path = environ.get("PYTHONPATH", "")
    variables = {
        **_on_gpus(place),
        "VLLM_HOST_IP": announced_host(settings.engine_host),
        "PYTHONPATH": f"{root}:{path}" if path else root,
    }
    prefill = place.role == "prefill"
    words = _serve(settings, facts, place, memory_share(settings, place.role, "own"))
    if settings.enforce_eager == "1" or (settings.enforce_eager == "prefill" and prefill):
        words.append("--enforce-eager")
    if prefill and settings.chunked_prefill == "off":
        words.append("--no-enable-chunked-prefill")
    if kv_cache_bytes:
        words += ["--kv-cache-memory-bytes", str(kv_cache_bytes)]
    words += ["--kv-transfer-config", own_transfer_config(settings, place, extra)]
    return Command((*words, *_extra(settings, place)), variables)


def p2p_nccl(settings: Settings, facts: VllmFacts, place: Place) -> Command:
    """A vLLM engine with vLLM's P2pNcclConnector."""
    variables = {
        **_on_gpus(place),
        "VLLM_HOST_IP": settings.engine_host,
        "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION": "1",
    }
    if not facts.at_least(0, 11):
        variables["VLLM_USE_V1"] = "1"
    prefill = place.role == "prefill"
    words = _serve(settings, facts, place, memory_share(settings, place.role, "p2p_nccl"))
    if settings.enforce_eager in ("auto", "1") or (settings.enforce_eager == "prefill" and prefill):
        words.append("--enforce-eager")
    elif prefill and facts.at_least(0, 11):
        # The connector sends KV from inside the forward pass (save_kv_layer). A step that is replayed as one full
        # graph would skip it, and the connector does not ask for piecewise graphs itself.
        words += ["--compilation-config", '{"cudagraph_mode":"PIECEWISE"}']
    words += _quiet(facts)
    if not prefill:
        # A cached prefix that covers the prompt leaves the KV that was sent for it counted in the buffer until the
        # engine ends (p2p_nccl_connector.py asks for no load, get_finished gives nothing back), and decode computes no
        # prefill.
        words.append("--no-enable-prefix-caching")
    elif not chunked_prefill(settings, facts):
        words.append("--no-enable-chunked-prefill")
    words += ["--kv-transfer-config", p2p_transfer_config(settings, place)]
    return Command((*words, *_extra(settings, place)), variables)


def plain(settings: Settings, facts: VllmFacts, place: Place, environ: Mapping[str, str]) -> Command:
    """A vLLM engine without proxy, which `bench` compares with: vLLM's defaults where no setting says otherwise."""
    variables = {**_on_gpus(place), "VLLM_HOST_IP": settings.engine_host}
    if not environ.get("VLLM_PORT"):
        # vLLM looks for free ports of its own and takes them a moment later; engines that start together found the
        # same one (0.21, seen on two GPUs). From here it counts up.
        variables["VLLM_PORT"] = str(41000 + 64 * (place.http - settings.prefill_http_port))
    words = _serve(settings, facts, place, settings.prefill_gpu_memory_utilization)
    if settings.enforce_eager == "1":
        words.append("--enforce-eager")
    words += _quiet(facts)
    return Command((*words, *split_words(settings.extra_plain_args)), variables)


def simulated(settings: Settings, place: Place, python: str) -> Command:
    """A simulated engine (disagg_sim)."""
    words = [python, "-m", "disagg_sim"]
    batches = ["--max-model-len", str(settings.max_model_len), "--max-num-seqs", str(settings.max_num_seqs)]
    batches += ["--max-num-batched-tokens", str(settings.max_num_batched_tokens)]
    address = ["--host", settings.engine_host, "--port", str(place.http)]
    if place.role == "plain":
        words += ["--role", "decode", "--connector", "disagg_kv", *address, "--kv-port", "0", *batches]
    else:
        words += ["--role", place.role, *address, "--kv-port", str(place.kv)]
        words += ["--proxy", net.authority(settings.proxy_host, settings.proxy_port), *batches]
        words += ["--kv-buffer-bytes", str(settings.kv_buffer_size.whole())]
        words += ["--kv-pool-bytes", str(settings.mem_pool_size_gb << 30)]
    if place.gpus and place.gpus[0].isdecimal():
        words += ["--gpu", place.gpus[0]]
    for name in settings.served_names:
        words += ["--model", name]
    if place.role == "plain":
        words += split_words(settings.extra_plain_args)
    return Command((*words, *split_words(settings.extra_sim_args)))


# -- what vLLM's engines have in common


def _on_gpus(place: Place) -> dict[str, str]:
    # CUDA numbers GPUs by speed unless it is set to number them as nvidia-smi does.
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(place.gpus)}


def _serve(settings: Settings, facts: VllmFacts, place: Place, share: str) -> list[str]:
    words = [*facts.command, "serve", settings.model, "--host", settings.engine_host, "--port", str(place.http)]
    words += ["--served-model-name", *settings.served_names, "--dtype", settings.dtype]
    words += ["--max-model-len", str(settings.max_model_len)]
    words += ["--max-num-batched-tokens", str(settings.max_num_batched_tokens)]
    words += ["--max-num-seqs", str(settings.max_num_seqs), "--gpu-memory-utilization", share]
    if len(place.gpus) > 1:
        words += ["--tensor-parallel-size", str(len(place.gpus))]
    return words


def _quiet(facts: VllmFacts) -> list[str]:
    return [] if facts.at_least(0, 10) else ["--disable-log-requests"]


def _extra(settings: Settings, place: Place) -> list[str]:
    return split_words(settings.extra_prefill_args if place.role == "prefill" else settings.extra_decode_args)


def memory_share(settings: Settings, role: str, connector: str) -> str:
    """The share of a GPU that vLLM takes. Only P2pNcclConnector keeps a buffer for arrived KV beside it."""
    if role == "prefill":
        return settings.prefill_gpu_memory_utilization
    return settings.decode_gpu_memory_utilization or ("0.9" if connector == "own" else "0.7")


def chunked_prefill(settings: Settings, facts: VllmFacts) -> bool:
    """Whether a prefill engine with P2pNcclConnector computes prompts in chunks.

    The connector asserts that every further chunk brings new blocks (build_connector_meta, from 0.11 on), which is
    false for a chunk that ends inside the last block: the prefill engine dies. Whole prompts cannot meet it. Before
    0.14 the V1 engine chunks whatever the flag says.
    """
    whole_prompts = settings.max_num_batched_tokens >= settings.max_model_len
    off = settings.chunked_prefill == "off" or (settings.chunked_prefill == "auto" and whole_prompts)
    return not (off and facts.at_least(0, 14))


def chunks_may_kill(settings: Settings, engines: Engines) -> bool:
    """Whether the prefill engine may meet the assertion that :func:`chunked_prefill` names."""
    facts = engines.vllm
    if facts is None or engines.own_connector:
        return False
    return chunked_prefill(settings, facts) and facts.at_least(0, 11)


def own_transfer_config(settings: Settings, place: Place, further: Mapping[str, object] | None = None) -> str:
    """``--kv-transfer-config`` of this project's connector (docs/connector.md).

    It listens and fetches on the loopback interface unless it is configured otherwise.

    Args:
        further: keys of ``kv_connector_extra_config`` that win; with ``proxies`` among them the engine announces
            itself to those alone.
    """
    host = announced_host(settings.engine_host)
    extra: dict[str, object] = {"http_port": place.http}
    if "proxies" not in (further or {}):
        extra = {"proxy_ip": net.reach(settings.proxy_host), "proxy_port": settings.proxy_port, **extra}
    if host != "127.0.0.1":
        extra["listen"] = host
    if not net.is_loopback(host):
        extra["peers"] = host
    extra |= further or {}
    config: dict[str, object] = {
        "kv_connector": "DisaggKVConnector",
        "kv_connector_module_path": "disagg_kv.connector",
        "kv_role": _kv_role(place),
        "kv_port": place.kv,
    }
    if place.role == "decode":
        config["kv_load_failure_policy"] = "recompute"
    return _compact({**config, "kv_connector_extra_config": extra})


def p2p_transfer_config(settings: Settings, place: Place) -> str:
    """``--kv-transfer-config`` of P2pNcclConnector.

    A prefill engine receives nothing, so it needs neither buffer nor pool; vLLM wants a number all the same. The
    connector puts "tcp://" before the proxy's address and ":port" behind it.
    """
    decode = place.role == "decode"
    proxy_ip = net.reach(settings.proxy_host)
    extra = {
        "proxy_ip": f"[{proxy_ip}]" if ":" in proxy_ip and not proxy_ip.startswith("[") else proxy_ip,
        "proxy_port": str(settings.proxy_port),
        "http_port": str(place.http),
        "send_type": "PUT_ASYNC",
        "nccl_num_channels": "16",
        "mem_pool_size_gb": str(settings.mem_pool_size_gb) if decode else "1",
    }
    return _compact(
        {
            "kv_connector": "P2pNcclConnector",
            "kv_role": _kv_role(place),
            "kv_buffer_size": settings.kv_buffer_size if decode else "1e1",
            "kv_port": str(place.kv),
            "kv_connector_extra_config": extra,
        }
    )


def _kv_role(place: Place) -> str:
    return "kv_producer" if place.role == "prefill" else "kv_consumer"


def _compact(config: Mapping[str, object]) -> str:
    return json.dumps(config, separators=(",", ":"))
