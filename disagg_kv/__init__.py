"""KV connector for vLLM 0.21 and newer: prefill pushes KV blocks to decode over NCCL or TCP.

vLLM loads it with ``"kv_connector": "DisaggKVConnector", "kv_connector_module_path": "disagg_kv.connector"``.
Importing this package imports neither vLLM nor torch, so that the proxy can use the wire protocol.
"""

from __future__ import annotations

__version__ = "0.2.0"

PROTOCOL_NAME = "disagg_kv"
PROTOCOL_VERSION = 1
"""Incremented when engines of the old and the new version could misinterpret each other's messages."""
