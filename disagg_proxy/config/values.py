"""Readers of settings: text to value. Each raises ValueError that says what the value must be."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from disagg_proxy.address import Address, parse_address
from disagg_proxy.config.model import EngineGpus, StaticInstance

Reader = Callable[[str], object]

MAX_WORKERS = 64

_SIZES = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3}


def host(raw: str) -> str:
    """A host name or address to bind, without a port."""
    bare = raw[1:-1] if raw.startswith("[") and raw.endswith("]") else raw
    if not bare or any(c.isspace() or c in "/[]" for c in bare):
        raise ValueError("must be a host name or an IP address without a port")
    if ":" in bare:
        try:
            ipaddress.IPv6Address(bare)
        except ValueError:
            raise ValueError("must be a host name or an IP address without a port") from None
    return bare


def port(raw: str) -> int:
    """A TCP port; 0 lets the kernel choose."""
    if not raw.isascii() or not raw.isdigit() or not 0 <= int(raw) <= 65535:
        raise ValueError("must be a port from 0 to 65535")
    return int(raw)


def count(raw: str) -> int:
    """A whole number from 1."""
    if not raw.isascii() or not raw.isdigit() or not 1 <= int(raw) <= 10**9:
        raise ValueError("must be a whole number from 1")
    return int(raw)


def workers(raw: str) -> int:
    """A number of processes, or auto."""
    if raw.lower() == "auto":
        return min(len(os.sched_getaffinity(0)), MAX_WORKERS)
    if not raw.isascii() or not raw.isdigit() or not 1 <= int(raw) <= MAX_WORKERS:
        raise ValueError(f"must be a whole number from 1 to {MAX_WORKERS}, or auto")
    return int(raw)


def addresses(raw: str) -> tuple[Address, ...]:
    """Comma-separated HOST:PORT."""
    try:
        return tuple(parse_address(part.strip()) for part in raw.split(",") if part.strip())
    except ValueError as error:
        raise ValueError(f"must be HOST:PORT, separated by commas: {error}") from None


def engine_gpus(raw: str) -> tuple[EngineGpus, ...]:
    """Comma-separated HOST:PORT=GPU+GPU."""
    found = []
    for part in filter(None, (part.strip() for part in raw.split(","))):
        address, _, words = part.partition("=")
        gpus = tuple(filter(None, words.split("+")))
        try:
            named = parse_address(address)
        except ValueError as error:
            raise ValueError(f"must be HOST:PORT=GPU, separated by commas: {error}") from None
        if not gpus or not all(word.isdecimal() or word.startswith("GPU-") for word in gpus):
            raise ValueError(f"must name GPUs by index or UUID after HOST:PORT=, joined by +, not {part!r}")
        found.append(EngineGpus(named, gpus))
    return tuple(found)


def limit(raw: str) -> int:
    """A whole number; 0 for no limit."""
    if not raw.isascii() or not raw.isdigit() or int(raw) > 10**9:
        raise ValueError("must be a whole number, 0 for no limit")
    return int(raw)


def size_or_none(raw: str) -> int:
    """A number of bytes as :func:`size` reads it; 0 for unknown or no limit."""
    return 0 if raw == "0" else size(raw)


def seconds(raw: str) -> float:
    """A positive number of seconds."""
    try:
        value = float(raw)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e7:
        raise ValueError("must be a number of seconds above 0")
    return value


def milliseconds(raw: str) -> float:
    """A number of milliseconds; 0 for none."""
    try:
        value = float(raw)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e7:
        raise ValueError("must be a number of milliseconds, 0 for none")
    return value


def size(raw: str) -> int:
    """A number of bytes, with an optional K, M or G (powers of 1024)."""
    number, unit = (raw[:-1], raw[-1].upper()) if raw[-1:].isalpha() else (raw, "")
    if not number.isascii() or not number.isdigit() or int(number) == 0 or unit not in _SIZES:
        raise ValueError("must be a number of bytes such as 1048576, 512K, 64M or 1G")
    return int(number) * _SIZES[unit]


def flag(raw: str) -> bool:
    """Yes or no."""
    value = raw.lower()
    if value in ("1", "true", "yes", "on"):
        return True
    if value in ("0", "false", "no", "off"):
        return False
    raise ValueError("must be 1 or 0 (or true, false, yes, no, on, off)")


def key(raw: str) -> str:
    """A secret that is sent in a header."""
    if not raw.isascii() or not raw.isprintable() or " " in raw:
        raise ValueError("must be printable ASCII without spaces, since it is sent in a header")
    return raw


@dataclass(frozen=True, slots=True)
class Choice:
    """Reads one of ``options``, case-insensitive; ``hints`` explain values that are valid only elsewhere."""

    options: tuple[str, ...]
    hints: tuple[tuple[str, str], ...] = ()

    def __call__(self, raw: str) -> str:
        value = raw.lower().replace("-", "_")
        if value not in self.options:
            hint = dict(self.hints).get(value)
            raise ValueError("must be one of " + ", ".join(self.options) + (f" ({hint})" if hint else ""))
        return value


def choice(*options: str) -> Choice:
    """One of ``options``."""
    return Choice(options)


def policy(options: Sequence[str], elsewhere: Mapping[str, str]) -> Choice:
    """One of ``options``; ``elsewhere`` has a hint for each policy that is valid only for the other role."""
    return Choice(tuple(options), tuple(elsewhere.items()))


def path(raw: str) -> str:
    """The absolute path of a file; empty for none. The file itself is checked where it is read."""
    return os.path.abspath(raw) if raw else ""


def header_name(raw: str) -> str:
    """The name of an HTTP header."""
    if not raw.isascii() or not raw.replace("-", "").replace("_", "").isalnum():
        raise ValueError("must be the name of an HTTP header such as X-Session-Id")
    return raw


def factor(raw: str) -> float:
    """A number from 1."""
    try:
        value = float(raw)
    except ValueError:
        value = 0.0
    if not 1 <= value < 1e6:
        raise ValueError("must be a number from 1, such as 1.5")
    return value


def origins(raw: str) -> tuple[str, ...]:
    """Comma-separated browser origins, or * alone."""
    found = tuple(part.strip().rstrip("/") for part in raw.split(",") if part.strip())
    for origin in found:
        parts = urlsplit(origin)
        if origin != "*" and (parts.scheme not in ("http", "https") or not parts.netloc or parts.path):
            raise ValueError(f"must be origins such as https://chat.example.org, or *; {origin!r} is not one")
    return found


def registrants(raw: str) -> tuple[str, ...]:
    """Comma-separated: local, any, proven, host names, addresses, networks."""
    found = tuple(part.strip() for part in raw.split(",") if part.strip())
    if not found:
        raise ValueError("must name at least one of local, any, proven, a host name, an address or a network")
    for entry in found:
        if "/" in entry:
            try:
                ipaddress.ip_network(entry, strict=False)
            except ValueError:
                raise ValueError(f"must hold networks such as 10.0.0.0/24; {entry!r} is not one") from None
    return found


def instances(raw: str) -> tuple[StaticInstance, ...]:
    """Instances separated by white space, each ``URL``, ``URL,KV_ADDRESS`` or ``URL,PROTOCOL``.

    Which protocols there are is checked by :func:`disagg_proxy.connectors.table.check_instances`.
    """
    return tuple(_instance(part) for part in raw.split())


def _instance(raw: str) -> StaticInstance:
    url, comma, kv = raw.partition(",")
    if "://" not in url:
        url = "http://" + url
    parts = urlsplit(url)
    try:
        port_number = parts.port
    except ValueError:
        port_number = None
    if parts.scheme != "http" or not parts.hostname or not port_number or parts.path.strip("/") or parts.query:
        raise ValueError(f"must be http://HOST:PORT[,KV_HOST:KV_PORT or ,nixl]; {raw!r} is not")
    http_address = parse_address(parts.netloc.rpartition("@")[2]).text
    if not comma:
        return StaticInstance(http_address)
    if re.fullmatch(r"[A-Za-z]\w*", kv):
        return StaticInstance(http_address, protocol=kv.lower())
    try:
        return StaticInstance(http_address, parse_address(kv).text)
    except ValueError as error:
        raise ValueError(f"must be http://HOST:PORT[,KV_HOST:KV_PORT or ,nixl]; in {raw!r} {error}") from None


def access_log(raw: str) -> str:
    """off, "-", or a file that can be appended to."""
    if raw in ("off", "-"):
        return raw
    folder = os.path.dirname(raw) or "."
    taken = os.path.exists(raw)
    if os.path.isdir(raw) or not os.access(raw if taken else folder, os.W_OK if taken else os.W_OK | os.X_OK):
        raise ValueError("must be off, -, or a file that can be written, in a folder that exists")
    return os.path.abspath(raw)


def traces(raw: str) -> bool:
    """As :func:`flag`; 1 needs the OpenTelemetry packages and a supported OTLP protocol."""
    on = flag(raw) and os.environ.get("OTEL_SDK_DISABLED", "").lower() != "true"
    if not on:
        return False
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.sdk.trace  # noqa: F401
    except ImportError:
        packages = "opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"
        raise ValueError(f"must be 0 while OpenTelemetry is not installed: pip install {packages}") from None
    names = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    protocol = next((os.environ[name] for name in names if os.environ.get(name)), "http/protobuf")
    if protocol != "http/protobuf":
        raise ValueError(f"must be 0 with OTEL_EXPORTER_OTLP_PROTOCOL={protocol}: only http/protobuf is supported")
    return True
