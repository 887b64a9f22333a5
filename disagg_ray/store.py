"""The cluster files of running applications, kept in Ray's own key-value store, so that later commands need no file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ray.experimental import internal_kv

_NAMESPACE = b"disagg_ray"


def save(name: str, raw: Mapping[str, Any]) -> None:
    """Keep the file of an application."""
    internal_kv._internal_kv_put(name.encode(), json.dumps(raw).encode(), overwrite=True, namespace=_NAMESPACE)


def load_all() -> dict[str, dict[str, Any]]:
    """The files of all applications, by name."""
    names = internal_kv._internal_kv_list(b"", namespace=_NAMESPACE)
    found = {name.decode(): internal_kv._internal_kv_get(name, namespace=_NAMESPACE) for name in names}
    return {name: json.loads(value) for name, value in found.items() if value}


def remove(name: str) -> None:
    """Forget the file of an application."""
    internal_kv._internal_kv_del(name.encode(), namespace=_NAMESPACE)
