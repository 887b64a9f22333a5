"""Which prefills must go with a decode.

With P2pNcclConnector a prefill that has sent KV to a decode stays frozen, or holds a dead NCCL communicator, once that
decode is gone. Prefills with this project's connector just connect anew.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping

from disagg_machine.layout import Layout
from disagg_machine.parts import Part
from disagg_machine.proxy_view import ProxyView

Parts = Mapping[str, Part | None]
"""PID files by the name of the part; None or no entry where there is none."""


def has_served(part: Part | None, port: int, proxy: Part | None, view: ProxyView) -> bool:
    """Whether requests have gone to the engine on ``port`` since ``part`` was started.

    A proxy younger than the part has not counted them all, and a proxy that cannot be asked says nothing: then yes.
    """
    count = view.requests(port)
    if part is None or proxy is None or count is None or not proxy.get("since"):
        return True
    return not (proxy.number("since") <= part.number("since") and count <= part.number("served"))


def paired_prefills(
    layout: Layout, decode: str, known: Parts, ask: Callable[[], ProxyView], but: Container[str] = ()
) -> list[str]:
    """Prefills that have sent KV to ``decode``, without those in ``but``.

    Args:
        ask: asks the proxy; not called where no prefill can be tied to a decode.
    """
    found = {place.name: known.get(place.name) for place in layout.prefills if place.name not in but}
    tied = {name: part for name, part in found.items() if part is not None and not part.own_connector}
    if not tied:
        return []
    view, proxy = ask(), known.get("proxy")
    if not has_served(known.get(decode), layout[decode].http, proxy, view):
        return []
    return [name for name, part in tied.items() if has_served(part, layout[name].http, proxy, view)]
