"""How log lines look: readable text, or one JSON object a line."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone

from disagg_proxy.config import Config


class JsonLines(logging.Formatter):
    """time (ISO 8601, UTC), level, logger, message, the number of the worker, and, with an exception, its traceback."""

    def __init__(self, worker: int | None = None) -> None:
        super().__init__()
        self._worker = worker

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if self._worker is not None:
            line["worker"] = str(self._worker)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class HideUnfinished(logging.Filter):
    """Drops uvicorn's line about a response aborted on purpose: server/asgi/exchange_scope.py logs the cause."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "returned without completing response" not in str(record.msg)


def configure_logging(config: Config, worker: int | None = None) -> None:
    """Send everything to standard error in the configured form.

    Args:
        worker: the number of this process where there are several.
    """
    handler = logging.StreamHandler(sys.stderr)
    if config.log_format == "json":
        handler.setFormatter(JsonLines(worker))
    else:
        which = "" if worker is None else f"worker {worker} "
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)-7s {which}%(name)s: %(message)s"))
    logging.basicConfig(level=config.log_level.upper(), handlers=[handler], force=True)
    logging.getLogger("uvicorn.error").addFilter(HideUnfinished())
    logging.getLogger("asyncio").setLevel(logging.WARNING)
