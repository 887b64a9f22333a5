"""Which engines run here, on which GPUs and ports. Pure: no I/O, only the settings.

One engine of a role is ``prefill``; several are ``prefill1``, ``prefill2``, … The first engine of each role gets the
ports that were asked for; further ones count up past what is taken.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from disagg_machine.messages import die
from disagg_machine.settings import Settings


@dataclass(frozen=True, slots=True)
class Place:
    """Where one part runs.

    Attributes:
        role: proxy, prefill, decode, or plain (an engine without proxy, for comparison).
        http: its HTTP port.
        kv: its first KV port, one for each GPU; of the proxy: its registration port; None for a plain engine.
        gpus: as the user names them, by index or UUID.
    """

    name: str
    role: str
    http: int = 0
    kv: int | None = None
    gpus: tuple[str, ...] = ()

    @property
    def ports(self) -> list[int]:
        """Every port that it binds."""
        if self.kv is None:
            return [self.http]
        return [self.http, *range(self.kv, self.kv + max(1, len(self.gpus)))]

    def shares_gpu_with(self, other: Place) -> bool:
        """Whether both use a GPU. vLLM measures free memory while it starts, so they must not start together."""
        return bool(set(self.gpus) & set(other.gpus))


@dataclass(frozen=True, slots=True)
class Layout:
    """The parts of this machine in the order of starting: the proxy, prefills, decodes."""

    parts: tuple[Place, ...]

    def __getitem__(self, name: str) -> Place:
        return next(place for place in self.parts if place.name == name)

    def __contains__(self, name: object) -> bool:
        return any(place.name == name for place in self.parts)

    @property
    def names(self) -> list[str]:
        """Names of all parts."""
        return [place.name for place in self.parts]

    def of(self, role: str) -> list[Place]:
        """The parts of a role."""
        return [place for place in self.parts if place.role == role]

    @property
    def prefills(self) -> list[Place]:
        """The prefill engines."""
        return self.of("prefill")

    @property
    def decodes(self) -> list[Place]:
        """The decode engines."""
        return self.of("decode")

    @property
    def engines(self) -> list[Place]:
        """Prefill and decode engines."""
        return [*self.prefills, *self.decodes]

    @property
    def shared_gpus(self) -> list[str]:
        """GPUs, as the user names them, that a prefill and a decode engine use."""
        by_role = [{gpu for place in places for gpu in place.gpus} for places in (self.prefills, self.decodes)]
        return sorted(by_role[0] & by_role[1])

    @property
    def tensor_parallel(self) -> int:
        """GPUs of each engine."""
        return len(self.parts[-1].gpus)


class _Ports:
    """Ports that are assigned, and the parts that they are assigned to."""

    def __init__(self) -> None:
        self.taken: dict[int, str] = {}

    def claim(self, owner: str, ports: Iterable[int]) -> None:
        """Give these ports to ``owner``."""
        for port in ports:
            if port in self.taken:
                raise die(2, "port_twice", port, self.taken[port], owner)
            self.taken[port] = owner

    def after(self, port: int, width: int) -> int:
        """The first port after ``port`` that begins ``width`` free ones."""
        for first in range(port + 1, 65536 - width + 1):
            if not any(one in self.taken for one in range(first, first + width)):
                return first
        raise die(2, "ports_run_out", port)


def layout(settings: Settings) -> Layout:
    """The parts that these settings ask for.

    Raises:
        MachineError: 2, GPUs or ports that contradict each other.
    """
    ports = _Ports()
    ports.claim("HTTP_PROXY_PORT", [settings.http_proxy_port])
    ports.claim("PROXY_PORT", [settings.proxy_port])
    proxy = Place("proxy", "proxy", settings.http_proxy_port, settings.proxy_port)
    engines = _engines(settings)
    first = {"prefill": (settings.prefill_http_port, settings.prefill_kv_port)}
    first["decode"] = (settings.decode_http_port, settings.decode_kv_port)
    placed: dict[str, Place] = {}
    for place in sorted(engines, key=lambda one: one.name not in (one.role, f"{one.role}1")):
        http, kv = first[place.role]
        width = len(place.gpus)
        if place.name not in (place.role, f"{place.role}1"):
            http = ports.after(http, 1)
            ports.claim(f"{place.name} HTTP", [http])
            kv = ports.after(kv, width)
        else:
            ports.claim(f"{place.name} HTTP", [http])
        ports.claim(f"{place.name} KV", range(kv, kv + width))
        placed[place.name] = replace(place, http=http, kv=kv)
    return Layout((proxy, *(placed[place.name] for place in engines)))


def _engines(settings: Settings) -> list[Place]:
    """Prefills and decodes with their GPUs, without ports."""
    found: list[Place] = []
    for role, listed in (
        ("prefill", settings.prefill_gpus or settings.prefill_gpu),
        ("decode", settings.decode_gpus or settings.decode_gpu),
    ):
        entries = listed.split(",")
        for number, entry in enumerate(entries, 1):
            name = role if len(entries) == 1 else f"{role}{number}"
            gpus = _gpus(entry, settings.tensor_parallel)
            if found and len(gpus) != len(found[0].gpus):
                raise die(2, "unequal_parallel", name)
            found.append(Place(name, role, gpus=gpus))
    return found


def _gpus(entry: str, width: int) -> tuple[str, ...]:
    """The GPUs of one engine; TENSOR_PARALLEL widens a single number to that many, counted up."""
    gpus = entry.split("+")
    if len(gpus) == 1 and width > 1:
        if not (entry.isascii() and entry.isdigit()):
            raise die(2, "gpu_not_countable", entry, width)
        gpus = [str(int(entry) + offset) for offset in range(width)]
    if width > 1 and len(gpus) != width:
        raise die(2, "gpu_count_differs", entry, width)
    return tuple(gpus)
