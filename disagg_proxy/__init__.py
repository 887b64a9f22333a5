"""One OpenAI endpoint in front of vLLM prefill and decode instances on one machine."""

from functools import lru_cache
from importlib.util import find_spec

__version__ = "0.2.0"


@lru_cache(maxsize=1)
def compiled() -> bool:
    """Whether the hot path of this process is native code (setup.py)."""
    spec = find_spec("disagg_proxy.runtime.inline_coroutine")
    return spec is not None and not str(spec.origin).endswith(".py")
