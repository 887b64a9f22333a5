"""Digests of the LoRA adapters of this engine, because two engines may have different adapters of one name.

vLLM reads an adapter's files when it is loaded (``EngineCore.add_lora``), and again after it was evicted from the CPU
cache (``--max-cpu-loras``). If the files change in between, the content that a request is computed with is unknown.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disagg_kv.engine.digest import Unreadable, adapter_digest, adapter_files, identity
from disagg_kv.engine.versions import local_folder

logger = logging.getLogger("vllm.disagg_kv")
_MAX_ADAPTERS = 4096


@dataclass(frozen=True)
class _Known:
    files: tuple[Path, ...] = ()
    identity: tuple[tuple[int, ...], ...] = ()
    digest: str = ""
    """Empty if the files cannot be read."""


class Adapters:
    """Digests by adapter id and path. Called by the engine's thread only."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[int, str], _Known] = OrderedDict()

    def loaded(self, lora: Any) -> None:
        """Read the digest of a ``LoRARequest`` whose files vLLM has just loaded or reloaded (``load_inplace``)."""
        name, known = (lora.lora_int_id, lora.lora_path), _Known()
        try:
            folder = local_folder(lora.lora_path)
            if folder is None:
                raise Unreadable("its files are not on this machine")
            files = tuple(adapter_files(folder))
            known = _Known(files, identity(files), adapter_digest(files))
        except Exception as error:  # nothing may raise inside the scheduler, where it would end the engine
            self._warn(lora, str(error))
        self._known[name] = known
        self._known.move_to_end(name)
        while len(self._known) > _MAX_ADAPTERS:
            self._known.popitem(last=False)

    def digest(self, lora: Any) -> str | None:
        """Digest of the adapter that the engine computes this request with; None if it is uncertain."""
        name = (lora.lora_int_id, lora.lora_path)
        if name not in self._known:
            self.loaded(lora)
        known = self._known[name]
        if not known.digest:
            return None
        try:
            if identity(known.files) == known.identity:
                return known.digest
            reason = "its files have changed since it was loaded"
        except OSError as error:
            reason = str(error)
        self._warn(lora, reason)
        self._known[name] = _Known()
        return None

    def _warn(self, lora: Any, reason: str) -> None:
        logger.warning("prompts with LoRA adapter %s are computed without KV transfer until it is loaded again: %s",
                       lora.lora_name, reason)  # fmt: skip
